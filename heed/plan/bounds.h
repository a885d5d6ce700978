// Single queries and the blocks of keys that could score highest, by bounds of their features.
#pragma once

#include "heed/plan/plan.h"

namespace heed {

/// One query a head after all keys (N = 1): each query head attends the `count` complete blocks of `block` tokens with
/// the largest bound, sum over features f of max(q_f · most_f, q_f · least_f), which no <q, k> of the block exceeds
/// (equal bounds: the lower block wins), and on top the last block, complete or not. All blocks where there are no
/// more. The bounds are kept in `kv`, so that a step only reads the keys that are new. A query costs 2·M/block·D
/// multiply-adds.
Plan plan_bounded_step(const Problem& problem, const Queries& queries, const KeyValues& kv, const Rule& rule,
                       Index block, Index count);

}  // namespace heed
