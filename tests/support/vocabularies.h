// Small vocabularies for tokenizers, made from nothing.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "heed/base/error.h"
#include "heed/model/tokenizer.h"

namespace heed::test {

/// A code point's bytes.
inline std::string utf8(unsigned c) {
  const auto byte = [](unsigned x) { return static_cast<char>(x); };
  if (c < 0x80) return {byte(c)};
  if (c < 0x800) return {byte(0xc0 | c >> 6), byte(0x80 | (c & 63))};
  if (c < 0x10000) return {byte(0xe0 | c >> 12), byte(0x80 | (c >> 6 & 63)), byte(0x80 | (c & 63))};
  return {byte(0xf0 | c >> 18), byte(0x80 | (c >> 12 & 63)), byte(0x80 | (c >> 6 & 63)), byte(0x80 | (c & 63))};
}

/// The characters that byte-level BPE writes bytes as.
inline std::vector<std::string> byte_alphabet() {
  std::vector<std::string> of;
  for (unsigned b = 0, next = 256; b < 256; ++b)
    of.push_back(utf8((b >= '!' && b <= '~') || (b >= 0xa1 && b <= 0xac) || b >= 0xae ? b : next++));
  return of;
}

/// 256 bytes, then what is given.
inline model::Vocabulary bytes_and(const std::vector<std::string>& more, const std::vector<std::string>& merges) {
  model::Vocabulary v;
  v.model = "gpt2";
  v.pre = "gpt-2";
  v.tokens = byte_alphabet();
  v.tokens.insert(v.tokens.end(), more.begin(), more.end());
  v.kinds.assign(v.tokens.size(), model::TokenKind::normal);
  v.merges = merges;
  return v;
}

/// <unk>, 256 byte tokens (1 … 256), then what is given with its scores (257 …).
inline model::Vocabulary pieces_and(const std::vector<std::pair<std::string, float>>& more) {
  model::Vocabulary v;
  v.model = "llama";
  v.tokens = {"<unk>"};
  v.kinds = {model::TokenKind::unknown};
  const char* digits = "0123456789ABCDEF";
  for (unsigned b = 0; b < 256; ++b) {
    v.tokens.push_back(std::string("<0x") + digits[b >> 4] + digits[b & 15] + ">");
    v.kinds.push_back(model::TokenKind::byte);
  }
  v.scores.assign(v.tokens.size(), 0);
  for (const auto& [text, score] : more) {
    v.tokens.push_back(text);
    v.scores.push_back(score);
    v.kinds.push_back(model::TokenKind::normal);
  }
  return v;
}

/// What a call says when it fails; "" when it does not.
template <class F>
std::string complaint(const F& call) {
  try {
    call();
  } catch (const Error& e) {
    return e.what();
  }
  return "";
}

}  // namespace heed::test
