// Text to token ids and back, as the model file's own metadata says.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "heed/model/gguf.h"

namespace heed::model {

using Token = std::int32_t;

/// How a token is treated; the numbers are those of tokenizer.ggml.token_type.
enum class TokenKind : std::uint8_t { normal = 1, unknown = 2, control = 3, user_defined = 4, unused = 5, byte = 6 };

/// What a tokenizer is made from.
struct Vocabulary {
  std::string model;                // "gpt2" (byte-level BPE) or "llama" (SentencePiece)
  std::string pre;                  // the pre-tokenizer's name: "smollm", "gpt-2", "default", …; gpt2 only
  std::vector<std::string> tokens;  // by id
  std::vector<float> scores;        // llama only
  std::vector<TokenKind> kinds;
  std::vector<std::string> merges;  // "left right", best first; gpt2 only
  std::optional<Token> bos, eos, unknown;
  bool add_bos = false;
  bool add_space_prefix = false;

  /// Reads tokenizer.ggml.*; throws Error naming the key that is missing or of the wrong type.
  /// Where keys are absent: every token is normal; pre is "default"; a BOS is added by llama models
  /// and the llama-bpe pre-tokenizer, a space prefix by llama models; these have BOS 1, EOS 2 and
  /// unknown 0 if tokens of such kinds stand there.
  static Vocabulary from(const Gguf& file);
  /// Byte-level: token b is byte b, and 256, "<|endoftext|>", ends a text. No merges.
  static Vocabulary bytes();
};

class Tokenizer {
 public:
  /// Throws Error for an unsupported model or pre-tokenizer (listing those supported), and for
  /// vocabularies with holes: empty lists, lengths that differ, ids out of range, tokens that are
  /// not UTF-8, merges of what is no token, missing byte tokens (llama: any; gpt2: printable ASCII
  /// and the newline, as real vocabularies lack bytes that are rare in text).
  static std::unique_ptr<Tokenizer> make(Vocabulary vocabulary);
  virtual ~Tokenizer() = default;
  Tokenizer(const Tokenizer&) = delete;
  Tokenizer& operator=(const Tokenizer&) = delete;

  /// Ids of `text`, taken byte for byte, BOS not added. User-defined tokens are matched first,
  /// leftmost, then longest; with `special` control tokens too, which otherwise never come out of a
  /// text. Safe to call from several threads. Throws Error with the byte offset when the text is
  /// not valid UTF-8 or holds a byte for which the vocabulary has no token.
  std::vector<Token> encode(std::string_view text, bool special) const;
  /// The bytes a token stands for; control and unknown tokens give "" unless `special`. Tokens may
  /// hold part of a UTF-8 sequence: concatenate before printing. Throws Error for an id out of range.
  std::string decode(Token id, bool special = false) const;
  /// The inverse of encode (but llama models write U+2581 as a space): a space prefix that the
  /// vocabulary asks for is taken away where encode put it. Text that goes on from earlier text is
  /// decoded token by token instead.
  std::string decode(const std::vector<Token>& ids, bool special = false) const;

  const Vocabulary& vocabulary() const { return vocabulary_; }
  /// BOS where the file says that it is added.
  std::optional<Token> bos() const { return vocabulary_.add_bos ? vocabulary_.bos : std::nullopt; }
  /// The id of a token by its exact text in the vocabulary.
  std::optional<Token> find(std::string_view text) const;
  /// True for tokens that end a turn or a text: eos and the known end-of-turn controls.
  bool ends_text(Token id) const;

 protected:
  /// Checks what both models have in common.
  explicit Tokenizer(Vocabulary vocabulary);
  /// Appends the ids of a stretch of valid UTF-8 between special tokens, not empty.
  virtual void encode_plain(std::string_view text, std::vector<Token>& ids) const = 0;
  /// The bytes of a token that is neither control nor unknown.
  virtual std::string decode_plain(Token id) const = 0;
  TokenKind kind(Token id) const { return vocabulary_.kinds[static_cast<size_t>(id)]; }
  const std::string& text(Token id) const { return vocabulary_.tokens[static_cast<size_t>(id)]; }
  /// The id of the token with this text that plain text may become, -1 when there is none: control
  /// and byte tokens cannot be written.
  Token plain(std::string_view text) const;

  Vocabulary vocabulary_;
  std::array<bool, 256> encodable_;  // bytes that encode_plain has tokens for

 private:
  struct Lookup;
  std::shared_ptr<const Lookup> lookup_;
};

/// Byte offset of the first byte that is not valid UTF-8 (overlong forms, surrogates and values
/// above U+10FFFF are not), or nullopt.
std::optional<size_t> invalid_utf8(std::string_view text);

}  // namespace heed::model
