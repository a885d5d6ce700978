// Text from untrusted files, made fit for a one-line message.
#pragma once

#include <fmt/format.h>

#include <string>
#include <string_view>

namespace heed {

/// `text` with control characters and backslashes escaped (\x0a), cut after `most` bytes (… follows).
inline std::string printable(std::string_view text, size_t most = 80) {
  std::string out;
  for (const char c : text.substr(0, most)) {
    const auto byte = static_cast<unsigned char>(c);
    if (byte < 0x20 || byte == 0x7f || c == '\\') out += fmt::format("\\x{:02x}", byte);
    else out += c;
  }
  if (text.size() > most) out += "…";
  return out;
}

}  // namespace heed
