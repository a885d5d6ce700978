// One tile: which columns each row sees, then panel by panel and sub-block by sub-block.
#pragma once

#include "heed/exec/attend.h"
#include "heed/exec/rows.h"

namespace heed {

/// Where the columns of a task stand.
struct Place {
  const SourceView& view;  // of the tile's source, or of a piece gathered from it
  Index panel = 0;         // the first panel of the task in the view
  Index origin = 0;        // rank in the tile of the view's column 0
  Index first() const { return panel * panel_columns + origin; }  // rank of the task's first column
};

/// What is done where rows meet panels.
class PanelWork {
 public:
  virtual ~PanelWork() = default;
  /// Members [from, from + count) of a listed tile's columns, packed as a view of their own in the layout of copies,
  /// which the tasks up to put_back() mean.
  virtual SourceView take_up(const Rows& rows, const Tile& tile, const SourceView& view, Index from, Index count,
                             Scratch& scratch) = 0;
  virtual void put_back(const Rows&, const Tile&, Index /*from*/, Index /*count*/) {}
  virtual void meet(const Rows& rows, const Tile& tile, const PanelTask& task, const Place& place,
                    Scratch& scratch) = 0;
};

/// The split of `split_chunks` chunks that holds a column.
inline Index split_of(Index column, Index split_chunks) { return column / chunk_columns / split_chunks; }
/// Whether any column of a tile belongs to a split of `split_chunks` chunks.
bool meets(const Tile& tile, Index split, Index split_chunks);

/// Walks the tiles of a block for rows that may be cut into splits of `split_chunks` chunks each.
/// A chunk belongs to a split by its place in its source (a list's: in the list) and not by which
/// other tiles there are, so a row's bits do not depend on what the block's other rows see.
class Traversal {
 public:
  /// Without work (null) a traversal only counts, and rows need neither queries nor state.
  Traversal(const Plan& plan, Scratch& scratch, PanelWork* work) : plan_(plan), scratch_(scratch), work_(work) {}

  /// Visits every chunk of every tile that belongs to the split.
  void run(const Rows& rows, const std::vector<Tile>& tiles, Index split, Index split_chunks, AttendStats& stats);

 private:
  struct Extent;  // what a tile's rows see
  void run_tile(const Rows& rows, const Tile& tile, AttendStats& stats);
  void run_chunk(const Rows& rows, const Tile& tile, const Extent& extent, const SourceView& view,
                 const PanelLayout& layout, Index columns_first, Index from, Index to, AttendStats& stats);
  bool mine(Index column) const { return split_of(column, split_chunks_) == split_; }

  const Plan& plan_;
  Scratch& scratch_;
  PanelWork* work_;
  Index split_ = 0, split_chunks_ = 1;
};

}  // namespace heed
