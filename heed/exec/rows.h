// The rows of one unit of work: their queries, packed, and their softmax state.
#pragma once

#include "heed/kernel/kernels.h"
#include "heed/plan/plan.h"

namespace heed {

/// Rows of `heads` stacked query heads that share the block's tiles: rank = head · block.rows + row.
struct Rows {
  RowBlock block;
  Index heads = 1;
  void* q = nullptr;  // [count, dp] in the layout's product type
  float *m = nullptr, *l = nullptr, *acc = nullptr;  // [count], [count], [count, dvp]

  Index count() const { return heads * block.rows; }
  Index head_of(Index rank) const { return block.head + rank / block.rows; }
  Index row_of(Index rank) const { return rank % block.rows; }
};

/// Reads and rounds the queries, and sets the state to "nothing seen".
Rows load_rows(const Plan& plan, const RowBlock& block, Index heads, const PanelLayout& layout, Scratch& scratch);

/// Folds state b into a: both saw disjoint columns of the same rows.
void merge_state(Rows& a, const float* m, const float* l, const float* acc, Index dvp);

}  // namespace heed
