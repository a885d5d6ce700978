#include "heed/nn/fit_spans.h"

#include <ATen/ops/cross_entropy_loss.h>
#include <ATen/ops/tensor.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <span>

#include "heed/exec/influence.h"
#include "heed/nn/gguf.h"
#include "heed/nn/tensors.h"
#include "heed/plan/span_rules.h"

namespace heed::nn {
namespace {

constexpr Index slice = 256;  // rows of logits at a time: a vocabulary of floats each

// d(mean loss)/d(hidden) [1, N, W], without the logits of more than a few rows.
at::Tensor output_gradient(const LanguageModel& model, const at::Tensor& hidden, const at::Tensor& tokens) {
  const at::Tensor rows = hidden.detach().requires_grad_();
  const Index n = tokens.size(1) - 1;
  for (Index first = 0; first < n; first += slice) {
    const Index count = std::min(slice, n - first);
    const at::Tensor logits = model.output(rows.narrow(1, first, count)).flatten(0, 1);
    const at::Tensor targets = tokens.narrow(1, first + 1, count).flatten();
    (at::cross_entropy_loss(logits, targets, {}, at::Reduction::Sum) / static_cast<double>(n)).backward();
  }
  return rows.grad();
}

// What heads of one layer lose by each rule: [heads, rules] added to `loss`.
void add_losses(const at::Tensor& map, const std::vector<SpanRule>& rules, Index tokens, Index block, Index group,
                double share, double* loss) {
  // A KV head keeps what any of its query heads needs.
  const at::Tensor heads = map.unflatten(0, {-1, group}).amax(1).contiguous();
  const Index n = heads.size(1);
  for (Index h = 0; h < heads.size(0); ++h)
    for (size_t r = 0; r < rules.size(); ++r)
      loss[static_cast<size_t>(h) * rules.size() + r] +=
          share * lost_influence(std::span(heads.const_data_ptr<float>() + h * n * n, static_cast<size_t>(n * n)),
                                 rules[r], tokens, block);
}

// The best rule that every head could have alike, or -1: costs keep to the budget at every length.
Index best_common_rule(const RuleProblem& p) {
  Index best = -1;
  double least = std::numeric_limits<double>::infinity();
  for (Index r = 0; r < p.rules; ++r) {
    bool fits = true;
    for (size_t k = 0; k < p.most.size(); ++k)
      fits = fits && p.cost[k][static_cast<size_t>(r)] * p.layers * p.heads <= p.most[k];
    double sum = 0;
    for (Index h = 0; h < p.layers * p.heads; ++h) sum += p.loss[static_cast<size_t>(h * p.rules + r)];
    if (fits && sum < least) least = sum, best = r;
  }
  return best;
}

// The smallest share of the blocks there are, blocks[k] at length k, that some rule keeps at its worst length.
double least_density(const RuleProblem& p, const std::vector<Index>& blocks) {
  double least = 1;
  for (size_t r = 0; r < static_cast<size_t>(p.rules); ++r) {
    double share = 0;
    for (size_t k = 0; k < blocks.size(); ++k)
      share = std::max(share, static_cast<double>(p.cost[k][r]) / static_cast<double>(blocks[k]));
    least = std::min(least, share);
  }
  return least;
}

Tensor tensor_of(const std::vector<float>& values) {
  Tensor t(DType::f32, {static_cast<Index>(values.size())});
  std::copy(values.begin(), values.end(), t.as<float>());
  return t;
}

}  // namespace

std::map<Index, at::Tensor> influence_of(LanguageModel& model, const at::Tensor& tokens,
                                         const std::vector<Index>& layers, Index block) {
  if (tokens.size(1) < 2) fail("tokens: {}, expected at least 2", tokens.size(1));
  std::map<Index, AttentionPass> passes;
  const auto forget = [&] {
    for (const Index layer : layers) model.layer(layer).attention().observe({});
  };
  for (const Index layer : layers)
    model.layer(layer).attention().observe([&, layer](const AttentionPass& pass) {
      // Where nothing before this needs a gradient, the graph begins here.
      if (pass.o.requires_grad()) pass.o.retain_grad();
      else pass.o.requires_grad_();
      passes[layer] = pass;
    });
  try {
    const at::Tensor hidden = model.hidden(tokens);
    hidden.backward(output_gradient(model, hidden, tokens));
  } catch (...) {
    forget();
    throw;
  }
  forget();
  std::map<Index, at::Tensor> maps;
  for (auto& [layer, pass] : passes) {
    const at::Tensor q = pass.q.detach(), k = pass.k.detach(), v = pass.v.detach(), o = pass.o.detach(),
                     dout = pass.o.grad(), lse = pass.lse.detach();
    const auto scale = static_cast<float>(1 / std::sqrt(static_cast<double>(q.size(3))));
    const Tensor map =
        influence_map({view_of(q), view_of(k), view_of(v), view_of(o), view_of(dout), view_of(lse), scale}, block);
    maps.emplace(layer, torch_copy(map.view())[0]);
    pass = {};
  }
  return maps;
}

Fitted fit_spans(const model::Gguf& file, const model::MechanismUse& use, const Pieces& pieces, double density,
                 const FitProgress& progress) {
  const Mechanism& m = find_mechanism("moa");
  const Params params(m.name, m.params, use.call.params);
  for (const char* name : {"alpha", "beta"})
    if (params.given(name)) fail_usage("moa: {} = {}, expected none where rules are fitted", name, params.text(name));
  const Index block = params.integer("block"), length = pieces.empty() ? 0 : static_cast<Index>(pieces.front().size());
  if (length < 32 * block) fail("pieces of {} tokens, expected at least 32 blocks of {}", length, block);
  const auto model = read_model(file, {});
  for (const auto& [name, parameter] : parameters_of(*model)) parameter.requires_grad_(false);
  const model::ModelInfo& info = model->info();
  std::vector<Index> layers = use.layers;
  if (layers.empty())
    for (Index i = 0; i < info.layers; ++i)
      if (!info.local[static_cast<size_t>(i)]) layers.push_back(i);

  // Twice as fine as the authors': a small density leaves few of their rules.
  const RuleGrid grid{
      .shortest = length / 2, .longest = length, .extended = 2 * length, .alpha_step = length / 16, .betas = 17};
  std::vector<SpanRule> rules = candidate_rules(grid);
  std::erase_if(rules, [](const SpanRule& rule) { return rule.alpha < 0; });
  RuleProblem problem{.layers = static_cast<Index>(layers.size()),
                      .heads = info.kv_heads,
                      .rules = static_cast<Index>(rules.size()),
                      .least_share = 0};  // see the header
  const Index per_layer = problem.heads * problem.rules;
  problem.loss.assign(static_cast<size_t>(problem.layers * per_layer), 0);
  std::vector<Index> blocks;
  for (const Index tokens : {length / 2, length, 2 * length}) {
    std::vector<Index>& cost = problem.cost.emplace_back();
    for (const SpanRule& rule : rules) cost.push_back(kept_blocks(rule, tokens, block));
    blocks.push_back(ceil_div(tokens, block));
    const auto all = static_cast<double>(blocks.back() * problem.layers * problem.heads);
    problem.most.push_back(static_cast<Index>(density * all + 1e-9));
  }

  // A budget that no choice meets should be known before anything is read.
  if (const double least = least_density(problem, blocks); density < least)
    fail_usage("moa: density = {}, expected at least {:.3g} for pieces of {} tokens", density, least, length);
  const auto count = static_cast<Index>(pieces.size());
  const std::vector<Index> lengths{length / 2, length};
  Index done = 0;
  for (const std::vector<model::Token>& piece : pieces)
    for (const Index tokens : lengths) {
      say(progress, "reading", done++, count * static_cast<Index>(lengths.size()));
      const std::vector<std::int64_t> ids(piece.begin(), piece.begin() + tokens);
      const auto maps = influence_of(*model, at::tensor(ids, at::kLong).unsqueeze(0), layers, block);
      for (size_t i = 0; i < layers.size(); ++i)
        add_losses(maps.at(layers[i]), rules, tokens, block, info.heads / info.kv_heads, 1 / static_cast<double>(count),
                   problem.loss.data() + static_cast<Index>(i) * per_layer);
    }
  say(progress, "choosing", done, done);
  const std::vector<Index> chosen = choose_rules(problem);

  Fitted fitted;
  fitted.measure = "influence of what is hidden, sums of |E| a layer; before: one rule for all heads";
  fitted.calibration.mechanism = m.name, fitted.calibration.params = use.call.params;
  fitted.calibration.model = info.architecture + " " + info.name;
  const Index common = best_common_rule(problem);
  for (size_t i = 0; i < layers.size(); ++i) {
    std::vector<float> alpha, beta;
    Fitted::Layer sums{.layer = layers[i]};
    for (Index h = 0; h < problem.heads; ++h) {
      const size_t at = i * static_cast<size_t>(problem.heads) + static_cast<size_t>(h);
      const double* loss = problem.loss.data() + static_cast<Index>(at) * problem.rules;
      const SpanRule& rule = rules[static_cast<size_t>(chosen[at])];
      alpha.push_back(static_cast<float>(rule.alpha)), beta.push_back(static_cast<float>(rule.beta));
      sums.after += loss[chosen[at]];
      sums.before += common < 0 ? std::numeric_limits<double>::quiet_NaN() : loss[common];
    }
    fitted.layers.push_back(sums);
    NamedTensors& named = fitted.calibration.layers[layers[i]];
    named.emplace("alpha", tensor_of(alpha)), named.emplace("beta", tensor_of(beta));
  }
  return fitted;
}

}  // namespace heed::nn
