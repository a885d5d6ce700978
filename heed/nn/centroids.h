// Routing Transformer's centroids: they are not learned by gradient but follow the tokens that are nearest to them.
#pragma once

#include <ATen/core/Tensor.h>

#include "heed/mechanism/params.h"

namespace heed::nn {

struct CentroidOptions {
  Index kv_heads = 1, clusters = 1, head_size = 1;
  double ln_eps = 1e-6;
  bool shared_qk = false;     // queries are the keys
  double decay = 0.999;       // share of the moving averages that a step keeps
  double commitment = 1e-4;   // weight of the loss that draws tokens to their centroids
  double count_eps = 1e-5;    // added to every centroid's count of tokens
};
/// Of a routing-transformer call. Throws UsageError where it does not say how many clusters there are.
CentroidOptions centroid_options(const MechanismCall& call, Index kv_heads, Index head_size);

/// Per KV head and centroid the moving averages of how many tokens were nearest to it and of their sum; the centroid
/// is their quotient. Queries and keys of a KV head count alike, once for every query head. The tensors are the
/// module's, without gradients, so that checkpoints hold them.
class Centroids {
 public:
  /// mean and sum [Hk, C, D], count [Hk, C], f32.
  Centroids(const CentroidOptions& options, at::Tensor mean, at::Tensor sum, at::Tensor count)
      : options_(options), mean_(std::move(mean)), sum_(std::move(sum)), count_(std::move(count)) {}

  /// mean holds normal numbers, which are normalised; every centroid begins as if one token had been nearest to it (the
  /// authors begin with none, which blows up those that few tokens visit).
  void initialise() const;
  /// A copy that stays as it is, for the mechanism: lists are made again in the backward pass.
  at::Tensor now() const { return mean_.clone(); }
  /// commitment · (mean of ‖q̂ - its nearest centroid‖² + the same for k̂), with gradients for q [B, Hq, N, D] and k
  /// [B, Hk, N, D], and, while gradients are taken, one step of the moving averages towards this batch.
  at::Tensor follow(const at::Tensor& q, const at::Tensor& k) const;

 private:
  CentroidOptions options_;
  at::Tensor mean_, sum_, count_;
};

}  // namespace heed::nn
