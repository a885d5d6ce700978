// The one exception heed throws for bad input.
#pragma once

#include <fmt/core.h>

#include <stdexcept>
#include <string>
#include <utility>

namespace heed {

/// One line that names the culprit, its value and what was expected, e.g.
/// "moba: top_k = 0, expected >= 1". Thrown before anything has been written.
class Error : public std::runtime_error {
 public:
  explicit Error(const std::string& line) : std::runtime_error(line) {}
};

/// An Error of the command line: an unknown name, an out-of-range parameter. `heed` exits with 2
/// for these and with 1 for every other Error.
class UsageError : public Error {
 public:
  using Error::Error;
};

/// Throws Error with a formatted line.
template <class... A>
[[noreturn]] void fail(fmt::format_string<A...> format, A&&... args) {
  throw Error(fmt::format(format, std::forward<A>(args)...));
}

/// Throws UsageError with a formatted line.
template <class... A>
[[noreturn]] void fail_usage(fmt::format_string<A...> format, A&&... args) {
  throw UsageError(fmt::format(format, std::forward<A>(args)...));
}

}  // namespace heed
