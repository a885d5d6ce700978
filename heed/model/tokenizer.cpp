#include "heed/model/tokenizer.h"

#include <algorithm>
#include <limits>
#include <unordered_map>

#include "heed/base/error.h"
#include "heed/base/text.h"
#include "heed/model/token_matcher.h"
#include "heed/model/tokenizers.h"

namespace heed::model {

std::optional<size_t> invalid_utf8(std::string_view text) {
  for (size_t i = 0; i < text.size();) {
    const auto byte = [&](size_t at) { return at < text.size() ? static_cast<unsigned char>(text[at]) : 0u; };
    const unsigned lead = byte(i);
    if (lead < 0x80) {
      ++i;
      continue;
    }
    if (lead < 0xc2 || lead > 0xf4) return i;  // a stray continuation, an overlong form, too large
    const size_t n = lead < 0xe0 ? 2 : lead < 0xf0 ? 3 : 4;
    // The second byte rules out the remaining overlong forms, surrogates and values above U+10FFFF.
    const unsigned least = lead == 0xe0 ? 0xa0 : lead == 0xf0 ? 0x90 : 0x80;
    const unsigned most = lead == 0xed ? 0x9f : lead == 0xf4 ? 0x8f : 0xbf;
    if (byte(i + 1) < least || byte(i + 1) > most) return i;
    for (size_t j = 2; j < n; ++j)
      if ((byte(i + j) & 0xc0u) != 0x80u) return i;
    i += n;
  }
  return std::nullopt;
}

Vocabulary Vocabulary::from(const Gguf& file) {
  Vocabulary v;
  v.model = file.text("tokenizer.ggml.model");
  const bool pieces = v.model == "llama";
  if (!pieces) v.pre = file.text_or("tokenizer.ggml.pre", "default");
  v.tokens = file.texts("tokenizer.ggml.tokens");
  const size_t n = v.tokens.size();
  const auto of_length = [&](const char* key, size_t length) {
    if (length != n)
      fail("{}: {} has {} entries, expected {} as tokenizer.ggml.tokens has", file.name(), key, length, n);
  };
  v.kinds.assign(n, TokenKind::normal);
  if (file.has("tokenizer.ggml.token_type")) {
    const auto& kinds = file.integers("tokenizer.ggml.token_type");
    of_length("tokenizer.ggml.token_type", kinds.size());
    for (size_t i = 0; i < n; ++i) {
      if (kinds[i] < 1 || kinds[i] > 6)
        fail("{}: tokenizer.ggml.token_type[{}] = {}, expected 1 … 6", file.name(), i, kinds[i]);
      v.kinds[i] = static_cast<TokenKind>(kinds[i]);
    }
  }
  if (pieces) {
    const auto& scores = file.numbers("tokenizer.ggml.scores");
    of_length("tokenizer.ggml.scores", scores.size());
    v.scores.assign(scores.begin(), scores.end());
  } else if (file.has("tokenizer.ggml.merges")) {
    v.merges = file.texts("tokenizer.ggml.merges");
  }
  // Where the key is absent, llama models have the token at its usual place.
  const auto id = [&](const char* key, size_t usual, TokenKind kind) -> std::optional<Token> {
    if (!file.has(key))
      return pieces && usual < n && v.kinds[usual] == kind ? std::optional(static_cast<Token>(usual)) : std::nullopt;
    const Index i = file.integer(key);
    if (i < 0 || i >= static_cast<Index>(n))
      fail("{}: {} = {}, expected 0 … {}", file.name(), key, i, static_cast<Index>(n) - 1);
    return static_cast<Token>(i);
  };
  v.bos = id("tokenizer.ggml.bos_token_id", 1, TokenKind::control);
  v.eos = id("tokenizer.ggml.eos_token_id", 2, TokenKind::control);
  v.unknown = id("tokenizer.ggml.unknown_token_id", 0, TokenKind::unknown);
  const bool begins = pieces || v.pre == "llama-bpe" || v.pre == "llama3" || v.pre == "llama-v3";
  v.add_bos = file.boolean_or("tokenizer.ggml.add_bos_token", begins) && v.bos.has_value();
  v.add_space_prefix = pieces && file.boolean_or("tokenizer.ggml.add_space_prefix", true);
  return v;
}

Vocabulary Vocabulary::bytes() {
  Vocabulary v;
  v.model = "gpt2", v.pre = "gpt-2";
  for (const std::string& character : byte_characters()) v.tokens.push_back(character);
  v.kinds.assign(v.tokens.size(), TokenKind::normal);
  v.eos = static_cast<Token>(v.tokens.size());
  v.tokens.emplace_back("<|endoftext|>");
  v.kinds.push_back(TokenKind::control);
  return v;
}

// Tokens by text, and those that are matched on raw text.
struct Tokenizer::Lookup {
  std::unordered_map<std::string_view, Token> ids;
  TokenMatcher raw;
};

Tokenizer::Tokenizer(Vocabulary vocabulary) : vocabulary_(std::move(vocabulary)) {
  encodable_.fill(true);
  auto lookup = std::make_shared<Lookup>();
  const auto& v = vocabulary_;
  lookup->ids.reserve(v.tokens.size());
  for (size_t i = 0; i < v.tokens.size(); ++i) {
    const auto id = static_cast<Token>(i);
    lookup->ids.emplace(v.tokens[i], id);  // the first of equal texts
    const bool control = v.kinds[i] == TokenKind::control || v.kinds[i] == TokenKind::unknown;
    if (control || v.kinds[i] == TokenKind::user_defined) lookup->raw.add(v.tokens[i], id, control);
  }
  lookup_ = std::move(lookup);
}

std::optional<Token> Tokenizer::find(std::string_view text) const {
  const auto it = lookup_->ids.find(text);
  return it == lookup_->ids.end() ? std::nullopt : std::optional(it->second);
}

Token Tokenizer::plain(std::string_view written) const {
  const std::optional<Token> id = find(written);
  return id && (kind(*id) == TokenKind::normal || kind(*id) == TokenKind::user_defined) ? *id : -1;
}

std::vector<Token> Tokenizer::encode(std::string_view text, bool special) const {
  if (const auto at = invalid_utf8(text)) fail("text: byte offset {} is not valid UTF-8", *at);
  // Places inside a stretch are 32-bit numbers, and a space may take three bytes there.
  if (text.size() >= size_t{1} << 30) fail("text: {} bytes, expected fewer than 2^30", text.size());
  std::vector<Token> ids;
  const auto stretch = [&](size_t begin, size_t end) {
    for (size_t i = begin; i < end; ++i)
      if (const auto byte = static_cast<unsigned char>(text[i]); !encodable_[byte])
        fail("text: byte 0x{:02x} at offset {} has no token in this vocabulary", byte, i);
    if (begin < end) encode_plain(text.substr(begin, end - begin), ids);
  };
  size_t done = 0;
  for (size_t i = 0; i < text.size();) {
    const TokenMatcher::Match hit = lookup_->raw.longest(text.substr(i), special);
    if (hit.id < 0) {
      ++i;
      continue;
    }
    stretch(done, i);
    ids.push_back(hit.id);
    done = i += hit.size;
  }
  stretch(done, text.size());
  return ids;
}

std::string Tokenizer::decode(Token id, bool special) const {
  const Index n = static_cast<Index>(vocabulary_.tokens.size());
  if (id < 0 || id >= n) fail("token = {}, expected 0 … {}", id, n - 1);
  if (kind(id) == TokenKind::control || kind(id) == TokenKind::unknown) return special ? text(id) : "";
  return decode_plain(id);
}

std::string Tokenizer::decode(const std::vector<Token>& ids, bool special) const {
  std::string out;
  bool prefixed = vocabulary_.add_space_prefix;  // a stretch that encode put a space before begins here
  for (const Token id : ids) {
    const std::string bytes = decode(id, special);
    const bool raw = kind(id) != TokenKind::normal && kind(id) != TokenKind::byte;
    out.append(bytes, prefixed && !raw && bytes.starts_with(' ') ? 1 : 0);
    prefixed = vocabulary_.add_space_prefix && raw;
  }
  return out;
}

bool Tokenizer::ends_text(Token id) const {
  if (vocabulary_.eos == id) return true;
  if (id < 0 || static_cast<size_t>(id) >= vocabulary_.tokens.size()) return false;
  if (vocabulary_.kinds[static_cast<size_t>(id)] != TokenKind::control) return false;
  constexpr std::string_view ends[] = {"<|im_end|>", "<end_of_turn>", "<|endoftext|>", "<|eot_id|>", "<|end_of_text|>"};
  return std::find(std::begin(ends), std::end(ends), vocabulary_.tokens[static_cast<size_t>(id)]) != std::end(ends);
}

std::unique_ptr<Tokenizer> Tokenizer::make(Vocabulary v) {
  const size_t n = v.tokens.size();
  if (n == 0) fail("tokenizer.ggml.tokens: no tokens, expected at least one");
  if (n > (size_t{1} << 30)) fail("tokenizer.ggml.tokens: {} tokens, expected fewer than 2^30", n);
  if (v.kinds.size() != n) fail("tokenizer.ggml.token_type: {} entries, expected {}", v.kinds.size(), n);
  const std::pair<const char*, std::optional<Token>> named[] = {{"bos", v.bos}, {"eos", v.eos}, {"unknown", v.unknown}};
  for (const auto& [name, id] : named)
    if (id && (*id < 0 || static_cast<size_t>(*id) >= n))
      fail("tokenizer.ggml.{}_token_id = {}, expected 0 … {}", name, *id, n - 1);
  for (size_t i = 0; i < n; ++i)
    if (const auto at = invalid_utf8(v.tokens[i]))
      fail("tokenizer.ggml.tokens[{}]: byte offset {} is not valid UTF-8", i, *at);
  if (v.model == "gpt2") return make_byte_pair(std::move(v));
  if (v.model == "llama") return make_sentence_pieces(std::move(v));
  fail("tokenizer.ggml.model = \"{}\", supported: gpt2, llama", printable(v.model));
}

}  // namespace heed::model
