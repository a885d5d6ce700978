// What a piece of work says when it is refused.
#pragma once

#include <functional>
#include <string>

#include "heed/base/error.h"

namespace heed::test {

/// The line of the Error that `work` throws, or "accepted".
inline std::string refusal(const std::function<void()>& work) {
  try {
    work();
  } catch (const Error& e) {
    return e.what();
  }
  return "accepted";
}

}  // namespace heed::test
