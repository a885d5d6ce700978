// dhsa's boundary predictor, fitted to a model's own attention while the model stays as it is: one predictor for all
// layers (arXiv:2510.24606).
#pragma once

#include <ATen/core/Tensor.h>

#include "heed/nn/fit.h"

namespace heed::nn {

/// The predictor's tensors under the names and in the layout of heed/mechanism/boundary_predictor.h: [3, C, C], [C, C],
/// [2, C], [4C + 2, H], [H + 1].
struct BoundaryWeights {
  at::Tensor qkv, out, norm, hidden, score;
  Index features() const { return out.size(0); }
};

/// Where fitting begins, f32: a token looks at those like it and brings what they are (unit matrices, gain 1, nothing
/// added), so that the two sides of a gap differ as their keys do; with random W_q and W_k attention is nearly even,
/// and both sides are the same. The hidden layer, H = `units`, is random, the score so small that logits begin near 0.
BoundaryWeights first_boundary_weights(Index features, Index units, std::uint64_t seed);

/// The logits that heed/mechanism/boundary_predictor.h computes, on torch's tensors: keys [P, N, C] → [P, N - 2ω + 1],
/// of the gaps after tokens ω - 1 … N - ω - 1, ω = half_window; with a stride those of every stride-th of these.
/// N >= 2ω. Any floating type.
at::Tensor boundary_logits(const at::Tensor& keys, const BoundaryWeights& w, Index half_window, Index heads,
                           Index stride = 1);

/// The mean over all gaps with a label >= 0 of (1 - p_t)² · BCE, p_t the probability of the label y and
/// BCE = -1.3·y·ln σ(logit) - (1 - y)·ln(1 - σ(logit)). logits and labels of one shape; 0 where no gap has a label.
at::Tensor boundary_loss(const at::Tensor& logits, const at::Tensor& labels);

/// One layer's keys [N, C] and labels [N] of one piece of text, as dhsa's calibrate gives them; f32.
struct BoundaryLesson {
  at::Tensor keys, labels;
};

/// As many steps as bring little more on SmolLM2-135M; the authors take Adam's 1e-4 for two epochs of a large corpus.
/// batch: stretches of at most 256 tokens a step.
FitOptions boundary_fit_options();

struct BoundaryFit {
  BoundaryWeights weights;  // f32
  std::vector<double> losses;  // of every step's stretches, before the step
};
/// AdamW without weight decay from first_boundary_weights() on, with H = 256. Every step takes options.batch
/// stretches, of lessons and places that seed and step decide, and every fourth gap of them, as windows overlap.
/// Features of the keys are divided by their root mean square over all lessons, which the weights returned have in
/// them. `progress` hears of every step. Throws Error for lessons, all of one length, shorter than 4ω, UsageError where
/// `heads` does not divide C.
BoundaryFit fit_boundary_predictor(const std::vector<BoundaryLesson>& lessons, Index half_window, Index heads,
                                   const FitOptions& options, const FitProgress& progress = {});

/// What a predictor makes of the gaps of lessons that have a label.
struct BoundaryCounts {
  double gaps = 0, labelled = 0, predicted = 0, both = 0;  // all, label 1, logit above the threshold, both of these
  double f1() const { return labelled + predicted > 0 ? 2 * both / (labelled + predicted) : 0; }
};
BoundaryCounts count_boundaries(const std::vector<BoundaryLesson>& lessons, const BoundaryWeights& w, Index half_window,
                                Index heads, double threshold);

/// The threshold whose F1 over every fourth gap of the lessons is best; 0 where nothing is a boundary.
double best_boundary_threshold(const std::vector<BoundaryLesson>& lessons, const BoundaryWeights& w, Index half_window,
                               Index heads);

/// Reads every piece with dense attention and fits one predictor to all layers that `use` replaces; its call is dhsa's.
/// With several pieces the last one is not trained on: `before` and `after` are F1 of that one's labels, of every gap
/// called a boundary, which is the best that can be said without looking, and of the predictor's logits above the
/// threshold. The calibration holds the tensors for all layers, and half_window, predictor_heads and a threshold among
/// its parameters: best_boundary_threshold() of the pieces trained on, unless the call gives one. The focal loss keeps
/// logits near 0, so that hardly any exceeds the authors' 1.1; how many chunks there may be is up to the plan. Keeps
/// pieces · layers · tokens · C floats. Throws UsageError where predictor_heads does not divide C, Error for pieces
/// shorter than 4·half_window.
Fitted fit_boundaries(const model::Model& model, const model::MechanismUse& use, const Pieces& pieces, Index chunk,
                      DType kv, const FitOptions& options, const FitProgress& progress = {});

}  // namespace heed::nn
