#include "lab/training_run.h"

#include <fmt/format.h>

#include <numeric>

#include "heed/base/clock.h"

namespace heed::lab {
namespace {

double mean(const double* x, Index n) { return std::accumulate(x, x + n, 0.0) / static_cast<double>(n); }

}  // namespace

double TrainingRun::tail(Index count) const {
  const Index n = static_cast<Index>(by_position.size()), some = std::min(count, n);
  return mean(by_position.data() + n - some, some);
}

std::vector<double> TrainingRun::binned(Index bins) const {
  const Index n = static_cast<Index>(by_position.size()), some = std::min(bins, n);
  std::vector<double> means;
  for (Index i = 0; i < some; ++i) {
    const Index from = n * i / some, to = n * (i + 1) / some;
    means.push_back(mean(by_position.data() + from, to - from));
  }
  return means;
}

TrainingRun follow(nn::TrainConfig config, const std::string& mechanism, int scores, const Setting& setting) {
  config.file = setting.text, config.mechanisms = {mechanism};
  nn::Trainer trainer(config);
  TrainingRun run;
  run.mechanism = mechanism;
  for (const auto& [name, parameter] : nn::parameters_of(trainer.model())) run.parameters += parameter.numel();
  const Index steps = trainer.steps();
  const auto show = [&](const std::string& what) {
    if (!setting.progress(fmt::format("{}: {}", mechanism, what), trainer.steps_done(), steps)) throw Stopped();
  };
  const auto score = [&] {
    show("scoring");
    run.by_position = trainer.held_out_by_position();
    run.held_out.push_back(mean(run.by_position.data(), static_cast<Index>(run.by_position.size())));
  };
  score();
  for (int part = 1; part <= scores; ++part) {
    while (trainer.steps_done() < steps * part / scores) {
      const double start = seconds_now(), loss = trainer.step();
      run.seconds += seconds_now() - start;
      show(fmt::format("loss {:.3f}", loss));
    }
    score();
  }
  run.tokens = steps * trainer.tokens_per_step();
  return run;
}

}  // namespace heed::lab
