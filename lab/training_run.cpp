#include "lab/training_run.h"

#include <c10/util/Exception.h>
#include <fmt/format.h>

#include <cmath>
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

TrainingRun follow(nn::TrainConfig config, const std::string& mechanism, const FollowOptions& options,
                   const Setting& setting) {
  config.file = setting.text, config.mechanisms = {mechanism};
  nn::Trainer trainer(config);
  TrainingRun run;
  run.mechanism = mechanism;
  for (const auto& [name, parameter] : nn::parameters_of(trainer.model())) run.parameters += parameter.numel();
  const Index steps = trainer.steps();
  const auto show = [&](const std::string& what) {
    if (!setting.progress(fmt::format("{}: {}", options.name.empty() ? mechanism : options.name, what),
                          trainer.steps_done(), steps))
      throw Stopped();
  };
  const auto score = [&] {
    show("scoring");
    run.by_position = trainer.held_out_by_position();
    const double loss = mean(run.by_position.data(), static_cast<Index>(run.by_position.size()));
    if (!std::isfinite(loss)) fail("{}: held-out loss = {}, expected a finite number", mechanism, loss);
    run.held_out.push_back(loss);
    if (options.scored) options.scored(trainer);
  };
  run.tokens = steps * trainer.tokens_per_step();
  score();
  const auto ends = [&] {
    if (!options.may_diverge) throw;
    run.diverged = true;
  };
  try {
    for (int part = 1; part <= options.scores; ++part) {
      while (trainer.steps_done() < steps * part / options.scores) {
        const double start = seconds_now(), loss = trainer.step();
        run.seconds += seconds_now() - start;
        show(fmt::format("loss {:.3f}", loss));
      }
      score();
    }
  } catch (const Error&) {  // weights or losses that are not finite, which are refused
    ends();
  } catch (const c10::Error&) {  // the same inside an operator
    ends();
  }
  return run;
}

}  // namespace heed::lab
