// What a block of keys looks like from afar: its mean, packed so that many queries can be scored
// against all blocks by the kernels' product.
#pragma once

#include <memory>
#include <span>
#include <vector>

#include "heed/plan/plan.h"

namespace heed {

/// One f32 vector per block and head, as key panels.
struct Summary {
  Index d = 0;
  std::vector<Index> blocks;           // per head: how many
  std::vector<const float*> panels;    // per head: key panels of f32 vectors, in `own` or kept elsewhere
  std::vector<std::unique_ptr<float[]>> own;

  /// scores[i·stride + j] = <q_i, summary_j> for `rows` rows q [rows, d] and the head's blocks
  /// 0 … count-1, or added to what stands there. stride >= count rounded up to 64. Not scaled: scores only rank.
  void score(Index head, const float* q, Index rows, Index count, float* scores, Index stride,
             bool accumulate = false) const;
};

/// Token ranges; blocks of a batch ascend and do not overlap.
struct BlockRange {
  Index begin = 0, end = 0;
  Index size() const { return end - begin; }
};

/// Mean keys of `ranges[b]` for every KV head of batch b: head b·Hk + h. f32 sums whatever the
/// arithmetic, as a rounded mean would flip near-ties.
Summary mean_keys(const KeyValues& kv, const Problem& problem, const std::vector<std::vector<BlockRange>>& ranges);

/// The same for groups of listed tokens, equal in all batches: group g is tokens[begins[g] … begins[g + 1]).
Summary mean_keys(const KeyValues& kv, const Problem& problem, std::span<const std::int32_t> tokens,
                  std::span<const Index> begins);

/// Mean queries of such groups, [B, Hq, groups, D], f32.
Tensor mean_queries(const Queries& queries, const Problem& problem, std::span<const std::int32_t> tokens,
                    std::span<const Index> begins);

/// Mean keys for blocks of `block` tokens from token 0, complete ones only. They are kept in `kv`, which the summary
/// shows, so that later calls only add what is new.
Summary mean_blocks(const KeyValues& kv, const Problem& problem, Index block);

}  // namespace heed
