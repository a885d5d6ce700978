// SeerAttention's gate, distilled from a model's own attention while the model stays as it is: the block maxima of its
// attention are the targets (arXiv:2410.13276, section 3.3).
#pragma once

#include <ATen/core/Tensor.h>

#include "heed/nn/fit.h"

namespace heed::nn {

/// The logits that heed/mechanism/block_gate.h computes, on torch's tensors, for the form without wq. q_means
/// [P, Hq, n, D], key_pools [P, Hk, n, 3D], wk [Hq, 3D, D] → [P, Hq, n, n], -inf where a block lies after the row's
/// own. block: tokens; rope_base 0: no positions inside the gate. Any floating type.
at::Tensor gate_logits(const at::Tensor& q_means, const at::Tensor& key_pools, const at::Tensor& wk, Index block,
                       double rope_base);

/// KL(T ‖ softmax of logits) in nats, the mean over rows of query blocks, heads and pieces, the first quarter of the
/// query blocks (floor(n/4)) left out. targets [P, Hq, n, n], rows summing to 1. The authors' loss, ten times the mean
/// over all elements of the map, is this times (10 / n)·(1 - floor(n/4) / n).
at::Tensor gate_loss(const at::Tensor& logits, const at::Tensor& targets);

/// One layer's pooled queries and keys and what they lead to, of P pieces of text; shapes as above, f32.
struct GateData {
  at::Tensor q_means, key_pools, targets;
};

/// A gate that scores by the dot product of mean query and mean key: [Hq, 3D, D]. Where fitting begins.
at::Tensor mean_gate(Index heads, Index head_size);

struct GateFit {
  at::Tensor wk;               // [Hq, 3D, D] f32
  std::vector<double> losses;  // of every step's pieces, before the step
};
/// AdamW without weight decay from mean_gate() on; every step takes options.batch pieces that seed and step decide.
/// `progress` hears of every step.
GateFit fit_gate(const GateData& data, Index block, double rope_base, const FitOptions& options,
                 const FitProgress& progress = {});

/// Reads every piece with dense attention and fits a gate for each layer that `use` replaces; its call is
/// seer-attention's. With several pieces the last one is not trained on: `before` (mean_gate) and `after` are losses
/// of that one. The calibration holds wk by layer, and block and rope_base among its parameters. Throws UsageError for
/// an odd gate width with positions, Error for pieces shorter than two blocks.
Fitted fit_gates(const model::Model& model, const model::MechanismUse& use, const Pieces& pieces, Index chunk, DType kv,
                 const FitOptions& options, const FitProgress& progress = {});

}  // namespace heed::nn
