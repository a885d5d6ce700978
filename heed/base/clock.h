// The time that work takes.
#pragma once

#include <chrono>

namespace heed {

/// Wall seconds from some fixed moment on.
inline double seconds_now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

}  // namespace heed
