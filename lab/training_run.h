// A training run that an experiment follows: held-out loss along it, and by position at its end.
#pragma once

#include <string>
#include <vector>

#include "heed/nn/trainer.h"
#include "lab/experiment.h"

namespace heed::lab {

struct TrainingRun {
  std::string mechanism;
  std::vector<double> held_out;     // nats a token, before the first step and after each of `scores` equal parts
  std::vector<double> by_position;  // [length], at the end
  double seconds = 0;               // of the steps, without scoring
  Index tokens = 0;                 // trained on
  Index parameters = 0;

  double last() const { return held_out.back(); }
  /// Mean of by_position over its last `count` places.
  double tail(Index count) const;
  /// by_position in `bins` means, for a chart.
  std::vector<double> binned(Index bins) const;
};

/// Trains `config` to its end with `mechanism` in every layer. Throws Stopped, and what Trainer throws.
TrainingRun follow(nn::TrainConfig config, const std::string& mechanism, int scores, const Setting& setting);

}  // namespace heed::lab
