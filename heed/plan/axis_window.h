// The keys that a query sees along one axis of a grid, and what windows cost when they are computed
// in tiles: a count that can be made before anything is computed.
#pragma once

#include <array>

#include "heed/plan/grid.h"

namespace heed {

/// Members [begin, end) of a group.
struct Span {
  Index begin = 0, end = 0;
  Index size() const { return end - begin; }
  bool operator==(const Span&) const = default;
};

/// A window along one axis of `length` tokens. Dilation d splits the axis into d groups of every d-th
/// token that do not see each other. Inside a group, `stride` queries side by side share a window of
/// `kernel` keys, which is shifted at the borders and never shortened; a causal one ends at the query.
/// 1 <= stride <= kernel, kernel · dilation <= length.
struct AxisWindow {
  Index length = 1, kernel = 1, stride = 1, dilation = 1;
  bool causal = false;

  Index members(Index group) const { return ceil_div(length - group, dilation); }
  /// The keys of query `i` of a group of `members` tokens. Both ends ascend with i.
  Span keys(Index i, Index members) const;
  /// The queries that see key `j`: its inverse.
  Span queries(Index j, Index members) const;
  /// The keys that the queries of a box see between them.
  Span keys(const AxisBox& box) const;
};

using GridWindow = std::array<AxisWindow, 3>;

/// Tokens of a query tile and of a key tile, per axis.
struct TileShape {
  Extents query{1, 1, 1}, key{1, 1, 1};
};

/// Where key tiles stand: at multiples of their size, or from the first key of a query tile on.
enum class Tiling : std::uint8_t { fixed, moving };

struct TileVisits {
  Index visited = 1;             // (query tile, key tile) pairs that hold a visible pair
  Index dense = 1;               // such pairs of dense attention
  double flop_bound = 1;         // keys / keys in a window
  bool perfectly_sparse = true;  // no visited pair of tiles needs a mask
  double speedup() const { return static_cast<double>(dense) / static_cast<double>(visited); }
};

/// Counts tile visits, axis by axis: O(length · kernel / tile) steps.
TileVisits count_tile_visits(const GridWindow& window, const TileShape& tile, Tiling tiling = Tiling::fixed);

/// The visits when tiles are runs of `query` and `key` tokens in row-major order instead of boxes.
Index count_line_tile_visits(const GridWindow& window, Index query, Index key);

/// The tiles with the least to compute, 64 to 256 tokens where the grid has them; sizes are powers of two.
TileShape choose_tile_shape(const GridWindow& window);

}  // namespace heed
