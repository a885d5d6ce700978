// Static patterns of blocks: a function says which key blocks a block of queries sees; few large tiles come of it.
#pragma once

#include <algorithm>
#include <span>

#include "heed/plan/plan.h"

namespace heed {

/// Blocks [begin, end), or columns.
struct BlockRun {
  Index begin = 0, end = 0;
};

/// Collects the key blocks that the queries of one block see.
class BlockRuns {
 public:
  /// Writes to `to`, or only counts where that is null.
  BlockRuns(Index own, BlockRun* to) : own_(own), to_(to) {}

  Index own() const { return own_; }

  /// Blocks [begin, end) are seen. Runs come with ascending `begin`; they may touch and overlap, so that a pattern
  /// need not know whether its window holds its sinks. What lies after the own block is left out.
  void add(Index begin, Index end) {
    end = std::min(end, own_ + 1);
    if (begin >= end) return;
    if (count_ > 0 && begin <= last_.end) {
      last_.end = std::max(last_.end, end);
    } else {
      last_ = {begin, end};
      ++count_;
    }
    if (to_ != nullptr) to_[count_ - 1] = last_;
  }

  Index count() const { return count_; }

 private:
  Index own_;
  BlockRun* to_;
  BlockRun last_;
  Index count_ = 0;
};

/// Ranks [begin, end) of a row block, which stand in one block, and the columns that they see: runs that ascend and do
/// not touch. The last may reach beyond the rows' own positions, where causality hides it.
struct RowRuns {
  Index begin = 0, end = 0;
  std::span<BlockRun> runs;
};

/// Emits causal tiles: what neighbouring `lines` see alike, chunk of columns by chunk, they share. How many do changes
/// no bit of a row, as what it sees of a chunk stays one piece.
void add_shared_runs(const RowBlock& rows, std::span<RowRuns> lines, Tiles& tiles);

/// Emits ranks [begin, end) of a row block, in blocks of `block` positions: see(BlockRuns&), which must be pure, names
/// the blocks that the queries of runs.own() see. Blocks are counted from position 0, so a prompt may be cut into
/// chunks anywhere. A run is a range of columns, read where it lies: blocks of 64 tokens or more cost what they hold.
template <class See>
void add_block_rows(const RowBlock& rows, Index begin, Index end, Index block, Tiles& tiles, See see) {
  if (begin >= end) return;
  const Index first = rows.position(begin) / block, last = rows.position(end - 1);
  const auto lines = tiles.take<RowRuns>(last / block - first + 1);
  for (RowRuns& line : lines) {
    const Index own = first + (&line - lines.data());
    BlockRuns counted(own, nullptr);
    see(counted);
    line.runs = tiles.take<BlockRun>(counted.count());
    BlockRuns runs(own, line.runs.data());
    see(runs);
    for (BlockRun& run : line.runs) run = {run.begin * block, run.end > own ? last + 1 : run.end * block};
    line.begin = begin;
    begin = line.end = std::min(end, begin + (own + 1) * block - rows.position(begin));
  }
  add_shared_runs(rows, lines, tiles);
}

template <class See>
void add_block_rows(const RowBlock& rows, Index block, Tiles& tiles, See see) {
  add_block_rows(rows, 0, rows.rows, block, tiles, see);
}

}  // namespace heed
