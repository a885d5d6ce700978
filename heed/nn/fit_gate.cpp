#include "heed/nn/fit_gate.h"

#include <ATen/ops/eye.h>
#include <ATen/ops/full.h>
#include <ATen/ops/index_select.h>
#include <ATen/ops/log_softmax.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/xlogy.h>
#include <ATen/ops/zeros.h>
#include <c10/core/GradMode.h>

#include <cmath>
#include <limits>

#include "heed/base/random.h"
#include "heed/mechanism/attend.h"
#include "heed/nn/layers.h"
#include "heed/nn/optimizer.h"
#include "heed/nn/tensors.h"

namespace heed::nn {
namespace {

// The pieces of a step: any, but no piece twice while there are others.
at::Tensor pieces_of(Index step, Index pieces, const FitOptions& options) {
  Random random(Random(options.seed).next() + static_cast<std::uint64_t>(step));
  std::vector<std::int64_t> order;
  for (Index i = 0; i < pieces; ++i) order.push_back(i);
  const Index count = std::min(options.batch, pieces);
  for (Index i = 0; i < count; ++i)
    std::swap(order[static_cast<size_t>(i)], order[static_cast<size_t>(i + random.below(pieces - i))]);
  order.resize(static_cast<size_t>(count));
  return at::tensor(order, at::kLong);
}

}  // namespace

at::Tensor gate_logits(const at::Tensor& q_means, const at::Tensor& key_pools, const at::Tensor& wk, Index block,
                       double rope_base) {
  const Index heads = q_means.size(1), n = q_means.size(2), width = wk.size(2), group = heads / key_pools.size(1);
  at::Tensor q = q_means, k = at::matmul(key_pools.repeat_interleave(group, 1), wk);
  if (rope_base > 0) {
    Rotary rotary(width, rope_base, model::RopePairs::halves, block);  // a block stands where its first token stands
    q = rotary.turn(q), k = rotary.turn(k);
  }
  const at::Tensor later = at::ones({n, n}, at::kBool).triu(1);
  return (at::matmul(q, k.transpose(-1, -2)) / std::sqrt(static_cast<double>(width)))
      .masked_fill(later, -std::numeric_limits<double>::infinity());
}

at::Tensor gate_loss(const at::Tensor& logits, const at::Tensor& targets) {
  const Index n = logits.size(2), first = n / 4;
  const at::Tensor t = targets.narrow(2, first, n - first), later = at::ones({n, n}, at::kBool).triu(1);
  // 0·log 0 = 0, on both sides.
  const at::Tensor log_gate = at::log_softmax(logits, -1).masked_fill(later, 0.0).narrow(2, first, n - first);
  return (at::xlogy(t, t) - t * log_gate).sum(-1).mean();
}

at::Tensor mean_gate(Index heads, Index head_size) {
  const at::Tensor wk = at::zeros({heads, 3 * head_size, head_size}, at::kFloat);
  wk.narrow(1, 2 * head_size, head_size).copy_(at::eye(head_size, at::kFloat));  // [max; min; mean]
  return wk;
}

GateFit fit_gate(const GateData& data, Index block, double rope_base, const FitOptions& options,
                 const FitProgress& progress) {
  at::Tensor wk = mean_gate(data.q_means.size(1), data.q_means.size(3)).requires_grad_();
  OptimizerOptions adamw;
  adamw.weight_decay = 0;
  Optimizer optimizer({{"wk", wk}}, adamw);
  std::vector<double> losses;
  for (Index step = 0; step < options.steps; ++step) {
    say(progress, "gate", step, options.steps);
    const at::Tensor some = pieces_of(step, data.q_means.size(0), options);
    const auto of = [&](const at::Tensor& x) { return at::index_select(x, 0, some); };
    const at::Tensor loss =
        gate_loss(gate_logits(of(data.q_means), of(data.key_pools), wk, block, rope_base), of(data.targets));
    losses.push_back(loss.item<double>());
    loss.backward();
    optimizer.step(options.lr * rate_share(step, options.steps, options.warmup, 0));
  }
  return {wk.detach(), std::move(losses)};
}

Fitted fit_gates(const model::Model& model, const model::MechanismUse& use, const Pieces& pieces, Index chunk, DType kv,
                 const FitOptions& options, const FitProgress& progress) {
  const Mechanism& m = find_mechanism("seer-attention");
  const Params params(m.name, m.params, use.call.params);
  const Index block = params.integer("block"), count = static_cast<Index>(pieces.size());
  const Index tokens = pieces.empty() ? 0 : static_cast<Index>(pieces.front().size());
  const double rope_base = params.number("rope_base");
  if (params.boolean("oracle")) fail_usage("seer-attention: oracle = true, expected false where a gate is fitted");
  if (rope_base > 0 && model.info().head_size % 2 != 0)
    fail_usage("seer-attention: rope_base = {}, expected 0 where the gate's width {} is odd", rope_base,
               model.info().head_size);
  if (tokens < 2 * block) fail("pieces of {} tokens, expected at least two blocks of {}", tokens, block);

  // Layers are independent of one another, so all is read before anything is fitted.
  std::map<Index, std::vector<NamedTensors>> seen;
  Fitted fitted;
  fitted.calibration =
      read_pieces(model, use, pieces, chunk, kv, progress,
                  [&](Index, Index layer, NamedTensors tensors) { seen[layer].push_back(std::move(tensors)); });

  Index done = 0;
  for (auto& [layer, list] : seen) {
    const auto stacked = [&](const char* name, Index begin, Index end) {
      std::vector<at::Tensor> some;
      for (Index i = begin; i < end; ++i) some.push_back(torch_copy(list[static_cast<size_t>(i)].at(name).view()));
      return at::stack(some);
    };
    const auto data = [&](Index begin, Index end) -> GateData {
      return {stacked("q_means", begin, end), stacked("key_pools", begin, end), stacked("targets", begin, end)};
    };
    const GateData trained = data(0, std::max<Index>(1, count - 1)), held_out = data(count - 1, count);
    list.clear();
    const auto hear = [&](const std::string&, Index step, Index steps) {
      say(progress, fmt::format("layer {}", layer), done * steps + step, static_cast<Index>(seen.size()) * steps);
      return true;
    };
    const at::Tensor wk = fit_gate(trained, block, rope_base, options, hear).wk;
    ++done;
    const auto loss = [&](const at::Tensor& gate) {
      const c10::NoGradGuard frozen;
      return gate_loss(gate_logits(held_out.q_means, held_out.key_pools, gate, block, rope_base), held_out.targets)
          .item<double>();
    };
    fitted.layers.push_back({layer, loss(mean_gate(wk.size(0), wk.size(2))), loss(wk)});
    fitted.calibration.layers[layer].emplace("wk", heed_copy(wk));
  }
  fitted.measure = "KL of the gate to the model's attention, nats a row";
  keep_params(fitted.calibration, params, {"block", "rope_base"});
  return fitted;
}

}  // namespace heed::nn
