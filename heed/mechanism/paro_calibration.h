// PAROAttention's offline part: which order of the grid's axes each head likes best, and which blocks of its
// attention map are worth computing.
#pragma once

#include <array>

#include "heed/plan/grid.h"
#include "heed/plan/plan.h"

namespace heed::mechanism {

/// The six orders of three axes, slowest axis first, in the numbering of the `order` tensor. A grid of two
/// axes has a first one of length 1, so that several numbers mean the same order.
inline constexpr std::array<std::array<size_t, 3>, 6> axis_orders{
    {{0, 1, 2}, {0, 2, 1}, {1, 2, 0}, {1, 0, 2}, {2, 1, 0}, {2, 0, 1}}};

struct ParoOptions {
  Extents grid{1, 1, 1};
  Index text = 0;  // tokens before the grid: they stay where they are
  Index block = 64;
  double density = 0.5, alpha = 0.5, eps = 1e-3, sigma = 0.9;
  Index blocks(Index tokens) const { return ceil_div(tokens, block); }
};

/// All tokens in one of the orders: text first, then the grid. Rank r holds token result[r].
std::vector<std::int32_t> paro_tokens(const ParoOptions& options, Index order);

struct ParoCalibration {
  Tensor order;  // i32 [Hq], 0 … 5
  Tensor mask;   // u8 [Hq, nb, nb], 1: computed; row blocks, then column blocks, both in the head's order
  /// Per query head and order, f64 means over the batch; empty where no choice was to be made. Of orders that are the
  /// same, only the lowest was looked at and the others hold zeros.
  std::vector<std::array<double, 6>> sparse;  // M_sparse: share of blocks with nearly nothing in them
  std::vector<std::array<double, 6>> unevenness;  // M_quant: mean over blocks of largest / mean weight
};

/// Looks at the whole softmax map of every head of q and kv, in streaming passes over it: N·N·D multiply-adds each,
/// one for the rows' sums, one for each different order of the grid, one for the blocks' masses; memory
/// O(N + nb²) a head. Batches are samples: metrics are means over them and masses are sums. With `order`
/// (i32 [Hq], values in 0 … 5) that order is taken and the passes for the metrics are left out.
///
/// Order: the largest alpha·Ms/ΣMs - (1 - alpha)·Mq/ΣMq, sums over the different orders; scores within 1e-6 of the
/// best tie, and the lowest wins. The metrics' blocks begin with the grid, those of the mask with the text.
/// Mask: ceil(density·nb²) blocks, or more if more are forced: those that hold text, in a row or in a column; the
/// last row and column of blocks when the last block is short; the heaviest block of a row that has none else.
/// The rest go by mass, equal masses to the lower row, then column.
///
/// The same for any number of threads. N = M. Throws nothing: the caller has checked the options.
ParoCalibration calibrate_paro(const ParoOptions& options, const Problem& problem, const Queries& queries,
                               const KeyValues& kv, float scale, const Tensor* order = nullptr);

}  // namespace heed::mechanism
