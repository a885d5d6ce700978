// One query and one key for all tokens of a region: the largest of each feature.
#pragma once

#include <span>

#include "heed/plan/summary.h"

namespace heed {

/// Per query head and region, f32: q, the largest of each feature of scale·query, divided by scale; k, that of the
/// keys (of the query head's KV head). As the arithmetic sees queries and keys.
struct Largest {
  Tensor q, k;  // [B, Hq, R, D]
};

/// Regions are runs of ranks; `order` gives the token of a rank, or is empty: rank = token. One that holds the region
/// before it costs only the tokens that are new, so running maxima cost what their tokens do. An empty region gives
/// -inf. Needs as many queries as keys.
Largest largest_features(const Problem& problem, const Queries& queries, const KeyValues& kv, float scale,
                         std::span<const std::int32_t> order, std::span<const BlockRange> regions);

/// Adds the gradients of that q and k, `from` [B, Hq, R, D] each, to those of the queries, dq [B, Hq, N, D], and of the
/// keys, dk [B, Hk, M, D]: each feature's goes to the token that had the largest, the one of lowest rank among equals.
void largest_features_backward(const Problem& problem, const Queries& queries, const KeyValues& kv, float scale,
                               std::span<const std::int32_t> order, std::span<const BlockRange> regions,
                               const Largest& from, Tensor& dq, Tensor& dk);

}  // namespace heed
