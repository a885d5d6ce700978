// The scales of GGUF's 256-element blocks with 4 and 5 bits: eight groups of 32, scale and minimum of 6 bits each.
// `static`, as files compiled for different instruction sets include it and each must keep its own copy.
#pragma once

#include "heed/base/types.h"

namespace heed {

struct GroupScales {
  float scale[8], minimum[8];  // d and dmin multiplied in: x = scale·q - minimum
};

/// The 12 bytes hold the low 6 bits of scales 0-3, then of minima 0-3; each of the last four has the low 4 bits of
/// scale and minimum 4-7, whose upper 2 bits fill up the first eight.
static inline GroupScales group_scales(const std::uint8_t* s, float d, float dmin) {
  GroupScales g;
  for (int j = 0; j < 4; ++j) {
    g.scale[j] = d * static_cast<float>(s[j] & 63);
    g.minimum[j] = dmin * static_cast<float>(s[j + 4] & 63);
    g.scale[j + 4] = d * static_cast<float>((s[j + 8] & 15) | (s[j] >> 6 << 4));
    g.minimum[j + 4] = dmin * static_cast<float>((s[j + 8] >> 4) | (s[j + 4] >> 6 << 4));
  }
  return g;
}

}  // namespace heed
