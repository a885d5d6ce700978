// Trained from scratch, block attention loses nothing against dense attention, and a window of the same budget loses
// what lies outside it.
// "MoBA: Mixture of Block Attention for Long-Context LLMs", arXiv:2502.13189.

#include <fmt/format.h>

#include <cmath>

#include "lab/training_run.h"

namespace heed::lab {
namespace {

constexpr Index tail = 256;  // the places that have most behind them

Report run_moba(const Setting& setting) {
  const Params& p = setting.params;
  const Index block = p.integer("block"), top_k = p.integer("top_k"), length = p.integer("length");
  nn::TrainConfig config;
  for (const char* name : {"steps", "batch", "length", "layers", "width", "ffn", "heads", "kv_heads", "head_size", "lr",
                           "optimizer", "seed", "eval_tokens"})
    nn::set(config.settings, name, p.text(name));
  nn::set(config.settings, "context", fmt::format("{}", length));
  const TrainingRun dense = follow(config, "dense", {}, setting);
  const TrainingRun moba = follow(config, fmt::format("moba:block={},top_k={}", block, top_k), {}, setting);
  const TrainingRun window = follow(config, fmt::format("streaming:sink=0,window={}", block * top_k), {}, setting);

  Report report;
  report.columns = {"mechanism", "held-out loss", "vs dense", fmt::format("last {} tokens", tail),
                    "vs dense",  "training",      "tokens/s"};
  Chart training{"Held-out loss along the training", "tokens trained on", "nats a byte", 0, {}};
  Chart positions{"Held-out loss by position, at the end", "position", "nats a byte", static_cast<double>(length), {}};
  training.x_end = static_cast<double>(dense.tokens);
  for (const TrainingRun* r : {&dense, &moba, &window}) {
    report.rows.push_back(
        {r->mechanism, fmt::format("{:.4f}", r->last()),
         r == &dense ? "" : fmt::format("{:+.4f}", r->last() - dense.last()), fmt::format("{:.4f}", r->tail(tail)),
         r == &dense ? "" : fmt::format("{:+.4f}", r->tail(tail) - dense.tail(tail)),
         fmt::format("{:.0f} s", r->seconds), fmt::format("{:.0f}", static_cast<double>(r->tokens) / r->seconds)});
    // The first score is an untrained model's and would flatten the rest.
    training.lines.push_back({r->mechanism, {r->held_out.begin() + 1, r->held_out.end()}});
    positions.lines.push_back({r->mechanism, r->binned(64)});
  }
  report.charts = {training, positions};
  const double gap = moba.last() - dense.last(), against_window = moba.tail(tail) - window.tail(tail);
  report.findings = {
      {"moba's held-out loss is within 0.02 nats of dense attention's", fmt::format("{:+.4f} nats", gap),
       std::abs(gap) <= 0.02},
      {fmt::format("on the last {} tokens moba beats a window of the same budget, {} tokens", tail, block * top_k),
       fmt::format("{:+.4f} nats", against_window), against_window < 0}};
  report.note = fmt::format("Bytes of the text; {} parameters, {} tokens trained on, the same batches and the same "
                            "initial weights for all; the text's end is held out.",
                            dense.parameters, dense.tokens);
  return report;
}

}  // namespace

const Experiment& moba() {
  static const Experiment e{
      .name = "moba",
      .title = "MoBA trained from scratch",
      .paper = "arXiv:2502.13189",
      .question =
          "Does a small byte-level model that trains with moba in every layer reach the loss of dense attention, "
          "and beat a window of the same budget where the context is long?",
      .needs_model = false,
      .params = {integer("steps", 150, 1, "steps of each run"), integer("batch", 4, 1, "sequences of a step"),
                 integer("length", 2048, 2, "tokens of a sequence"), integer("block", 64, 1, "tokens of a block"),
                 integer("top_k", 4, 1, "blocks of a query, its own among them"),
                 integer("layers", 6, 1, 1024, "layers"), integer("width", 256, 2, 1 << 16, "features of a token"),
                 integer("ffn", 704, 1, 1 << 18, "features inside the feed-forward"),
                 integer("heads", 4, 1, 1024, "query heads"),
                 integer("kv_heads", 2, 1, 1024, "heads of keys and values"),
                 integer("head_size", 64, 2, 512, "features of a head"), number("lr", 3e-3, 0, 1e300, "learning rate"),
                 choice("optimizer", "muon", {"adamw", "muon"}, "as in heed train"),
                 integer("eval_tokens", 65536, 1, "held-out tokens of a score"),
                 integer("seed", 0, 0, "of weights and order")},
      .run = run_moba};
  return e;
}

}  // namespace heed::lab
