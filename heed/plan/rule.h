// What happens to scores: the rule changes scores only, visibility belongs to the plan.
#pragma once

#include <vector>

#include "heed/base/tensor.h"

namespace heed {

/// score(i, j) = softcap(scale · q_i·k_j) + slope · (pos_j - pos_i) + bias_ij + log_weight_j, where
/// softcap(s) = cap · tanh(s / cap). A head's sink adds exp(sink) to the denominator alone.
struct Rule {
  float scale = 1;
  float softcap = 0;          // 0: none
  std::vector<float> alibi;   // slope per query head, or empty
  TensorView bias;            // [B or 1, Hq or 1, N, M], -inf allowed, or empty
  std::vector<float> sinks;   // logit per query head, or empty
  bool plain() const { return softcap == 0 && alibi.empty() && bias.empty(); }
};

}  // namespace heed
