// The few things heed knows about UTF-8.
#pragma once

#include <cstddef>
#include <string>
#include <string_view>

namespace heed::model {

/// Bytes of the sequence that starts with `lead`, for valid UTF-8.
inline size_t utf8_length(char lead) {
  const auto byte = static_cast<unsigned char>(lead);
  return byte < 0x80 ? 1 : byte < 0xe0 ? 2 : byte < 0xf0 ? 3 : 4;
}

/// Appends a code point.
inline void append_utf8(std::string& out, unsigned code) {
  const auto put = [&](unsigned byte) { out += static_cast<char>(byte); };
  if (code < 0x80) {
    put(code);
  } else if (code < 0x800) {
    put(0xc0 | code >> 6), put(0x80 | (code & 0x3f));
  } else if (code < 0x10000) {
    put(0xe0 | code >> 12), put(0x80 | (code >> 6 & 0x3f)), put(0x80 | (code & 0x3f));
  } else {
    put(0xf0 | code >> 18), put(0x80 | (code >> 12 & 0x3f)), put(0x80 | (code >> 6 & 0x3f)), put(0x80 | (code & 0x3f));
  }
}

/// Reads the code point at text[at] and moves past it; the text is valid UTF-8.
inline unsigned next_code(std::string_view text, size_t& at) {
  const size_t n = utf8_length(text[at]);
  unsigned code = static_cast<unsigned char>(text[at]) & (n == 1 ? 0x7fu : 0xffu >> (n + 1));
  for (size_t i = 1; i < n && at + i < text.size(); ++i)
    code = code << 6 | (static_cast<unsigned char>(text[at + i]) & 0x3fu);
  at += n;
  return code;
}

}  // namespace heed::model
