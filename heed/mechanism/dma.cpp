// DMA: a gate gives every key one importance, from the values alone; a query attends to the `budget`
// visible keys of largest importance, which is added to its score.
// "Trainable Dynamic Mask Sparse Attention", arXiv:2508.02124.

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>

#include "heed/base/threads.h"
#include "heed/mechanism/extra.h"
#include "heed/mechanism/registry.h"

namespace heed::mechanism {
namespace {

// What the gate says of the keys of all batches and KV heads, [B · Hk, M].
struct Gate {
  std::vector<double> order;          // a · softplus(dt): both forms rank alike
  std::vector<float> added;           // to the score
  std::vector<std::int32_t> leaves;   // first position at which a key is no longer kept
};

// Steps 1 and 2. One vector per token: the values of all KV heads.
void score_keys(const Inputs& in, bool exponential, Gate& gate) {
  const Problem& p = in.problem;
  const Index width = p.Hk * p.Dv;
  if (const Shape& shape = in.find("w_dt")->shape; shape[1] != width)
    fail("w_dt: shape = {}, expected [{}, {}], the KV heads by their values", to_string(shape), p.Hk, width);
  const std::vector<float> a = values_of(*in.find("a")), w = values_of(*in.find("w_dt"));
  const std::vector<float> bias =
      in.find("b_dt") != nullptr ? values_of(*in.find("b_dt")) : std::vector<float>(a.size(), 0.0f);
  std::vector<double> columns(w.size());  // [width, Hk]
  for (Index g = 0; g < p.Hk; ++g)
    for (Index i = 0; i < width; ++i)
      columns[static_cast<size_t>(i * p.Hk + g)] = w[static_cast<size_t>(g * width + i)];

  constexpr Index at_once = 256;
  const Index units = ceil_div(p.M, at_once);
  parallel_for(p.B * units, [&](Index unit, int) {
    const Index b = unit / units, first = unit % units * at_once;
    std::vector<float> x(static_cast<size_t>(width));
    std::vector<double> dt(static_cast<size_t>(p.Hk));
    for (Index j = first; j < std::min(p.M, first + at_once); ++j) {
      for (Index g = 0; g < p.Hk; ++g) in.kv->read_value(b * p.Hk + g, j, x.data() + g * p.Dv);
      std::copy(bias.begin(), bias.end(), dt.begin());
      for (Index i = 0; i < width; ++i)
        for (size_t g = 0; g < dt.size(); ++g)
          dt[g] += columns[static_cast<size_t>(i) * dt.size() + g] * static_cast<double>(x[static_cast<size_t>(i)]);
      for (Index g = 0; g < p.Hk; ++g) {
        const double t = dt[static_cast<size_t>(g)], softplus = std::max(t, 0.0) + std::log1p(std::exp(-std::fabs(t)));
        const double order = static_cast<double>(a[static_cast<size_t>(g)]) * softplus;
        const auto added = static_cast<float>(exponential ? std::exp(order) : order);
        if (!std::isfinite(added))
          fail("dma: gate of key {} in KV head {} = {}, expected a finite number", j, g, added);
        const size_t at = static_cast<size_t>((b * p.Hk + g) * p.M + j);
        gate.order[at] = order, gate.added[at] = added;
      }
    }
  });
}

// Step 3. A key that has `keep` better ones before it never returns, as importance does not change: one
// heap finds out when each leaves. Among equals the newer stays.
void find_leaving(const double* order, Index n, Index keep, std::int32_t* leaves) {
  const auto better = [order](std::int32_t i, std::int32_t j) {
    return order[i] != order[j] ? order[i] > order[j] : i > j;
  };
  std::vector<std::int32_t> heap;  // the worst in front
  heap.reserve(static_cast<size_t>(keep + 1));
  std::fill_n(leaves, n, std::numeric_limits<std::int32_t>::max() - 1);
  for (Index t = 0; t < n; ++t) {
    heap.push_back(static_cast<std::int32_t>(t));
    std::push_heap(heap.begin(), heap.end(), better);
    if (static_cast<Index>(heap.size()) <= keep) continue;
    std::pop_heap(heap.begin(), heap.end(), better);
    leaves[heap.back()] = static_cast<std::int32_t>(t);
    heap.pop_back();
  }
}

Plan plan_dma(const Params& p, const Inputs& in) {
  const Problem problem = in.problem;
  const bool keep_self = p.boolean("keep_self");
  const Index lanes = problem.B * problem.Hk, keys = problem.M, budget = std::min(p.integer("budget"), keys);
  const auto gate = std::make_shared<Gate>();
  gate->order.resize(static_cast<size_t>(lanes * keys));
  gate->added.resize(static_cast<size_t>(lanes * keys));
  gate->leaves.resize(static_cast<size_t>(lanes * keys));
  score_keys(in, p.text("gate") == "exp", *gate);
  parallel_for(lanes, [&](Index lane, int) {
    std::int32_t* leaves = gate->leaves.data() + lane * keys;
    // A query that always keeps its own key has one place less for the earlier ones, and a key that
    // loses its place there has been seen by its own query.
    find_leaving(gate->order.data() + lane * keys, keys, keep_self ? budget - 1 : budget, leaves);
    if (keep_self) std::for_each(leaves, leaves + keys, [](std::int32_t& t) { ++t; });
  });

  Plan plan = make_plan(problem, in.q, *in.kv, in.rule, Lanes::per_kv_head);
  for (Index lane = 0; lane < lanes; ++lane)
    plan.sources[0].views[static_cast<size_t>(lane)].log_weight = gate->added.data() + lane * keys;
  plan.keep = {gate};

  plan.emit = [=, gate = gate.get()](const RowBlock& rows, Tiles& tiles) {
    const std::int32_t* leaves = gate->leaves.data() + (rows.b * problem.Hk + rows.kv_head) * keys;
    const Index first = rows.position(0), last = rows.position(rows.rows - 1);
    const Set all = Set::range(0, rows.rows);
    if (last < budget) {
      tiles.add(all, Set::range(0, last + 1), Mask::causal());
      return;
    }
    // Keys kept when the block begins and keys that it brings: chosen by the past alone, so that no
    // bit of a row depends on a later key. Bits say until when each is kept.
    const auto kept = [&](Index j) { return leaves[j] > first; };
    Index count = 0;
    for (Index j = 0; j <= first; ++j) count += kept(j) ? 1 : 0;
    const auto held = tiles.take<std::int32_t>(count);
    const Index words = ceil_div(count, 64), fresh = last - first, fresh_words = ceil_div(fresh, 64);
    const auto held_bits = tiles.take<std::uint64_t>(rows.rows * words);
    const auto fresh_bits = tiles.take<std::uint64_t>(rows.rows * fresh_words);
    std::fill(held_bits.begin(), held_bits.end(), ~std::uint64_t{0});
    std::fill(fresh_bits.begin(), fresh_bits.end(), 0);
    Index c = 0;
    for (Index j = 0; j <= first; ++j) {
      if (!kept(j)) continue;
      for (Index t = leaves[j]; t <= last; ++t)
        held_bits[static_cast<size_t>((t - first) * words + c / 64)] &= ~(std::uint64_t{1} << (c % 64));
      held[static_cast<size_t>(c++)] = static_cast<std::int32_t>(j);
    }
    for (Index i = 0; i < fresh; ++i)
      for (Index j = first + 1 + i, t = j; t < std::min<Index>(leaves[j], last + 1); ++t)
        fresh_bits[static_cast<size_t>((t - first) * fresh_words + i / 64)] |= std::uint64_t{1} << (i % 64);
    tiles.add(all, Set::list(held), Mask::bits(held_bits.data(), words));
    tiles.add(all, Set::range(first + 1, last + 1), Mask::bits(fresh_bits.data(), fresh_words));
  };
  return plan;
}

}  // namespace

const Mechanism& dma() {
  static const std::vector<DType> real{DType::f32, DType::f16, DType::bf16};
  static const Mechanism m{
      .name = "dma",
      .title = "DMA: dynamic mask attention",
      .paper = "arXiv:2508.02124",
      .year = 2025,
      .stage = "select, gate, attend",
      .training = Training::required,
      .idea =
          "A trained gate reads the values of all KV heads and gives each key one importance per KV head, for every\n"
          "query the same. A query keeps the `budget` most important keys so far and adds the importance to its "
          "scores.\n"
          "A key once dropped never comes back, so a cache of `budget` slots is enough.",
      .equations = "dt_gj = w_dt[g]·concat_h(v_hj) + b_dt[g];  delta_gj = exp(a_g·softplus(dt_gj)), or "
                   "a_g·softplus(dt_gj) (linear)\n"
                   "I_t = the `budget` keys j <= t of largest delta_gj, the newer among equals\n"
                   "o_t = softmax over j in I_t of scale·<q_t, k_j> + delta_gj, times v_j",
      .cost = "M·Hk²·Dv multiply-adds for the gate, M·log(budget) to select, N·budget·(D + Dv) to attend",
      .causality = Causality::implied,
      .square = false,
      .params = {integer("budget", 2048, 1, "keys that a query keeps"),
                 choice("gate", "exp", {"exp", "linear"}, "importance is exp of the gate's output, or the output"),
                 boolean("keep_self", false, "a query keeps its own key, whatever its importance")},
      .extras = {{"w_dt", real, {"Hk", "*"}, true, "[Hk, Hk·Dv], the gate's weights"},
                 {"a", real, {"Hk"}, true, "[Hk], the gate's factors"},
                 {"b_dt", real, {"Hk"}, false, "[Hk], the gate's bias"}},
      .not_on_models = "its gate must be trained with the model",
      .plan = plan_dma,
  };
  return m;
}

}  // namespace heed::mechanism
