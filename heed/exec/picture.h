// Who attends to whom, as a picture: pairs counted pixel by pixel, never an N×M array.
#pragma once

#include <vector>

#include "heed/plan/plan.h"

namespace heed {

/// One pixel stands for `cell` × `cell` tokens; those of the last row and column may hold fewer.
struct Picture {
  Index width = 0, height = 0, cell = 1;
  /// [height, width]: pairs attended / pairs of dense attention with the same causality, 0 … 1; NaN
  /// where dense attention has none. Rows are queries, columns keys.
  std::vector<float> share;
};

/// Collects one head's pairs, from one plan or from the plans of a document's chunks.
class PairGrid {
 public:
  /// Queries at positions first … first + rows - 1, keys 0 … columns - 1, in cells as small as lets
  /// neither side exceed max_pixels. Throws Error for an empty side or max_pixels < 1.
  PairGrid(Index first, Index rows, Index columns, Index max_pixels);

  /// Counts what query head `head` of batch b attends, exactly. A column that stands for several
  /// tokens counts once, at its position. Throws Error when the head does not exist, or when the
  /// plan's positions lie outside the grid.
  void add(const Plan& plan, Index b, Index head);

  Index pairs() const;        // attended
  Index dense_pairs() const;  // of dense attention over the same queries
  Picture picture() const;

 private:
  // Numbers of keys in the cells: those at the ends of intervals, and as differences along a row
  // those of the cells that intervals cover.
  struct Counts {
    std::vector<Index> ends, covered;
    std::vector<Index> totals(Index width, Index height, Index cell) const;
  };
  void add_interval(Counts& counts, Index row, Index begin, Index end) const;

  Index first_, rows_, columns_, cell_, width_, height_;
  Counts attended_, dense_;
};

/// The picture of one head of a plan.
Picture draw(const Plan& plan, Index b, Index head, Index max_pixels);

}  // namespace heed
