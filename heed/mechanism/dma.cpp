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

// What the gate learned.
struct Learned {
  std::vector<double> a, b, w;  // [Hk], [Hk], and w_dt as [Hk·Dv, Hk]: for a value its share of every dt
};

Learned read_learned(const Inputs& in) {
  const Problem& p = in.problem;
  const Index width = p.Hk * p.Dv;
  const auto wide = [](const std::vector<float>& x) { return std::vector<double>(x.begin(), x.end()); };
  if (const Shape& shape = in.find("w_dt")->shape; shape[1] != width)
    fail("w_dt: shape = {}, expected [{}, {}], the KV heads by their values", to_string(shape), p.Hk, width);
  Learned learned{.a = wide(values_of(*in.find("a"))),
                  .b = std::vector<double>(static_cast<size_t>(p.Hk)),
                  .w = std::vector<double>(static_cast<size_t>(width * p.Hk))};
  if (const TensorView* bias = in.find("b_dt")) learned.b = wide(values_of(*bias));
  const std::vector<float> w = values_of(*in.find("w_dt"));
  for (Index g = 0; g < p.Hk; ++g)
    for (Index i = 0; i < width; ++i)
      learned.w[static_cast<size_t>(i * p.Hk + g)] = static_cast<double>(w[static_cast<size_t>(g * width + i)]);
  return learned;
}

// Step 1 for keys [first, end) of a batch: visit(key, values of all KV heads [Hk·Dv], dt [Hk]).
template <class Visit>
void for_keys(const Inputs& in, const Learned& learned, Index b, Index first, Index end, const Visit& visit) {
  const Problem& p = in.problem;
  std::vector<float> x(static_cast<size_t>(p.Hk * p.Dv));
  std::vector<double> dt(static_cast<size_t>(p.Hk));
  for (Index j = first; j < end; ++j) {
    for (Index g = 0; g < p.Hk; ++g) in.kv->read_value(b * p.Hk + g, j, x.data() + g * p.Dv);
    std::copy(learned.b.begin(), learned.b.end(), dt.begin());
    for (size_t i = 0; i < x.size(); ++i)
      for (size_t g = 0; g < dt.size(); ++g) dt[g] += learned.w[i * dt.size() + g] * static_cast<double>(x[i]);
    visit(j, x.data(), dt.data());
  }
}

double softplus(double t) { return std::max(t, 0.0) + std::log1p(std::exp(-std::fabs(t))); }

// Keys of a unit of work.
constexpr Index keys_at_once = 256;

// Steps 1 and 2. One vector per token: the values of all KV heads.
void score_keys(const Inputs& in, bool exponential, Gate& gate) {
  const Problem& p = in.problem;
  const Learned learned = read_learned(in);
  const Index units = ceil_div(p.M, keys_at_once);
  parallel_for(p.B * units, [&](Index unit, int) {
    const Index b = unit / units, first = unit % units * keys_at_once;
    for_keys(in, learned, b, first, std::min(p.M, first + keys_at_once), [&](Index j, const float*, const double* dt) {
      for (Index g = 0; g < p.Hk; ++g) {
        const double order = learned.a[static_cast<size_t>(g)] * softplus(dt[g]);
        const auto added = static_cast<float>(exponential ? std::exp(order) : order);
        if (!std::isfinite(added))
          fail("dma: gate of key {} in KV head {} = {}, expected a finite number", j, g, added);
        const size_t at = static_cast<size_t>((b * p.Hk + g) * p.M + j);
        gate.order[at] = order, gate.added[at] = added;
      }
    });
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

// Importance is added to scores, so its gradient is that of the keys' log-weights. From there to what the gate learned,
// and through dt to the values that the gate reads. Which keys are kept is constant, so a key that no query keeps gets
// nothing and cannot come back by itself.
void finish_gradient_dma(const Params& params, const Inputs& in, const Differentiated& done, AttendGradients& out) {
  const Problem& p = in.problem;
  const Index width = p.Hk * p.Dv, heads = p.Hk;
  const bool exponential = params.text("gate") == "exp";
  const Learned learned = read_learned(in);
  const float* dadded = done.gradients.sources[0].dlog_weight.as<float>();  // [B · Hk, M]
  // A unit's share of da, db and dw [Hk, 2 + width], added up in the units' order.
  const Index units = ceil_div(p.M, keys_at_once), all = p.B * units;
  std::vector<std::vector<double>> shares(static_cast<size_t>(all));
  parallel_for(all, [&](Index unit, int) {
    const Index b = unit / units, first = unit % units * keys_at_once;
    std::vector<double>& share = shares[static_cast<size_t>(unit)];
    share.assign(static_cast<size_t>(heads * (2 + width)), 0.0);
    for_keys(in, learned, b, first, std::min(p.M, first + keys_at_once),
             [&](Index j, const float* x, const double* dt) {
               for (Index g = 0; g < heads; ++g) {
                 const double a = learned.a[static_cast<size_t>(g)], open = softplus(dt[g]);
                 double dorder = static_cast<double>(dadded[(b * heads + g) * p.M + j]);
                 if (exponential) dorder *= std::exp(a * open);
                 const double ddt = dorder * a / (1 + std::exp(-dt[g]));
                 double* to = share.data() + g * (2 + width);
                 to[0] += dorder * open, to[1] += ddt;
                 for (Index i = 0; i < width; ++i) {
                   to[2 + i] += ddt * static_cast<double>(x[i]);
                   const double dx = ddt * learned.w[static_cast<size_t>(i * heads + g)];
                   out.dv.as<float>()[((b * heads + i / p.Dv) * p.M + j) * p.Dv + i % p.Dv] += static_cast<float>(dx);
                 }
               }
             });
  });
  Tensor da(DType::f32, {heads}), db(DType::f32, {heads}), dw(DType::f32, {heads, width});
  for (Index g = 0; g < heads; ++g) {
    const auto sum = [&](Index i) {
      double total = 0;
      for (const auto& share : shares) total += share[static_cast<size_t>(g * (2 + width) + i)];
      return static_cast<float>(total);
    };
    da.as<float>()[g] = sum(0), db.as<float>()[g] = sum(1);
    for (Index i = 0; i < width; ++i) dw.as<float>()[g * width + i] = sum(2 + i);
  }
  out.extra.emplace("a", std::move(da)), out.extra.emplace("w_dt", std::move(dw));
  if (in.find("b_dt") != nullptr) out.extra.emplace("b_dt", std::move(db));
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
      .extras = {{"w_dt", real, {"Hk", "*"}, true, "[Hk, Hk·Dv], the gate's weights", true},
                 {"a", real, {"Hk"}, true, "[Hk], the gate's factors", true},
                 {"b_dt", real, {"Hk"}, false, "[Hk], the gate's bias", true}},
      .not_on_models = "its gate must be trained with the model",
      .plan = plan_dma,
      .finish_gradient = finish_gradient_dma,
  };
  return m;
}

}  // namespace heed::mechanism
