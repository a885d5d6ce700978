// MoA: every head has its own span of first tokens and a window, which grows with the prompt by a rule
// that was chosen for that head beforehand.
// "MoA: Mixture of Sparse Attention for Automatic Large Language Model Compression", arXiv:2406.14909.

#include <algorithm>
#include <cmath>
#include <memory>

#include "heed/mechanism/extra.h"
#include "heed/mechanism/registry.h"
#include "heed/plan/block_runs.h"

namespace heed::mechanism {
namespace {

// Tokens that a head keeps, multiples of the block.
struct HeadSpan {
  Index sink = 0, local = 0;
};

// alpha or beta of every KV head: the tensor, or the parameter for all. Our addition: a rule for all heads needs no
// tensors, so that MoA runs on a model that nobody has calibrated.
std::vector<double> rule_of(const Params& p, const Inputs& in, std::string_view name) {
  const TensorView* given = in.find(name);
  if (given == nullptr) return std::vector<double>(static_cast<size_t>(in.problem.Hk), p.number(name));
  if (p.given(name))
    fail_usage("moa: {} = {}, expected not to be given beside the tensor {}", name, p.text(name), name);
  const std::vector<float> values = values_of(*given);
  return {values.begin(), values.end()};
}

std::vector<HeadSpan> read_spans(const Params& p, const Inputs& in) {
  const Index block = p.integer("block"), sink = p.integer("sink"), least = p.integer("min_span");
  if (sink % block != 0) fail_usage("moa: sink = {}, expected a multiple of block = {}", sink, block);
  const std::vector<double> alpha = rule_of(p, in, "alpha"), beta = rule_of(p, in, "beta");
  // The length that is settled when the prompt begins, whatever chunk of it this is.
  const Index tokens = std::max(in.prompt, in.problem.N) + p.integer("max_new_tokens");
  std::vector<HeadSpan> spans;
  for (size_t head = 0; head < alpha.size(); ++head) {
    // Fractions of counts are taken with slack: 0.3 · 10 is 3.
    const double raw = std::floor(alpha[head] + beta[head] * static_cast<double>(tokens) + 1e-9);
    if (!(raw >= 1))
      fail("moa: span of KV head {} = {} ({:g} + {:g} · {} tokens), expected >= 1", head, raw, alpha[head], beta[head],
           tokens);
    const auto kept = static_cast<Index>(std::min(raw, static_cast<double>(tokens)));
    const Index span = round_up(std::max(kept, least), block);
    if (span <= sink && tokens > sink)
      fail("moa: span of KV head {} = {}, expected more than sink = {}", head, span, sink);
    spans.push_back({std::min(span, sink), std::max(span - sink, block)});
  }
  return spans;
}

Plan plan_moa(const Params& p, const Inputs& in) {
  const Index block = p.integer("block"), prompt = in.prompt;
  const auto spans = std::make_shared<const std::vector<HeadSpan>>(read_spans(p, in));
  Plan plan = make_plan(in.problem, in.q, *in.kv, in.rule, Lanes::per_kv_head);
  plan.cut_rows_every(round_up(256, block));
  plan.keep = {spans};

  // A window of the prompt begins no earlier than that of a step at the same place.
  plan.reaches = [spans, heads = in.problem.Hk](Index lane, Index position, Index begin, Index end) {
    const auto [sink, local] = (*spans)[static_cast<size_t>(lane % heads)];
    return begin < sink || end > position - local + 1;
  };
  plan.emit = [=, spans = spans.get()](const RowBlock& rows, Tiles& tiles) {
    const auto [sink, local] = (*spans)[static_cast<size_t>(rows.kv_head)];
    // Prompt: windows begin at whole blocks of positions, so they hold local - block + 1 … local tokens.
    const Index read = std::clamp<Index>(prompt - rows.position(0), 0, rows.rows);
    add_block_rows(rows, 0, read, block, tiles, [&](BlockRuns& runs) {
      runs.add(0, sink / block);
      runs.add(std::max<Index>(0, runs.own() + 1 - local / block), runs.own() + 1);
    });
    // Steps after it: what a ring of `local` slots holds behind the sinks, `local` tokens always.
    if (read == rows.rows) return;
    const Set steps = Set::range(read, rows.rows);
    const Index first = rows.position(read), last = rows.position(rows.rows - 1);
    tiles.add(steps, Set::range(0, std::min(sink, last - local + 1)), Mask::band(-Mask::unbounded, -local));
    tiles.add(steps, Set::range(std::max<Index>(0, first - local + 1), last + 1), Mask::band(-local + 1, 0));
  };
  return plan;
}

}  // namespace

const Mechanism& moa() {
  static const std::vector<DType> real{DType::f32, DType::f16, DType::bf16};
  static const Mechanism m{
      .name = "moa",
      .title = "MoA: mixture of attention spans",
      .paper = "arXiv:2406.14909",
      .year = 2024,
      .stage = "attend",
      .training = Training::none,
      .idea =
          "Each head sees the first tokens and its latest ones, as many as its rule says for this length of prompt:\n"
          "some heads are local whatever the length, others grow with it. Rules are chosen once for a model, from "
          "what\n"
          "the loss suffers where a head's far keys are hidden, under a budget for the mean span. Without tensors one\n"
          "rule, the parameters alpha and beta, holds for every head: an addition, for models without such a choice.",
      .equations =
          "n = tokens of the prompt + max_new_tokens;  S_h = min(floor(alpha_h + beta_h·n), n), at least min_span,\n"
          "up to whole blocks;  sinks: the first min(S_h, sink) tokens;  L_h = S_h - sinks\n"
          "prompt: visible are j <= i with j < sinks or block(j) > block(i) - L_h / block\n"
          "steps after it: j < sinks or i - L_h < j <= i, which S_h slots of a cache hold",
      .cost = "N·(mean of S_h)·(D + Dv) multiply-adds",
      .causality = Causality::implied,
      .square = false,
      .params = {integer("block", 64, 1, "tokens per block, where windows of the prompt begin"),
                 integer("sink", 64, 0, "first tokens that every query sees, whole blocks"),
                 integer("min_span", 128, 1, "tokens that a head sees at least"),
                 integer("max_new_tokens", 0, 0, "tokens that will follow the prompt, counted in its length"),
                 number("alpha", 0, -1e300, 1e300, "tokens: the rule's constant, where no tensor gives it"),
                 number("beta", 0.5, 0, 1, "share of the length: the rule's slope, where no tensor gives it")},
      .extras = {{"alpha", real, {"Hk"}, false, "[Hk], constant of each KV head's span, tokens"},
                 {"beta", real, {"Hk"}, false, "[Hk], growth of each KV head's span per token of the length"}},
      .not_on_models = "",
      .plan = plan_moa,
      .fitted = true,
  };
  return m;
}

}  // namespace heed::mechanism
