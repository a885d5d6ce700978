// A context shared among heads: each sees the latest blocks and every stride-th one, each at another phase.
#pragma once

#include "heed/base/types.h"

namespace heed {

/// Which key blocks KV head h sees from query block i: all j <= i with i - j < local, those that it owns, and in
/// the last `dense` heads all. heads >= 1, stride >= 1, 0 <= dense <= heads.
struct StridedBlocks {
  Index heads = 1;
  Index local = 1;   // latest blocks, the own one included
  Index stride = 1;  // head h owns the blocks j with (j + h·step + offset) % stride = 0
  Index step = 1, offset = 0;
  Index dense = 0;

  bool is_dense(Index head) const { return stride == 1 || head >= heads - dense; }
  bool owns(Index head, Index j) const { return is_dense(head) || (j + head * step + offset) % stride == 0; }
  bool sees(Index head, Index i, Index j) const { return j <= i && (i - j < local || owns(head, j)); }
  /// The first block that a head that is not dense owns; the others follow every `stride` blocks.
  Index first_owned(Index head) const { return (stride - (head * step + offset) % stride) % stride; }

  /// Whether head's keys and values of block j may be dropped once the next query stands in block i: neither it nor
  /// any later one sees them. What is left to hold is the window and the owned blocks, about
  /// local + i / stride of i + 1 blocks.
  bool may_forget(Index head, Index i, Index j) const { return i - j >= local && !owns(head, j); }

  /// Share of the pairs (i, j), j <= i, of n blocks that at least one head sees: 1 when what one head skips
  /// another holds. O(n · heads).
  double coverage(Index n) const;
};

}  // namespace heed
