// Rows that each see a few short stretches of columns, as tiles of whole panels.
#pragma once

#include <span>

#include "heed/plan/plan.h"

namespace heed {

/// Rows [row_begin, row_end) of a row block see columns [begin, end) of a source.
struct Stretch {
  Index row_begin = 0, row_end = 0;
  Index begin = 0, end = 0;
};

/// Adds tiles in which exactly the pairs of `stretches` exist. Row ranges are equal or disjoint; no pair occurs
/// twice. Stretches of a panel or more become tiles of their own. Of shorter ones, all that touch a panel share
/// one tile, where it is read in place: that costs less than packing the listed columns of a few rows, which
/// takes as long as computing 40 to 70 rows, and the more rows like the same neighbours, the less is in vain.
/// Tiles stand in the order of their columns.
void add_by_panel(std::span<const Stretch> stretches, Index source, Tiles& tiles);

}  // namespace heed
