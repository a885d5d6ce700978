// MoA's spans: what the loss suffers where a head's far keys are hidden, from one backward pass a text, and the choice
// of a rule for every head under a budget (arXiv:2406.14909, section 4).
#pragma once

#include <ATen/core/Tensor.h>

#include "heed/nn/fit.h"
#include "heed/nn/language_model.h"

namespace heed::nn {

/// Influence maps (heed/exec/influence.h) of `layers` of a dense model over tokens [1, N] i64: of each layer [Hq, n,
/// n], n = ceil(N / block). The loss is the mean of -ln p(token t + 1 | tokens to t) over t < N - 1: that of the text,
/// where the authors take answers that the model gave. Weights need no gradients and get none. Throws Error for N < 2.
std::map<Index, at::Tensor> influence_of(LanguageModel& model, const at::Tensor& tokens,
                                         const std::vector<Index>& layers, Index block);

/// Reads the first half of every piece and the whole of it, T tokens, and chooses a rule (alpha, beta) for each KV
/// head of the layers that `use` replaces, its call being moa's: at most two rules in a layer; at both lengths
/// and at 2·T the last row keeps on average at most `density` of its blocks; and the sum over both lengths of the mean
/// influence of what is hidden is least (heed/plan/span_rules.h). A KV head's influence is, block by block, the largest
/// of its query heads'. alpha is a multiple of T/8 from 0 on, beta of 1/8: rules with alpha < 0 are left out, as they
/// leave nothing of a short prompt. Without them the sink's block weighs most at the shortest length, so that the
/// authors' other bound, 0.9 of the budget at every length, could not be met. `before` and `after` are the influence
/// that a layer loses by one rule for all heads, the best that fits the budget (NaN: none does), and by the rules
/// chosen. The calibration holds alpha and beta [Hk] by layer. Throws UsageError where alpha or beta was given, Error
/// for pieces shorter than 32 blocks and for a density that no choice meets.
Fitted fit_spans(const model::Gguf& file, const model::MechanismUse& use, const Pieces& pieces, double density,
                 const FitProgress& progress = {});

}  // namespace heed::nn
