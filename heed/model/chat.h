// Chat templates: how a conversation is written for a model.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "heed/model/tokenizer.h"

namespace heed::model {

struct ChatTurn {
  std::string role;  // "system", "user", "assistant"
  std::string content;
};

/// The template in tokenizer.chat_template. Templates are programs; heed runs none, it recognises
/// one by its text. Supported: chatml ("<|im_start|>role\ncontent<|im_end|>\n" for every turn), with
/// or without a system prompt for conversations that do not begin with one.
class ChatTemplate {
 public:
  static ChatTemplate from(const Gguf& file);
  /// From the template itself, "" for none. Nothing is thrown for one that is not supported.
  static ChatTemplate from(const std::string& text);

  /// The model has a template, supported or not.
  bool available() const { return !source_.empty(); }
  /// True when the model has a template that heed can apply.
  bool known() const { return known_; }
  /// Throws Error when there is a template that heed cannot apply, listing those it can.
  void require_supported() const;
  /// What begins conversations that do not begin with a system turn, "" for nothing.
  const std::string& default_system() const { return system_; }

  /// The conversation as the template writes it; with `generation` the head of the assistant's turn
  /// follows. Throws Error when there is no template or it is not supported.
  std::string render(const std::vector<ChatTurn>& turns, bool generation) const;
  /// The ids of render(), then of `answer`, with which the assistant's turn begins; BOS is not added.
  /// Only the template's own marks become control tokens: roles, contents and `answer` stay plain
  /// text, so that a document cannot end its own turn. Throws Error as render() does, and when a mark
  /// is not a control token of the vocabulary.
  std::vector<Token> encode(const Tokenizer& tokenizer, const std::vector<ChatTurn>& turns, bool generation,
                            std::string_view answer = "") const;
  /// One user turn and the start of the answer.
  std::vector<Token> encode(const Tokenizer& tokenizer, const std::string& user, const std::string& answer) const;

 private:
  struct Part {
    std::string text;
    bool mark;  // a control token
  };
  std::vector<Part> parts(const std::vector<ChatTurn>& turns, bool generation, std::string_view answer) const;

  std::string source_, system_;
  bool known_ = false;
};

}  // namespace heed::model
