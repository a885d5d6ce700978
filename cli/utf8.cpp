#include "cli/utf8.h"

namespace heed::cli {
namespace {

constexpr std::string_view replacement = "\xef\xbf\xbd";

unsigned byte_at(std::string_view s, size_t i) { return static_cast<unsigned char>(s[i]); }

// Bytes of the character that begins s, 0 when none does; negative when these bytes, -n of them, may
// be the beginning of one. Overlong forms, surrogates and what lies past U+10FFFF are none.
int character(std::string_view s) {
  const unsigned first = byte_at(s, 0);
  if (first < 0x80) return 1;
  const int length = first >= 0xc2 && first <= 0xdf   ? 2
                     : (first & 0xf0u) == 0xe0        ? 3
                     : first >= 0xf0 && first <= 0xf4 ? 4
                                                      : 0;
  for (int i = 1; i < length; ++i) {
    if (static_cast<size_t>(i) >= s.size()) return -i;
    const unsigned c = byte_at(s, static_cast<size_t>(i));
    unsigned least = 0x80, most = 0xbf;
    if (i == 1 && first == 0xe0) least = 0xa0;
    if (i == 1 && first == 0xed) most = 0x9f;
    if (i == 1 && first == 0xf0) least = 0x90;
    if (i == 1 && first == 0xf4) most = 0x8f;
    if (c < least || c > most) return 0;
  }
  return length;
}

}  // namespace

std::string Utf8Stream::take(std::string_view bytes) {
  held_ += bytes;
  std::string out;
  size_t at = 0;
  while (at < held_.size()) {
    const std::string_view rest = std::string_view(held_).substr(at);
    const int n = character(rest);
    if (n < 0) break;
    if (n == 0) out += replacement;
    else out += rest.substr(0, static_cast<size_t>(n));
    at += n == 0 ? 1 : static_cast<size_t>(n);
  }
  held_.erase(0, at);
  return out;
}

std::string Utf8Stream::rest() {
  const std::string out(held_.empty() ? std::string_view() : replacement);
  held_.clear();
  return out;
}

std::string valid_utf8(std::string_view bytes) {
  Utf8Stream stream;
  std::string out = stream.take(bytes);
  return out + stream.rest();
}

}  // namespace heed::cli
