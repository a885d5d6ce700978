// DHSA's boundary predictor: a small network that sees the keys around a gap between two tokens and says whether a
// chunk ends there; and what it is to learn from a model's own attention.
#pragma once

#include <optional>
#include <vector>

#include "heed/mechanism/mechanism.h"

namespace heed::mechanism {

/// The predictor's five tensors. None is required, so that their owner can do without a predictor.
std::vector<ExtraSpec> predictor_extras();

/// Throws UsageError where heads do not divide the features of a token's keys, C = Hk·D.
void check_predictor_heads(Index features, Index heads);

/// What stands at a position that can be no boundary.
constexpr float no_boundary = -100;

/// The predictor of one call: sheet (a) of arXiv:2510.24606. X [N, C] are the keys of all KV heads side by side, C =
/// Hk·D, and ω is half_window. For the gap after token i, the 2ω tokens i - ω + 1 … i + ω:
///   Y = LayerNorm(Attention(X W_q, X W_k, X W_v) W_o), `heads` heads, each of the tokens seeing all, no positions;
///   l and r = means of Y over the first and the last ω tokens;
///   logit = [ReLU([l, r, |l - r|, l∘r, cos(l, r), 1] W_hidden), 1] · w_score.
class BoundaryPredictor {
 public:
  /// Nothing where none of its tensors was given. `in` must outlive it. Throws Error when only some of them were and
  /// for shapes that do not fit each other, UsageError when `heads` does not divide C.
  static std::optional<BoundaryPredictor> of(const Inputs& in, Index half_window, Index heads);

  /// For every token i of batch b the logit that a chunk ends after it: [N], no_boundary for i < ω - 1 and i >= N - ω.
  /// N · (4·C² + 2ω·2ω·heads·C + (4·C + 2)·H) multiply-adds. The same bits for any number of threads.
  std::vector<float> logits(Index b) const;

 private:
  BoundaryPredictor(const Inputs& in, Index half_window, Index heads);
  void score_gaps(Index b, Index first, Index count, float* out, Scratch& scratch) const;
  void window_weights(const float* band, Index first, float* weights) const;
  void features(const float* weights, const float* folded, Index tokens, float* out, Scratch& scratch) const;

  const KeyValues* kv_;
  Index tokens_, kv_heads_, half_, heads_, width_, hidden_;  // width_: C, hidden_: H
  std::vector<float> qkv_[3];  // [C, C], right factors
  std::vector<std::vector<float>> out_;  // [heads]: rows of W_o of one head, [C / heads, C], centred
  std::vector<float> gain_, shift_;  // [C]
  std::vector<float> hidden_w_, score_;  // [4C + 2, H] as a right factor; [H + 1]
};

/// What a predictor is to learn of one layer's dense causal attention, and from what (M = N):
///   `keys` f32 [B, N, C], the keys of all KV heads side by side;
///   `labels` f32 [B, N]: 1 where the ω tokens to the left of the gap after token i and the ω to its right get unlike
///   attention from the rows r >= i + ω, A the mean of the heads' weights:
///     a_P = Σ_r Σ_{j = i-ω+1 … i} A_rj,  a_F = Σ_r Σ_{j = i+1 … i+ω} A_rj,  (max(a_P, a_F) + ε) / (min + ε) >= 2,
///   with ε = 1e-6; else 0; and -1, not to be learned, for i < 2ω - 1 and i >= N - 2ω.
/// O(N·ω) memory a head; N²/2·(D + 1) multiply-adds and as many exponentials as pairs. f64 sums, in the order of rows
/// and heads: the same bits for any number of threads.
NamedTensors boundary_lessons(const Inputs& in, Index half_window);

}  // namespace heed::mechanism
