// Text that is made of tokens: they may end in the middle of a character.
#pragma once

#include <string>
#include <string_view>

namespace heed::cli {

/// Takes bytes as they come and gives back whole characters; what can never become one is U+FFFD.
class Utf8Stream {
 public:
  /// The characters that these bytes complete.
  std::string take(std::string_view bytes);
  /// What is left at the end of the text.
  std::string rest();

 private:
  std::string held_;
};

/// The text with everything that is not UTF-8 replaced by U+FFFD.
std::string valid_utf8(std::string_view bytes);

}  // namespace heed::cli
