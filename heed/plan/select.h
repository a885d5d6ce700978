// Choosing the best of many scores, with ties decided.
#pragma once

#include <span>

#include "heed/base/types.h"

namespace heed {

enum class Ties : std::uint8_t { lower, higher };  // the index that wins among equal scores

/// Writes the indices of the `k` largest of scores[0 … n) to `chosen`, ascending by index, and
/// returns how many there are (min(k, n)). Exactly that many distinct ones, whatever is equal.
Index choose_top(const float* scores, Index n, Index k, Ties ties, std::int32_t* chosen);

/// Writes to `chosen`, ascending, the shortest list of the largest of weights[0 … n) (equal ones: the lower index)
/// whose share of their sum reaches `mass`, and returns how many there are: all when mass >= 1, or when rounding
/// keeps the sum from reaching it. Weights are >= 0; order [n] is scratch.
Index choose_mass(const float* weights, Index n, double mass, std::int32_t* order, std::int32_t* chosen);

}  // namespace heed
