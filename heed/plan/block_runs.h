// Static patterns of blocks: a function says which key blocks a block of queries sees, as few runs.
#pragma once

#include <algorithm>

#include "heed/plan/plan.h"

namespace heed {

/// The key blocks that the queries of one block see, turned into tiles as they are named.
class BlockRuns {
 public:
  /// Ranks [begin, end) of a row block, which stand in block `own` of `block` tokens.
  BlockRuns(const RowBlock& rows, Index begin, Index end, Index block, Tiles& tiles)
      : rows_(Set::range(begin, end)), block_(block), own_(rows.position(begin) / block), last_(rows.position(end - 1)),
        tiles_(tiles) {}

  Index own() const { return own_; }

  /// Blocks [begin, end) are seen. Runs come with ascending `begin`; they may touch and overlap, so that a pattern
  /// need not know whether its window holds its sinks. What lies after the own block is left out.
  void add(Index begin, Index end) {
    end = std::min(end, own_ + 1);
    if (begin >= end) return;
    if (begin <= end_ && end_ > begin_) {
      end_ = std::max(end_, end);
      return;
    }
    flush();
    begin_ = begin, end_ = end;
  }

  /// The tile of the run at hand: full, or causal where it holds the own block.
  void flush() {
    if (begin_ >= end_) return;
    if (end_ > own_) tiles_.add(rows_, Set::range(begin_ * block_, last_ + 1), Mask::causal());
    else tiles_.add(rows_, Set::range(begin_ * block_, end_ * block_), Mask::full());
    begin_ = end_ = 0;
  }

 private:
  Set rows_;
  Index block_, own_, last_;
  Tiles& tiles_;
  Index begin_ = 0, end_ = 0;  // the run at hand, or none
};

/// Emits ranks [begin, end) of a row block, block by block of `block` positions: see(BlockRuns&) names the blocks that
/// the queries of runs.own() see. Blocks are counted from position 0, so chunks of a prompt may be cut anywhere. A
/// run is one range of columns, read where it lies: blocks of 64 tokens or more cost what they hold.
template <class See>
void add_block_rows(const RowBlock& rows, Index begin, Index end, Index block, Tiles& tiles, See see) {
  while (begin < end) {
    const Index next = std::min(end, begin + block - rows.position(begin) % block);
    BlockRuns runs(rows, begin, next, block, tiles);
    see(runs);
    runs.flush();
    begin = next;
  }
}

template <class See>
void add_block_rows(const RowBlock& rows, Index block, Tiles& tiles, See see) {
  add_block_rows(rows, 0, rows.rows, block, tiles, see);
}

}  // namespace heed
