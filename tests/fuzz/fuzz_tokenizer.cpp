// The first byte says what the rest is: text for one of two small vocabularies, which must come back
// from its ids, or a GGUF file, whose vocabulary is made and used or refused with heed::Error.

#include <cstdint>
#include <cstdlib>
#include <string>

#include "heed/base/error.h"
#include "heed/model/tokenizer.h"

namespace {

using namespace heed::model;

std::string character(unsigned c) {
  if (c < 0x80) return {static_cast<char>(c)};
  return {static_cast<char>(0xc0 | c >> 6), static_cast<char>(0x80 | (c & 63))};
}

std::unique_ptr<Tokenizer> bytes(const std::string& pre) {
  Vocabulary v;
  v.model = "gpt2";
  v.pre = pre;
  for (unsigned b = 0, next = 256; b < 256; ++b)
    v.tokens.push_back(character((b > 32 && b < 127) || (b > 160 && b != 173) ? b : next++));
  v.tokens.insert(v.tokens.end(), {"ab", "abab",
                                   "\xc4\xa0"
                                   "a",
                                   "11", "<|end|>", "[x]"});
  v.kinds.assign(v.tokens.size(), TokenKind::normal);
  v.kinds[260] = TokenKind::control;
  v.kinds[261] = TokenKind::user_defined;
  v.merges = {"a b", "ab ab", "\xc4\xa0 a", "1 1"};
  return Tokenizer::make(v);
}

std::unique_ptr<Tokenizer> pieces(bool prefix) {
  Vocabulary v;
  v.model = "llama";
  const char* digits = "0123456789ABCDEF";
  for (unsigned b = 0; b < 256; ++b) v.tokens.push_back(std::string("<0x") + digits[b >> 4] + digits[b & 15] + ">");
  v.kinds.assign(256, TokenKind::byte);
  const std::string mark = "\xe2\x96\x81";
  v.tokens.insert(v.tokens.end(), {"a", "b", mark, mark + "a", "a" + mark, "ab", "\n\n", "<s>"});
  v.kinds.resize(v.tokens.size(), TokenKind::normal);
  v.kinds[262] = TokenKind::user_defined;
  v.kinds[263] = TokenKind::control;
  v.scores.assign(v.tokens.size(), 0);
  v.scores[260] = -1;
  v.add_space_prefix = prefix;
  return Tokenizer::make(v);
}

void round_trip(const Tokenizer& t, const std::string& text, bool special) {
  const bool valid = !invalid_utf8(text);
  try {
    const std::string back = t.decode(t.encode(text, special), true);
    // U+2581 is how these vocabularies write a space.
    if (!valid || (back != text && text.find("\xe2\x96\x81") == text.npos)) std::abort();
  } catch (const heed::Error&) {
    if (valid) std::abort();
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, size_t size) {
  static const std::unique_ptr<Tokenizer> made[] = {bytes("smollm"), bytes("gpt-2"),     bytes("default"),
                                                    bytes("qwen2"),  bytes("llama-bpe"), pieces(false),
                                                    pieces(true)};
  if (size == 0) return 0;
  const unsigned way = data[0] & 15u;
  const std::string text(reinterpret_cast<const char*>(data) + 1, size - 1);
  if (way < 7) {
    round_trip(*made[way], text, (data[0] & 16u) != 0);
    return 0;
  }
  try {
    const auto file = Gguf::parse({reinterpret_cast<const std::byte*>(data) + 1, size - 1}, "input");
    const auto tokenizer = Tokenizer::make(Vocabulary::from(file));
    const auto ids = tokenizer->encode("ab <s> 12\n\n", true);
    tokenizer->decode(ids, true);
  } catch (const heed::Error&) {
  }
  return 0;
}
