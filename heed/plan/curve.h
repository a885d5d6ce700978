// An order of a grid's tokens in which neighbours in the list are neighbours on the grid.
#pragma once

#include <span>
#include <vector>

#include "heed/plan/grid.h"

namespace heed {

/// The tokens (row-major numbers) of a grid along a generalised Hilbert curve, which recurses on halves of any
/// length: a run of r tokens of the list covers a chunk of the grid about as long on every axis. Each next token
/// differs by 1 on one axis where all lengths are even; elsewhere a few steps are diagonal. For mechanisms that work on
/// consecutive tokens of images and video: gather q, k and v by this order before, scatter the result by it after.
std::vector<std::int32_t> gilbert_order(const Extents& length);

/// The inverse of a permutation: inverse(order)[order[i]] = i.
std::vector<std::int32_t> inverse(std::span<const std::int32_t> order);

}  // namespace heed
