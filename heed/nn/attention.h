// Attention with any mechanism of the registry, as a module of libtorch.
#pragma once

#include <torch/nn/module.h>

#include <functional>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "heed/base/random.h"
#include "heed/nn/centroids.h"
#include "heed/nn/layers.h"

namespace heed::nn {

struct AttentionOptions {
  Index width = 256, heads = 4, kv_heads = 2, head_size = 64;
  MechanismCall mechanism{"dense", {}};
  bool causal = true;
  double rope_base = 1e4;  // 0: nothing is turned
  model::RopePairs rope_pairs = model::RopePairs::adjacent;
  bool head_norms = false;  // RMS norms of every query and key before they are turned
  double rms_eps = 1e-5;
  Index key_conv = 0;           // flash-moba: width of the learned convolution of keys, 0: none
  bool headwise_gate = false;   // gated-attention: one number a token and head, else one for each feature
  Index lepe = 0;               // biformer: side of the learned convolution of values, an odd number; 0: none
  Index tokens = 0;             // sparsifiner: how many there are, the class token counted
};

/// A tensor that a mechanism learns, beside q, k and v.
struct LearnedPart {
  std::string name;  // of the mechanism's extra tensor
  std::vector<Index> shape;
  double deviation;  // of the normal numbers that it begins with; 0: zeros
};
/// What one layer's attention read and gave: q [B, heads, N, D], k and v [B, kv_heads, N, D], o [B, heads, N, D] f32,
/// lse [B, heads, N] f32.
struct AttentionPass {
  at::Tensor q, k, v, o, lse;
};
using AttentionObserver = std::function<void(const AttentionPass&)>;

/// What a mechanism learns in such a layer. What is a constant for a loss on o (a distilled gate, centroids that follow
/// tokens) is registered, and gets no gradient.
std::vector<LearnedPart> learned_parts(const AttentionOptions& options);

/// y = W_o·mechanism(RoPE(W_q·x), RoPE(W_k·x), W_v·x), causal or not. Parameters: q [heads·D, width], k and v
/// [kv_heads·D, width], output [width, heads·D], q_norm and k_norm [D] with head_norms, and the mechanism's learned
/// parts by their names. gated-attention's `gate` [heads·D or heads, width] is a projection of x, whose results are the
/// gate's logits: it gates outputs, values, and queries and keys as they are compared, that is turned.
class Attention : public torch::nn::Module {
 public:
  /// Weights are not set yet (see LanguageModel::initialise). Throws UsageError for a mechanism that cannot be trained
  /// so (see check_trains), and for parts whose sizes are missing.
  explicit Attention(const AttentionOptions& options);

  /// Sets the learned parts, by what they begin with.
  void initialise_learned(Random& random) const;

  /// x [B, N, width] f32 → [B, N, width] of type `arithmetic` (f32 or bf16), in which products and attention are
  /// computed. Throws Error for shapes that the mechanism refuses.
  at::Tensor forward(const at::Tensor& x, at::ScalarType arithmetic = at::kFloat);
  /// sparsifiner's first phase: attention is dense, and auxiliary() is what its predictor learns from (imitation_loss).
  /// In the second the predictor is a constant. Throws UsageError for other mechanisms.
  void imitate(bool on);
  /// What the mechanism adds to a model's loss after forward() (routing-transformer's commitment), or undefined.
  const at::Tensor& auxiliary() const { return auxiliary_; }

  /// Called in forward() while set. Tensors are those of the graph: what is asked of o (to retain its gradient, to
  /// require one) holds for the rest of the pass.
  void observe(AttentionObserver observer) { observer_ = std::move(observer); }

  const AttentionOptions& options() const { return options_; }
  const std::vector<LearnedPart>& learned() const { return learned_; }

 private:
  AttentionOptions options_;
  std::string call_;  // the mechanism as text
  std::vector<LearnedPart> learned_;
  Rotary rotary_;
  at::Tensor q_, k_, v_, output_, q_norm_, k_norm_;
  std::map<std::string, at::Tensor, std::less<>> extras_;  // learned parts that the mechanism reads as they are
  at::Tensor gate_;
  std::optional<Centroids> centroids_;
  bool imitating_ = false;
  at::Tensor auxiliary_;
  AttentionObserver observer_;
};

}  // namespace heed::nn
