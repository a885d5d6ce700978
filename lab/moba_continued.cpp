// Block attention put into a model that was trained with dense attention costs much; a short continued training gets
// most of it back.
// "MoBA: Mixture of Block Attention for Long-Context LLMs", arXiv:2502.13189, which trains so.

#include <fmt/format.h>

#include "lab/training_run.h"

namespace heed::lab {
namespace {

Report run_continued(const Setting& setting) {
  const Params& p = setting.params;
  nn::TrainConfig config;
  config.from = setting.model;
  for (const char* name : {"steps", "batch", "length", "lr", "warmup", "optimizer", "seed", "eval_tokens"})
    nn::set(config.settings, name, p.text(name));
  nn::set(config.settings, "weight_decay", "0");
  FollowOptions options;
  options.scores = static_cast<int>(p.integer("scores"));
  const TrainingRun moba =
      follow(config, fmt::format("moba:block={},top_k={}", p.integer("block"), p.integer("top_k")), options, setting);
  // Dense attention trains the same way: what the model learns of the text is no merit of moba's.
  const TrainingRun dense = follow(config, "dense", options, setting);

  Report report;
  report.columns = {"tokens trained on", "moba", "dense", "cost of moba", "recovered"};
  Chart chart{"Held-out loss along the continued training", "tokens trained on", "nats a token", 0, {}};
  chart.x_end = static_cast<double>(moba.tokens);
  const double before = moba.held_out.front() - dense.held_out.front();
  for (size_t i = 0; i < moba.held_out.size(); ++i) {
    const double cost = moba.held_out[i] - dense.held_out[i];
    report.rows.push_back({fmt::format("{}", moba.tokens * static_cast<Index>(i) / options.scores),
                           fmt::format("{:.4f}", moba.held_out[i]), fmt::format("{:.4f}", dense.held_out[i]),
                           fmt::format("{:+.4f}", cost), fmt::format("{:.0f} %", 100 * (1 - cost / before))});
  }
  for (const TrainingRun* r : {&moba, &dense}) chart.lines.push_back({r->mechanism, r->held_out});
  report.charts = {chart};
  const double after = moba.last() - dense.last(), recovered = 1 - after / before;
  report.findings = {{"continued training recovers most of what plugging moba in costs",
                      fmt::format("{:+.4f} nats before, {:+.4f} after {} tokens: {:.0f} % recovered", before, after,
                                  moba.tokens, 100 * recovered),
                      recovered > 0.5}};
  report.note =
      fmt::format("{} parameters, all trained; dense attention trains the same way on the same batches beside "
                  "it; the text's end is held out. Training: moba {:.0f} s, dense {:.0f} s.",
                  moba.parameters, moba.seconds, dense.seconds);
  return report;
}

}  // namespace

const Experiment& moba_continued() {
  static const Experiment e{
      .name = "moba-continued",
      .title = "MoBA by continued training",
      .paper = "arXiv:2502.13189",
      .question = "How much of what moba costs in a model trained with dense attention does a short continued training "
                  "recover?",
      .needs_model = true,
      .params = {integer("steps", 48, 1, "steps of each run"), integer("batch", 1, 1, "sequences of a step"),
                 integer("length", 4096, 2, "tokens of a sequence"), integer("block", 64, 1, "tokens of a block"),
                 integer("top_k", 8, 1, "blocks of a query, its own among them"),
                 number("lr", 2e-4, 0, 1e300, "learning rate"), integer("warmup", 5, 0, "steps over which it rises"),
                 choice("optimizer", "adamw", {"adamw", "muon"}, "as in heed train"),
                 integer("scores", 4, 1, 1000, "times that the held-out text is scored"),
                 integer("eval_tokens", 16384, 1, "held-out tokens of a score"), integer("seed", 0, 0, "of the order")},
      .run = run_continued};
  return e;
}

}  // namespace heed::lab
