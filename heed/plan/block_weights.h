// The softmax map of a head, seen block by block: scores are computed in one streaming pass, block sums are
// all that is kept of them.
#pragma once

#include <cmath>
#include <limits>
#include <span>

#include "heed/plan/plan.h"

namespace heed {

/// One head whose every query sees every key. Rows and columns stand in orders of their own.
struct ScoreMap {
  const Queries* queries = nullptr;
  Index b = 0, head = 0;                 // of the queries
  std::span<const std::int32_t> tokens;  // row r is query tokens[r]
  PanelLayout layout;
  const void* keys = nullptr;            // packed, in the order of the columns
  Index columns = 0;
  float scale = 1;
};

/// What the weights p = exp(score - lse) of one block amount to. The largest one is kept as a logarithm, so
/// that blocks far below f32's range still have a shape.
struct BlockWeight {
  float log_most = -std::numeric_limits<float>::infinity();  // natural log of the largest p
  float sum = 0;                                             // Σ p / largest p
  Index below = 0;                                           // pairs whose p lies below the threshold
  double mass() const { return static_cast<double>(sum) * std::exp(static_cast<double>(log_most)); }
};

/// lse[t] = natural log of Σ_j exp(score_tj) for the queries t of rows [row, row + rows).
void row_lse(const ScoreMap& map, Index row, Index rows, float* lse);

/// Sums the weights of rows [row, row + rows) over blocks of `block` columns that begin at column `first`;
/// the last one may be short. lse [query tokens]; out: one of each block, overwritten. Takes rows · columns · D
/// multiply-adds and as many exponentials as pairs.
void block_weights(const ScoreMap& map, Index row, Index rows, const float* lse, Index first, Index block,
                   double threshold, std::span<BlockWeight> out);

}  // namespace heed
