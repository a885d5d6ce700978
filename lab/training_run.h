// A training run that an experiment follows: held-out loss along it, and by position at its end.
#pragma once

#include <functional>
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
  bool diverged = false;            // a loss was not finite, and the run ended there

  double last() const { return held_out.back(); }
  /// Mean of by_position over its last `count` places.
  double tail(Index count) const;
  /// by_position in `bins` means, for a chart.
  std::vector<double> binned(Index bins) const;
};

struct FollowOptions {
  int scores = 10;
  std::string name;          // in the progress; "": the mechanism
  bool may_diverge = false;  // what a run throws after its first score is its end, and no error
  std::function<void(nn::Trainer&)> scored;  // called after each score
};

/// Trains `config` to its end with `mechanism` in every layer. Throws Stopped, and what Trainer throws.
TrainingRun follow(nn::TrainConfig config, const std::string& mechanism, const FollowOptions& options,
                   const Setting& setting);

}  // namespace heed::lab
