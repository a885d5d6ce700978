// Products of features over tokens, where attention is between channels instead of tokens.
#pragma once

#include "heed/plan/plan.h"

namespace heed {

/// G [B, Hq, D, D] with G[b,h,i,j] = sum over tokens t of q_t[i] · k_t[j], where k is that of the KV head
/// of h. N = M. Summed in f64 over runs of 256 tokens that are summed in f32: the sum grows with the
/// number of tokens, and so would the error of one long f32 sum.
Tensor feature_gram(const Problem& problem, const Queries& queries, const KeyValues& kv);

/// The way back from dgram [B, Hq, D, D] f32, the gradient of G: dq_t = dgram · k_t, and dk_t the sum of dgramᵀ · q_t
/// over the query heads of its KV head, in their order. The same bits for any number of threads.
struct FeatureGradients {
  Tensor dq, dk;  // [B, Hq, N, D], [B, Hk, N, D] f32
};
FeatureGradients feature_gram_gradient(const Problem& problem, const Queries& queries, const KeyValues& kv,
                                       const Tensor& dgram);

}  // namespace heed
