// From logits to the next token.
#pragma once

#include <vector>

#include "heed/base/random.h"
#include "heed/model/tokenizer.h"

namespace heed::model {

struct SamplerOptions {
  double temperature = 0;  // 0: greedy, lowest id among equals
  Index top_k = 0;         // 0: all
  double top_p = 1;        // smallest set of tokens with this much probability
  double min_p = 0;        // tokens at least this share of the most likely one
  std::uint64_t seed = 0;
};

class Sampler {
 public:
  /// Throws UsageError for a temperature < 0 or not finite, top_k < 0, top_p outside (0, 1], min_p outside [0, 1].
  explicit Sampler(const SamplerOptions& options);
  /// Applies top-k, then top-p, then min-p to the tempered distribution and draws.
  Token next(const std::vector<float>& logits);

 private:
  SamplerOptions options_;
  Random random_;
};

/// The k largest logits, largest first, ties to the lower id.
std::vector<std::pair<Token, float>> top_logits(const std::vector<float>& logits, Index k);

}  // namespace heed::model
