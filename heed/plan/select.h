// Choosing the best of many scores, with ties decided.
#pragma once

#include <span>

#include "heed/base/types.h"

namespace heed {

enum class Ties : std::uint8_t { lower, higher };  // the index that wins among equal scores

/// Writes the indices of the `k` largest of scores[0 … n) to `chosen`, ascending by index, and
/// returns how many there are (min(k, n)). Exactly that many distinct ones, whatever is equal.
Index choose_top(const float* scores, Index n, Index k, Ties ties, std::int32_t* chosen);

}  // namespace heed
