// The scales of GGUF's 256-element blocks with 4 and 5 bits: eight groups of 32, scale and minimum of 6 bits each.
// `static`, as files compiled for different instruction sets include it and each must keep its own copy.
#pragma once

#include "heed/base/types.h"

namespace heed {

struct GroupScales {
  std::uint8_t scale[8], minimum[8];  // x = d·scale·q - dmin·minimum
};

/// The 12 bytes hold the low 6 bits of scales 0-3, then of minima 0-3; each of the last four has the low 4 bits of
/// scale and minimum 4-7, whose upper 2 bits fill up the first eight. Four bytes are taken at a time.
static inline GroupScales group_scales(const std::uint8_t* packed) {
  std::uint32_t first, second, last;
  __builtin_memcpy(&first, packed, 4);
  __builtin_memcpy(&second, packed + 4, 4);
  __builtin_memcpy(&last, packed + 8, 4);
  constexpr std::uint32_t six = 0x3f3f3f3f, four = 0x0f0f0f0f, two = 0x30303030;
  const std::uint32_t words[4] = {first & six, (last & four) | (first >> 2 & two), second & six,
                                  (last >> 4 & four) | (second >> 2 & two)};
  GroupScales g;
  __builtin_memcpy(&g, words, sizeof g);
  return g;
}

}  // namespace heed
