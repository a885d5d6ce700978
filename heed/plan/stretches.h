// Groups of rows that each see a few short stretches of columns, as few tiles.
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
/// twice. Stretches of the same rows that touch inside a panel are made one, and all rows that see the same
/// columns share a tile. Columns are read in place: packing a list of them for a few rows would take as long as
/// computing 40 to 70 rows. Tiles stand in the order of their columns.
void add_stretches(std::span<const Stretch> stretches, Index source, Tiles& tiles);

}  // namespace heed
