// Grids as parameters: lengths of axes, and one value for all axes or one for each.
#pragma once

#include "heed/mechanism/mechanism.h"
#include "heed/plan/grid.h"

namespace heed::mechanism {

/// The axes that a caller named, 1 … 3, and their lengths, aligned to the last axis (see Extents).
struct GridShape {
  std::string text;  // as the caller wrote it
  Index axes = 1;
  Extents length{1, 1, 1};
  /// The place in Extents of the caller's axis 0, 1, ….
  size_t axis(Index named) const { return static_cast<size_t>(3 - axes + named); }
};

/// `grid`: the lengths of the axes, such as 30x48x80. Without a default it is one axis of N tokens.
ParamSpec grid_spec();
/// `grid`, which must be said; the example, such as 14x14, stands in the help.
ParamSpec required_grid_spec(const std::string& example);

/// Reads `grid`. Throws UsageError for more than three axes and for a product other than N, or than N less the
/// `text` tokens that stand before the grid.
GridShape read_grid(const Params& p, const Problem& problem, Index text = 0);

/// Reads a list of one value for all axes or one for each; axes that the grid lacks get `missing`. Throws
/// UsageError for another number of values.
Extents read_per_axis(const Params& p, std::string_view name, const GridShape& grid, Index missing);

}  // namespace heed::mechanism
