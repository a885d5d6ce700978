// How far a static block mask carries information: one layer is one hop.
#pragma once

#include <functional>
#include <vector>

#include "heed/base/types.h"

namespace heed {

/// Share of blocks 0 … n-1 that the last one has heard of after 1, 2, … layers, until nothing new
/// is reached. allowed(i, j): block i attends to block j <= i. What was reached stays reached.
std::vector<double> coverage(Index n, const std::function<bool(Index i, Index j)>& allowed);

/// Layers until the last block has heard of every block, or -1 if it never does.
Index hops_to_cover(Index n, const std::function<bool(Index i, Index j)>& allowed);

}  // namespace heed
