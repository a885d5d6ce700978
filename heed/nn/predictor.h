// What sparsifiner's predictor learns from: the attention of a dense layer, before it says where to attend.
#pragma once

#include <ATen/core/Tensor.h>

#include <map>
#include <string>

#include "heed/mechanism/params.h"

namespace heed::nn {

struct Predictor {
  at::Tensor p_q, p_q_b, p_k, p_k_b;  // [c, D], [c], of queries and of keys
  at::Tensor w_dn, w_up;              // [N, r], token patterns of the keys and of the connections
  double scale = 1;                   // of its logits
};
/// From a layer's learned parts by name.
Predictor predictor_of(const MechanismCall& call, const std::map<std::string, at::Tensor, std::less<>>& parts);

/// 0.01·Σ over batches, heads and tokens but the first of ‖Â_i - A_i‖², with A dense attention of q [B, H, N, D] over
/// k [B, Hk, N, D] and Â = D·w_upᵀ, D = softmax(scale·(P_q q + b)·((P_k K + b)ᵀ w_dn)), all of D and w_up signed.
/// Gradients reach the predictor alone. Nothing N×N is made: ‖Â‖² needs w_upᵀw_up alone, Â·A is D times attention with
/// w_up as values, and ‖A_i‖² is exp(lse of doubled scores - 2·lse).
at::Tensor imitation_loss(const at::Tensor& q, const at::Tensor& k, const Predictor& predictor);

}  // namespace heed::nn
