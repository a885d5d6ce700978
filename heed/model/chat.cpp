#include "heed/model/chat.h"

#include <utility>

#include "heed/base/error.h"
#include "heed/base/text.h"

namespace heed::model {
namespace {

constexpr const char* turn_start = "<|im_start|>";
constexpr const char* turn_end = "<|im_end|>";

// A template in one spelling: inside {{ }} and {% %} no spaces but those in quotes, single quotes,
// real newlines for \n; what lies between is kept.
std::string normal(std::string_view source) {
  std::string out;
  bool code = false;
  char quote = 0;
  for (size_t i = 0; i < source.size(); ++i) {
    const std::string_view two = source.substr(i, 2);
    const char c = source[i];
    if (quote != 0) {
      if (two == "\\n") {
        out += '\n';
        ++i;
      } else {
        out += c == quote ? '\'' : c;
        if (c == quote) quote = 0;
      }
    } else if (two == (code ? "}}" : "{{") || two == (code ? "%}" : "{%")) {
      code = !code;
      out += two;
      ++i;
    } else if (code && (c == '\'' || c == '"')) {
      quote = c;
      out += '\'';
    } else if (!code || (c != ' ' && c != '\n' && c != '\t' && c != '\r')) {
      out += c;
    }
  }
  return out;
}

// Takes `prefix` off the front of `text` if it is there.
bool skip(std::string_view& text, std::string_view prefix) {
  if (!text.starts_with(prefix)) return false;
  text.remove_prefix(prefix.size());
  return true;
}

// The whole template must be chatml: one that does anything else would be applied wrongly. The
// default system prompt, if any, goes to `system`.
bool is_chatml(const std::string& source, std::string& system) {
  const std::string spelled = normal(source);
  std::string_view rest = spelled;
  if (!skip(rest, "{%formessageinmessages%}")) return false;
  std::string found;
  if (skip(rest, "{%ifloop.firstandmessages[0]['role']!='system'%}{{'<|im_start|>system\n")) {
    const size_t end = rest.find("<|im_end|>");
    if (end == rest.npos || rest.substr(0, end).find_first_of("'\\{}") != rest.npos) return false;
    found = rest.substr(0, end);
    rest.remove_prefix(end);
    if (!skip(rest, "<|im_end|>\n'}}{%endif%}")) return false;
  }
  if (!skip(rest, "{{'<|im_start|>'+message['role']+'\n'+message['content']+'<|im_end|>'+'\n'}}{%endfor%}") ||
      rest != "{%ifadd_generation_prompt%}{{'<|im_start|>assistant\n'}}{%endif%}")
    return false;
  system = std::move(found);
  return true;
}

}  // namespace

ChatTemplate ChatTemplate::from(const Gguf& file) { return from(file.text_or("tokenizer.chat_template", "")); }

ChatTemplate ChatTemplate::from(const std::string& text) {
  ChatTemplate chat;
  chat.source_ = text;
  chat.known_ = is_chatml(text, chat.system_);
  return chat;
}

void ChatTemplate::require_supported() const {
  if (available() && !known())
    fail("tokenizer.chat_template = \"{}\": not supported, supported: chatml; --chat off leaves it out",
         printable(source_, 40));
}

// The conversation, cut at the marks. What stands between two of them is tokenized as one stretch,
// as it would be in one text.
std::vector<ChatTemplate::Part> ChatTemplate::parts(const std::vector<ChatTurn>& turns, bool generation,
                                                    std::string_view answer) const {
  if (!available()) fail("tokenizer.chat_template: the model has none");
  require_supported();
  std::vector<Part> list;
  const auto mark = [&](const char* text) { list.push_back({text, true}); };
  const auto plain = [&](std::string_view text) {
    if (list.empty() || list.back().mark) list.push_back({"", false});
    list.back().text += text;
  };
  const auto turn = [&](const std::string& role, const std::string& content) {
    mark(turn_start);
    plain(role + "\n" + content);
    mark(turn_end);
    plain("\n");
  };
  if (!turns.empty() && turns.front().role != "system" && !system_.empty()) turn("system", system_);
  for (const ChatTurn& t : turns) turn(t.role, t.content);
  if (generation) {
    mark(turn_start);
    plain("assistant\n");
  }
  plain(answer);
  return list;
}

std::string ChatTemplate::render(const std::vector<ChatTurn>& turns, bool generation) const {
  std::string text;
  for (const Part& part : parts(turns, generation, "")) text += part.text;
  return text;
}

std::vector<Token> ChatTemplate::encode(const Tokenizer& tokenizer, const std::vector<ChatTurn>& turns, bool generation,
                                        std::string_view answer) const {
  std::vector<Token> ids;
  for (const Part& part : parts(turns, generation, answer)) {
    if (!part.mark) {
      const std::vector<Token> more = tokenizer.encode(part.text, false);
      ids.insert(ids.end(), more.begin(), more.end());
      continue;
    }
    const std::optional<Token> id = tokenizer.find(part.text);
    if (!id || tokenizer.vocabulary().kinds[static_cast<size_t>(*id)] != TokenKind::control)
      fail("tokenizer.chat_template: {} is not a control token of the vocabulary", part.text);
    ids.push_back(*id);
  }
  return ids;
}

std::vector<Token> ChatTemplate::encode(const Tokenizer& tokenizer, const std::string& user,
                                        const std::string& answer) const {
  return encode(tokenizer, std::vector<ChatTurn>{{"user", user}}, true, answer);
}

}  // namespace heed::model
