// One tile: which columns each row sees, then panel by panel and sub-block by sub-block.
#pragma once

#include "heed/exec/attend.h"
#include "heed/exec/rows.h"

namespace heed {

/// Walks the tiles of a block for rows that may be cut into splits of `split_chunks` chunks each.
/// Chunks are counted over the block's tiles, in order; a split visits its own only.
class Traversal {
 public:
  Traversal(const Plan& plan, Scratch& scratch) : plan_(plan), scratch_(scratch) {}

  /// Visits every chunk of every tile that belongs to the split.
  void run(const Rows& rows, const std::vector<Tile>& tiles, Index split, Index split_chunks, AttendStats& stats);

 private:
  struct Extent;  // what a tile's rows see
  void run_tile(const Rows& rows, const Tile& tile, AttendStats& stats);
  void run_chunk(const Rows& rows, const Tile& tile, const Extent& extent, const SourceView& view, Index columns_first,
                 Index from, Index to, AttendStats& stats);
  bool mine() { return next_chunk_++ / split_chunks_ == split_; }

  const Plan& plan_;
  Scratch& scratch_;
  Index split_ = 0, split_chunks_ = 1, next_chunk_ = 0;
};

}  // namespace heed
