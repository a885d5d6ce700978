// A gate behind every head, decided by its token, lowers the loss, takes attention off the first token, and lets the
// learning rate rise.
// "Gated Attention for Large Language Models: Non-linearity, Sparsity, and Attention-Sink-Free", arXiv:2505.06708.

#include <ATen/ops/embedding.h>
#include <ATen/ops/exp.h>
#include <ATen/ops/sigmoid.h>
#include <c10/core/GradMode.h>
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "lab/training_run.h"

namespace heed::lab {
namespace {

struct Variant {
  std::string name, mechanism;
  Index gate_rows = 0;  // outputs of the gate's projection
  bool headwise = false, half_open = false;
  double lr = 0;
};

/// Of a model as it stands, over the held-out text.
struct Probe {
  double first = 0;    // share of attention on token 0, mean over layers, heads and all later queries
  double largest = 0;  // the residual stream's largest |x| after a layer, mean over layers
  double gate = 0;     // mean opening
};

// exp(scale·<q_t, k_0> - lse_t), [B, heads, N - 1]: what later queries give to token 0.
at::Tensor on_first(const nn::AttentionPass& pass) {
  const Index n = pass.q.size(2), d = pass.q.size(3);
  const at::Tensor k = pass.k.narrow(2, 0, 1).repeat_interleave(pass.q.size(1) / pass.k.size(1), 1);
  const at::Tensor scores = (pass.q * k).sum(-1) / std::sqrt(static_cast<double>(d));
  return at::exp(scores - pass.lse).narrow(2, 1, n - 1);
}

Probe probe(nn::Trainer& trainer, const Variant& variant) {
  const c10::NoGradGuard frozen;
  nn::LanguageModel& model = trainer.model();
  const auto parameters = model.named_parameters();
  const Index layers = model.info().layers;
  Probe mean;
  std::vector<double> most(static_cast<size_t>(layers), 0.0);
  double windows = 0;
  for (const nn::Windows& w : trainer.held_out_windows()) {
    const auto count = static_cast<double>(w.tokens.size(0));
    windows += count;
    at::Tensor x =
        at::embedding(parameters["token_embd"], w.tokens) * static_cast<double>(model.info().embedding_scale);
    for (Index i = 0; i < layers; ++i) {
      const std::string block = fmt::format("blk.{}.", i);
      if (variant.gate_rows > 0) {
        const at::Tensor normed = nn::rms_norm(x, parameters[block + "attn_norm"], model.info().rms_eps);
        const double open =
            at::sigmoid(nn::product(normed, parameters[block + "attn.gate"], at::kFloat)).mean().item<double>();
        mean.gate += count * (variant.half_open ? 0.5 + open / 2 : open);
      }
      nn::Layer& layer = model.layer(i);
      layer.attention().observe(
          [&](const nn::AttentionPass& pass) { mean.first += count * on_first(pass).mean().item<double>(); });
      x = layer.forward(x, at::kFloat);
      layer.attention().observe({});
      double& highest = most[static_cast<size_t>(i)];
      highest = std::max(highest, x.abs().max().item<double>());
    }
  }
  const double rows = windows * static_cast<double>(layers);
  mean.first /= rows, mean.gate /= rows;
  for (const double x : most) mean.largest += x / static_cast<double>(layers);
  return mean;
}

/// A variant's runs, one a seed.
struct Measured {
  Variant variant;
  std::vector<TrainingRun> runs;
  std::vector<std::vector<Probe>> probes;  // of each run, one a score

