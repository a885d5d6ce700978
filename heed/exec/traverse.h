// One tile: which columns each row sees, then panel by panel and sub-block by sub-block.
#pragma once

#include "heed/exec/attend.h"
#include "heed/exec/rows.h"

namespace heed {

/// Walks the tiles of a block for rows that may be cut into splits of `split_chunks` chunks each.
/// A chunk belongs to a split by its place in its source (a list's: in the list) and not by which
/// other tiles there are, so a row's bits do not depend on what the block's other rows see.
class Traversal {
 public:
  /// Without arithmetic a traversal only counts, and rows need neither queries nor state.
  enum class Arithmetic : std::uint8_t { all, none };
  Traversal(const Plan& plan, Scratch& scratch, Arithmetic arithmetic = Arithmetic::all)
      : plan_(plan), scratch_(scratch), arithmetic_(arithmetic) {}

  /// Visits every chunk of every tile that belongs to the split.
  void run(const Rows& rows, const std::vector<Tile>& tiles, Index split, Index split_chunks, AttendStats& stats);

 private:
  struct Extent;  // what a tile's rows see
  void run_tile(const Rows& rows, const Tile& tile, AttendStats& stats);
  void run_chunk(const Rows& rows, const Tile& tile, const Extent& extent, const SourceView& view, Index columns_first,
                 Index from, Index to, AttendStats& stats);
  bool mine(Index column) const { return column / chunk_columns / split_chunks_ == split_; }

  const Plan& plan_;
  Scratch& scratch_;
  Arithmetic arithmetic_;
  Index split_ = 0, split_chunks_ = 1;
};

}  // namespace heed