  bool diverged() const {
    return std::any_of(runs.begin(), runs.end(), [](const TrainingRun& r) { return r.diverged; });
  }
  /// Mean over runs that came to their end, NaN without one.
  double mean(auto of) const {
    double sum = 0, count = 0;
    for (size_t i = 0; i < runs.size(); ++i)
      if (!runs[i].diverged) sum += of(i), ++count;
    return count > 0 ? sum / count : std::numeric_limits<double>::quiet_NaN();
  }
  double loss() const {
    return mean([&](size_t i) { return runs[i].last(); });
  }
  double at_end(double Probe::* what) const {
    return mean([&](size_t i) { return probes[i].back().*what; });
  }
  /// The most that a seed loses against `other`'s run of the same seed.
  double worst_against(const Measured& other) const {
    double worst = -std::numeric_limits<double>::infinity();
    for (size_t i = 0; i < runs.size(); ++i) worst = std::max(worst, runs[i].last() - other.runs[i].last());
    return worst;
  }
};

std::string shown(double x, const char* form, const char* otherwise = "–") {
  return std::isnan(x) ? otherwise : fmt::format(fmt::runtime(form), x);
}

Report run_gate(const Setting& setting) {
  const Params& p = setting.params;
  const Index heads = p.integer("heads"), kv_heads = p.integer("kv_heads"), d = p.integer("head_size"),
              ffn = p.integer("ffn"), length = p.integer("length");
  const double lr = p.number("lr"), factor = p.number("lr_factor");
  const int scores = 10;

  const std::string g1 = "gated-attention:position=g1";
  const Variant dense{"dense", "dense", 0, false, false, lr}, gated{"gate", g1, heads * d, false, false, lr};
  std::vector<Variant> variants{dense, gated};
  if (p.boolean("controls")) {
    variants.push_back({"gate a head", g1, heads, true, false, lr});
    variants.push_back({"gate on values", "gated-attention:position=g2", kv_heads * d, false, false, lr});
    variants.push_back({"gate from 1/2 up", g1 + ",activation=ns-sigmoid", heads * d, false, true, lr});
  }
  const size_t fast = variants.size();
  for (Variant v : {dense, gated}) v.lr *= factor, v.name += fmt::format(", lr × {:g}", factor), variants.push_back(v);

  std::vector<Measured> all;
  const Index seeds = p.integer("seeds"), total = seeds * static_cast<Index>(variants.size());
  Index number = 0;
  for (const Variant& v : variants) {
    Measured& m = all.emplace_back();
    m.variant = v;
    // The feed-forward pays for the gate.
    const Index narrowed = ffn - std::lround(static_cast<double>(v.gate_rows) / 3);
    if (narrowed < 1) fail_usage("lab gate: ffn = {}, expected more than {}", ffn, ffn - narrowed);
    for (Index seed = 0; seed < seeds; ++seed) {
      nn::TrainConfig config;
      for (const char* name : {"steps", "batch", "length", "layers", "width", "heads", "kv_heads", "head_size",
                               "optimizer", "eval_tokens", "clip"})
        nn::set(config.settings, name, p.text(name));
      nn::set(config.settings, "ffn", fmt::format("{}", narrowed));
      nn::set(config.settings, "lr", fmt::format("{}", v.lr));
      nn::set(config.settings, "seed", fmt::format("{}", p.integer("seed") + seed));
      nn::set(config.settings, "gate", v.headwise ? "headwise" : "elementwise");
      nn::set(config.settings, "context", fmt::format("{}", length));
      nn::set(config.settings, "bos", "true");
      std::vector<Probe>& probes = m.probes.emplace_back();
      m.runs.push_back(follow(config, v.mechanism,
                              {.scores = scores,
                               .name = fmt::format("{} ({} of {})", v.name, ++number, total),
                               .may_diverge = true,
                               .scored = [&](nn::Trainer& trainer) { probes.push_back(probe(trainer, v)); }},
                              setting));
    }
  }

  Report report;
  report.columns = {"attention",  "held-out loss", "vs dense", "on the first token", "largest activation", "mean gate",
                    "parameters", "training",      "tokens/s"};
  const TrainingRun& first_run = all[0].runs[0];
  const auto tokens = static_cast<double>(first_run.tokens);
  Chart losses{"Held-out loss along the training", "tokens trained on", "nats a byte", tokens, {}};
  Chart shares{"Attention on the first token along the training", "tokens trained on", "%", tokens, {}};
  for (const Measured& m : all) {
    const double seconds = m.mean([&](size_t i) { return m.runs[i].seconds; });
    report.rows.push_back({m.variant.name, shown(m.loss(), "{:.4f}", "diverged"),
                           &m == &all[0] ? "" : shown(m.loss() - all[0].loss(), "{:+.4f}"),
                           shown(100 * m.at_end(&Probe::first), "{:.1f} %"), shown(m.at_end(&Probe::largest), "{:.1f}"),
                           m.variant.gate_rows == 0 ? "" : shown(m.at_end(&Probe::gate), "{:.3f}"),
                           fmt::format("{}", m.runs[0].parameters), shown(seconds, "{:.0f} s"),
                           shown(tokens / seconds, "{:.0f}")});
    if (m.diverged()) continue;
    std::vector<double> loss, share;
    for (size_t s = 0; s <= static_cast<size_t>(scores); ++s) {
      // The first score is an untrained model's and would flatten the rest.
      if (s > 0) loss.push_back(m.mean([&](size_t i) { return m.runs[i].held_out[s]; }));
      share.push_back(100 * m.mean([&](size_t i) { return m.probes[i][s].first; }));
    }
    losses.lines.push_back({m.variant.name, loss}), shares.lines.push_back({m.variant.name, share});
  }
  report.charts = {losses, shares};

  const Measured &plain = all[0], &gate = all[1], &plain_fast = all[fast], &gate_fast = all[fast + 1];
  double even = 0;  // where all that a query sees has the same weight
  for (Index t = 1; t < length; ++t) even += 1 / static_cast<double>((t + 1) * (length - 1));
  const double before = plain.at_end(&Probe::first), after = gate.at_end(&Probe::first);
  const double gain = gate.loss() - plain.loss();
  const auto suffers = [&](const Measured& m, const Measured& slow) {
    return m.diverged() || slow.diverged() || m.worst_against(slow) > 0.1;
  };
  const auto suffering = [&](const Measured& m, const Measured& slow) {
    return m.diverged() || slow.diverged() ? std::string("diverges")
                                           : fmt::format("{:+.4f} nats", m.worst_against(slow));
  };
  report.findings = {
      {"the gate lowers the held-out loss by at least 0.01 nats", shown(gain, "{:+.4f} nats", "a run diverged"),
       gain <= -0.01},
      {"dense attention gathers on the first token, over four times an even share, and the gate at least halves that",
       fmt::format("{} without, {} with it, {:.1f} % would be even", shown(100 * before, "{:.1f} %"),
                   shown(100 * after, "{:.1f} %"), 100 * even),
       before > 4 * even && after <= before / 2},
      {"the gate at least halves the largest activations",
       fmt::format("{} without, {} with it", shown(plain.at_end(&Probe::largest), "{:.1f}"),
                   shown(gate.at_end(&Probe::largest), "{:.1f}")),
       gate.at_end(&Probe::largest) <= plain.at_end(&Probe::largest) / 2},
      {fmt::format("at {:g} times the learning rate dense attention diverges or loses over 0.1 nats, with the gate it "
                   "does not",
                   factor),
       fmt::format("{} without, {} with it, the worst seed", suffering(plain_fast, plain), suffering(gate_fast, gate)),
       suffers(plain_fast, plain) && !suffers(gate_fast, gate)}};
  report.note = fmt::format("Bytes of the text, each sequence after a mark; {} tokens trained on, {}, the same batches "
                            "for all; the feed-forward is narrowed by what a gate adds; the text's end is held out.",
                            first_run.tokens, seeds == 1 ? "one seed" : fmt::format("means of {} seeds", seeds));
  return report;
}

}  // namespace

const Experiment& gate() {
  static const Experiment e{
      .name = "gate",
      .title = "Gated attention trained from scratch",
      .paper = "arXiv:2505.06708",
      .question = "Does a gate on the output of every head lower the loss of a small byte-level model, take its "
                  "attention off the first token, and bear a higher learning rate?",
      .needs_model = false,
      .params = {integer("steps", 300, 1, "steps of each run"), integer("batch", 8, 1, "sequences of a step"),
                 integer("length", 256, 2, "tokens of a sequence"),
                 integer("seeds", 1, 1, 1000, "runs of each kind, with other weights and another order"),
                 boolean("controls", false,
                         "also a gate for whole heads, one on values, and one that is never less than half open"),
                 number("lr_factor", 4, 1, 1e300, "how much higher the learning rate of the last runs is"),
                 integer("layers", 4, 1, 1024, "layers"), integer("width", 128, 2, 1 << 16, "features of a token"),
                 integer("ffn", 352, 1, 1 << 18, "features inside the feed-forward, where there is no gate"),
                 integer("heads", 4, 1, 1024, "query heads"),
                 integer("kv_heads", 4, 1, 1024, "heads of keys and values"),
                 integer("head_size", 32, 2, 512, "features of a head"), number("lr", 4e-3, 0, 1e300, "learning rate"),
                 choice("optimizer", "adamw", {"adamw", "muon"}, "as in heed train"),
                 number("clip", 1, 0, 1e300, "longest gradient, as one vector; 0: any"),
                 integer("eval_tokens", 16384, 1, "held-out tokens of a score"),
                 integer("seed", 0, 0, "of the first run's weights and order")},
      .run = run_gate};
  return e;
}

}  // namespace heed::lab
