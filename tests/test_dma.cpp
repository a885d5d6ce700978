// dma against its equations: a gate on values, the most important visible keys, importance in the scores.
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>
#include <set>

#include "heed/kernel/kernels.h"
#include "support/differences.h"
#include "support/gradients.h"

using namespace heed;
using namespace heed::test;

namespace {

struct DmaGate {
  std::vector<float> w, a, b;  // [Hk, Hk·Dv], [Hk], [Hk] or nothing
  DmaGate(const Sizes& s, std::uint64_t seed, bool bias = true) {
    std::mt19937_64 random(seed);
    std::normal_distribution<float> normal;
    for (Index i = 0; i < s.Hk * s.Hk * s.Dv; ++i) w.push_back(0.3f * normal(random));
    for (Index g = 0; g < s.Hk; ++g) a.push_back(normal(random));
    for (Index g = 0; g < s.Hk && bias; ++g) b.push_back(normal(random));
  }
};

struct DmaOptions {
  Index budget = 40;
  bool linear = false, keep_self = false;
  std::string call() const {
    return fmt::format("dma:budget={},gate={},keep_self={}", budget, linear ? "linear" : "exp", keep_self);
  }
};

AttendInput with(const Case& c, const DmaGate& gate) {
  AttendInput in = c.input();
  in.extra["w_dt"] = {gate.w.data(), DType::f32, {c.size.Hk, c.size.Hk * c.size.Dv}};
  in.extra["a"] = {gate.a.data(), DType::f32, {c.size.Hk}};
  if (!gate.b.empty()) in.extra["b_dt"] = {gate.b.data(), DType::f32, {c.size.Hk}};
  return in;
}

// What a key of a KV head adds to scores, and what it is ranked by.
double importance(const Case& c, const DmaGate& gate, Index b, Index g, Index j, bool linear) {
  double dt = gate.b.empty() ? 0 : static_cast<double>(gate.b[static_cast<size_t>(g)]);
  for (Index h = 0; h < c.size.Hk; ++h)
    for (Index e = 0; e < c.size.Dv; ++e)
      dt += static_cast<double>(gate.w[static_cast<size_t>((g * c.size.Hk + h) * c.size.Dv + e)]) * c.v_at(b, h, j, e);
  const double x = static_cast<double>(gate.a[static_cast<size_t>(g)]) * std::log(1 + std::exp(dt));
  return linear ? x : std::exp(x);
}

// Keys 0 … t by falling importance, the newer first among equals; the first `budget` of them. With keep_self
// the own key counts as the most important.
std::set<Index> kept(const std::vector<double>& delta, Index t, const DmaOptions& o, double* margin = nullptr) {
  std::vector<Index> order;
  for (Index j = t; j >= 0; --j) order.push_back(j);
  const auto rank = [&](Index j) { return o.keep_self && j == t ? INFINITY : delta[static_cast<size_t>(j)]; };
  std::stable_sort(order.begin(), order.end(), [&](Index i, Index j) { return rank(i) > rank(j); });
  const size_t keep = std::min(order.size(), static_cast<size_t>(o.budget));
  if (margin != nullptr) *margin = keep < order.size() ? rank(order[keep - 1]) - rank(order[keep]) : INFINITY;
  return {order.begin(), order.begin() + static_cast<std::ptrdiff_t>(keep)};
}

void check_dma(const Case& c, const DmaGate& gate, const DmaOptions& o) {
  const auto& s = c.size;
  const std::string call = o.call();
  CAPTURE(call);
  std::vector<std::vector<double>> delta;
  for (Index b = 0; b < s.B; ++b)
    for (Index g = 0; g < s.Hk; ++g) {
      auto& x = delta.emplace_back();
      for (Index j = 0; j < s.M; ++j) x.push_back(importance(c, gate, b, g, j, o.linear));
    }
  std::vector<std::set<Index>> sets;  // [B, Hk, N]
  std::vector<char> near;
  for (const auto& x : delta)
    for (Index t = 0; t < s.N; ++t) {
      double margin;
      sets.push_back(kept(x, position(c, t), o, &margin));
      near.push_back(margin < 1e-6 * std::max(1.0, std::fabs(x[static_cast<size_t>(*sets.back().begin())])) ? 1 : 0);
    }
  const auto lane = [&](Index b, Index h) { return b * s.Hk + c.kv_head(h); };
  NaiveOptions options;
  options.change = [&](Index b, Index h, Index, Index j, double score) {
    return score + delta[static_cast<size_t>(lane(b, h))][static_cast<size_t>(j)];
  };
  Naive want = naive_attention(
      c,
      [&](Index b, Index h, Index t, Index j) { return sets[static_cast<size_t>(lane(b, h) * s.N + t)].count(j) != 0; },
      options);
  Index undecided = 0;
  for (Index b = 0; b < s.B; ++b)
    for (Index h = 0; h < s.Hq; ++h)
      for (Index t = 0; t < s.N; ++t) {
        want.undecided.push_back(near[static_cast<size_t>(lane(b, h) * s.N + t)]);
        undecided += want.undecided.back();
      }
  const Got got = run(call, with(c, gate));
  CHECK_AGREES(got, want, c);
  CHECK(got.stats.pairs == want.pairs);
  CHECK(undecided * 5 <= static_cast<Index>(want.undecided.size()));
}

// One KV head whose importance is exactly `delta`: v is one number, softplus(dt) = delta.
Case with_importance(const std::vector<double>& delta, Index n) {
  const Index m = static_cast<Index>(delta.size());
  Case c({1, 1, 1, n, m, 16, 1});
  for (Index j = 0; j < m; ++j) c.v.set(0, 0, j, 0, std::log(std::expm1(delta[static_cast<size_t>(j)])));
  return c;
}

}  // namespace

TEST_CASE("dma equals its equations") {
  for (const std::string& isa : available_isas()) {
    const UseIsa use(isa);
    for (const DType arithmetic : {DType::f32, DType::bf16})
      for (const bool linear : {false, true})
        for (const Index n : {1, 39, 40, 41, 300}) {
          const Case c({1, 4, 2, n, n, 33, 16}, DType::f32, arithmetic);
          check_dma(c, DmaGate(c.size, 5), {.linear = linear});
        }
    const Case batch({2, 4, 4, 259, 259, 64, 40}, DType::f32, DType::f32, Layout::tokens);
    check_dma(batch, DmaGate(batch.size, 6, false), {.budget = 100});
    const Case past({1, 8, 2, 70, 611, 16, 24}, DType::bf16, DType::bf16);
    check_dma(past, DmaGate(past.size, 7), {.budget = 130});
    const Case one({1, 4, 1, 1, 411, 80, 16}, DType::f16);
    check_dma(one, DmaGate(one.size, 8), {.budget = 64, .linear = true});
  }
}

TEST_CASE("dma: budgets, and the own key kept") {
  const Case c({1, 2, 2, 300, 350, 24, 16});
  for (const Index budget : {1, 2, 64, 299, 350, 5000})
    for (const bool keep_self : {false, true})
      for (const std::uint64_t seed : {3, 4})
        check_dma(c, DmaGate(c.size, seed), {.budget = budget, .keep_self = keep_self});
}

TEST_CASE("dma with room for all keys is dense with a bias per key") {
  const Case c({1, 4, 2, 300, 333, 32, 32});
  DmaGate gate(c.size, 2);
  check_dma(c, gate, {.budget = 333});
  // Without a factor all keys are equally important: dense attention; exp adds 1 to every score.
  gate.a.assign(2, 0.0f);
  for (const bool linear : {false, true}) {
    NaiveOptions options;
    options.change = [&](Index, Index, Index, Index, double score) { return score + (linear ? 0 : 1); };
    const Naive dense = naive_attention(c, dense_sees(c, true), options);
    const Got got = run(DmaOptions{.budget = 400, .linear = linear}.call(), with(c, gate));
    const std::string differs = difference(got, dense, c, 1e-5);
    CHECK_MESSAGE(differs.empty(), differs);
  }
}

TEST_CASE("dma among equal keys prefers the newer: a sliding window") {
  const Case c({1, 2, 1, 280, 300, 16, 16});
  DmaGate gate(c.size, 2);
  gate.a[0] = 0;
  const Naive window = naive_attention(c, streaming_sees(c, 0, 37));
  CHECK_AGREES(run("dma:budget=37,gate=linear", with(c, gate)), window, c);
  CHECK_AGREES(run("dma:budget=37,gate=linear,keep_self=true", with(c, gate)), window, c);
}

TEST_CASE("dma: a cache of `budget` slots holds what the full cache would choose") {
  constexpr Index m = 700, n = 650;
  std::mt19937_64 random(3);
  for (const std::string order : {"random", "coarse", "equal", "rising", "falling"}) {
    CAPTURE(order);
    std::vector<double> delta;
    for (Index j = 0; j < m; ++j)
      delta.push_back(order == "random"   ? 0.1 + static_cast<double>(random() % 100000) * 1e-4
                      : order == "coarse" ? 1 + static_cast<double>(random() % 5)
                      : order == "equal"  ? 2
                      : order == "rising" ? 0.5 + static_cast<double>(j) * 0.01
                                          : 0.5 + static_cast<double>(m - j) * 0.01);
    const Case c = with_importance(delta, n);
    DmaGate gate(c.size, 1, false);
    gate.w = {1};
    for (const float a : {1.0f, -1.0f})  // a < 0 reverses the order
      for (const bool keep_self : {false, true})
        for (const Index budget : {1, 50, 256}) {
          gate.a = {a};
          // The order as the tensors give it, rounding included, equal where they are equal.
          std::vector<double> ranked;
          for (Index j = 0; j < m; ++j) ranked.push_back(static_cast<double>(a) * c.v_at(0, 0, j, 0));
          const DmaOptions o{.budget = budget, .linear = true, .keep_self = keep_self};
          const AttendInput in = with(c, gate);
          const Plan plan = plan_of(MechanismCall::parse(o.call()), in);
          Index wrong = 0;
          // The cache: slots that are overwritten in place.
          std::vector<Index> slots;
          const size_t room = static_cast<size_t>(keep_self ? budget - 1 : budget);
          std::vector<std::set<Index>> streamed;
          for (Index t = 0; t < m; ++t) {
            std::set<Index> now(slots.begin(), slots.end());
            now.insert(t);
            if (slots.size() < room) {
              slots.push_back(t);
            } else if (room > 0) {
              const auto worst = std::min_element(slots.begin(), slots.end(), [&](Index i, Index j) {
                return ranked[static_cast<size_t>(i)] != ranked[static_cast<size_t>(j)]
                           ? ranked[static_cast<size_t>(i)] < ranked[static_cast<size_t>(j)]
                           : i < j;
              });
              if (ranked[static_cast<size_t>(*worst)] <= ranked[static_cast<size_t>(t)]) *worst = t;
            }
            streamed.push_back(keep_self ? now : std::set<Index>(slots.begin(), slots.end()));
          }
          walk(plan, [&](const RowBlock& rows, const std::vector<Tile>& tiles) {
            for (Index i = 0; i < rows.rows; i += 13) {
              std::multiset<Index> seen;
              for (const Tile& tile : tiles)
                for (Index r = 0; r < tile.columns.count; ++r)
                  if (sees(plan, rows, tile, i, r)) seen.insert(tile.columns[r]);
              const std::set<Index> want = kept(ranked, rows.position(i), o);
              wrong +=
                  std::vector<Index>(seen.begin(), seen.end()) != std::vector<Index>(want.begin(), want.end()) ? 1 : 0;
              wrong += want != streamed[static_cast<size_t>(rows.position(i))] ? 1 : 0;
            }
          });
          CHECK(wrong == 0);
        }
  }
}

TEST_CASE("dma: no output depends on a later token, whatever its importance") {
  for (const std::string& isa : available_isas()) {
    const UseIsa use(isa);
    const Case c({1, 2, 2, 280, 300, 16, 16});
    const DmaGate gate(c.size, 9);
    for (const std::string call : {"dma:budget=40", "dma:budget=40,gate=linear,keep_self=true"}) {
      const Got before = run(call, with(c, gate));
      for (const Index t : {0, 11, 130, 255, 270}) {
        Case changed = c;
        for (Index h = 0; h < 2; ++h)
          for (Index j = position(c, t) + 1; j < 300; ++j)
            for (Index d = 0; d < 16; ++d) {
              changed.k.set(0, h, j, d, 20);
              changed.v.set(0, h, j, d, 3 * c.v.get(0, h, j, d) + 1);
            }
        const Got after = run(call, with(changed, gate));
        for (Index h = 0; h < 2; ++h)
          CHECK(std::memcmp(&before.o[static_cast<size_t>(h * 280 * 16)], &after.o[static_cast<size_t>(h * 280 * 16)],
                            static_cast<size_t>(t + 1) * 64) == 0);
      }
    }
  }
}

TEST_CASE("dma: the same bits for any number of threads") {
  for (const std::string& isa : available_isas()) {
    const UseIsa use(isa);
    for (const Sizes& s : {Sizes{2, 4, 2, 600, 600, 16, 16}, Sizes{1, 4, 1, 1, 3000, 32, 32}}) {
      const Case c(s);
      const DmaGate gate(s, 4);
      Got first;
      for (const int n : {1, 2, 3}) {
        const UseThreads threads(n);
        const Got got = run("dma:budget=100", with(c, gate));
        if (n == 1) first = got;
        CHECK(same_bits(got.o, first.o));
        CHECK(same_bits(got.lse, first.lse));
      }
    }
  }
}

TEST_CASE("dma refuses what it cannot mean") {
  const Case c({1, 2, 2, 8, 8, 16, 16});
  DmaGate gate(c.size, 1);
  CHECK_FAILS(run("dma:budget=0", with(c, gate)), UsageError, "dma: budget = 0, expected >= 1");
  CHECK_FAILS(run("dma:gate=relu", with(c, gate)), UsageError, "dma: gate = relu, expected one of exp, linear");
  CHECK_FAILS(run("dma", c.input()), Error, "dma: tensor w_dt is missing, expected [Hk, Hk·Dv], the gate's weights");
  AttendInput narrow = with(c, gate);
  narrow.extra["w_dt"] = {gate.w.data(), DType::f32, {2, 31}};
  CHECK_FAILS(run("dma", narrow), Error, "w_dt: shape = [2, 31], expected [2, 32], the KV heads by their values");
  DmaGate nan = gate;
  nan.a[1] = NAN;
  CHECK_FAILS(run("dma", with(c, nan)), Error, "a: holds nan, expected finite values");
  // Finite tensors whose gate overflows.
  DmaGate huge = gate;
  huge.a = {0, 1e6f}, huge.b = {0, 1};
  CHECK_FAILS(run("dma", with(c, huge)), Error, "dma: gate of key 0 in KV head 1 = inf, expected a finite number");
  CHECK_FAILS(run("dma", Case({1, 3, 2, 8, 8, 16, 16}).input()), Error,
              "q: 3 heads, expected a multiple of the 2 heads of k");
}

namespace {

std::vector<double> naive_dma(const Case& c, const DmaGate& gate, const DmaOptions& o) {
  const auto& s = c.size;
  std::vector<std::vector<double>> delta;
  for (Index b = 0; b < s.B; ++b)
    for (Index g = 0; g < s.Hk; ++g) {
      auto& x = delta.emplace_back();
      for (Index j = 0; j < s.M; ++j) x.push_back(importance(c, gate, b, g, j, o.linear));
    }
  const auto at = [&](Index b, Index h) -> const std::vector<double>& {
    return delta[static_cast<size_t>(b * s.Hk + c.kv_head(h))];
  };
  NaiveOptions options;
  options.change = [&](Index b, Index h, Index, Index j, double score) {
    return score + at(b, h)[static_cast<size_t>(j)];
  };
  const auto sees = [&](Index b, Index h, Index t, Index j) { return kept(at(b, h), position(c, t), o).contains(j); };
  return naive_attention(c, sees, options).o;
}

}  // namespace

TEST_CASE("dma's gradients, its gate's and the values' way through it included, agree with central differences") {
  for (const DType arithmetic : {DType::f32, DType::bf16})
    for (const bool linear : {false, true})
      for (const Sizes& s : {Sizes{1, 4, 2, 7, 9, 4, 3}, Sizes{2, 2, 2, 6, 6, 3, 4}, Sizes{1, 2, 1, 1, 8, 4, 5}})
        for (const bool bias : {true, false}) {
          const Case given(s, DType::f32, arithmetic);
          CAPTURE(given.describe());
          CAPTURE(linear);
          Case c = widened(given);
          DmaGate gate(s, 11, bias);
          const DmaOptions o{.budget = 4, .linear = linear, .keep_self = bias};
          const Sample dout = random_dout(s);
          const auto loss = [&] { return loss_of(naive_dma(c, gate, o), dout); };
          const double tolerance = gradient_tolerance(arithmetic);
          const AttendGradients got = gradients(o.call(), with(given, gate), dout);
          CHECK_GRADIENT("dq", got.dq, differences(c.q, loss), tolerance);
          CHECK_GRADIENT("dk", got.dk, differences(c.k, loss), tolerance);
          CHECK_GRADIENT("dv", got.dv, differences(c.v, loss), tolerance);
          CHECK(got.extra.size() == (bias ? 3u : 2u));
          CHECK(got.extra.at("w_dt").shape() == Shape{s.Hk, s.Hk * s.Dv});
          CHECK_GRADIENT("dw_dt", got.extra.at("w_dt"), differences(gate.w, loss), tolerance);
          CHECK_GRADIENT("da", got.extra.at("a"), differences(gate.a, loss), tolerance);
          if (bias) CHECK_GRADIENT("db_dt", got.extra.at("b_dt"), differences(gate.b, loss), tolerance);
        }
}

TEST_CASE("dma's gradients at larger sizes: a bias per key, and the gate by hand") {
  for (const std::string& isa : available_isas()) {
    const UseIsa use(isa);
    const Sizes s{1, 8, 2, 250, 333, 16, 24};
    const Case c(s);
    const DmaGate gate(s, 3);
    const DmaOptions o{.budget = 70};
    const Sample dout = random_dout(s);
    std::vector<std::vector<double>> delta;
    std::vector<std::set<Index>> sets;
    for (Index g = 0; g < s.Hk; ++g) {
      auto& x = delta.emplace_back();
      for (Index j = 0; j < s.M; ++j) x.push_back(importance(c, gate, 0, g, j, false));
      for (Index t = 0; t < s.N; ++t) sets.push_back(kept(x, position(c, t), o));
    }
    GradientOptions options;
    options.log_weights = s.Hk * s.M;
    Gradients want = naive_gradients(
        c,
        [&](Index, Index h, Index t) {
          std::vector<Met> all;
          const Index g = c.kv_head(h);
          for (const Index j : sets[static_cast<size_t>(g * s.N + t)]) {
            Met met{{j}};
            met.log_weight = delta[static_cast<size_t>(g)][static_cast<size_t>(j)], met.weight_of = g * s.M + j;
            all.push_back(met);
          }
          return all;
        },
        dout, options);
    std::vector<double> dw(gate.w.size()), da(2), db(2);
    for (Index g = 0; g < s.Hk; ++g)
      for (Index j = 0; j < s.M; ++j) {
        double dt = static_cast<double>(gate.b[static_cast<size_t>(g)]);
        for (Index i = 0; i < s.Hk * s.Dv; ++i)
          dt +=
              static_cast<double>(gate.w[static_cast<size_t>(g * s.Hk * s.Dv + i)]) * c.v_at(0, i / s.Dv, j, i % s.Dv);
        const double a = static_cast<double>(gate.a[static_cast<size_t>(g)]);
        const double d =
            want.dlog_weight[static_cast<size_t>(g * s.M + j)] * delta[static_cast<size_t>(g)][static_cast<size_t>(j)];
        da[static_cast<size_t>(g)] += d * std::log(1 + std::exp(dt));
        const double ddt = d * a / (1 + std::exp(-dt));
        db[static_cast<size_t>(g)] += ddt;
        for (Index i = 0; i < s.Hk * s.Dv; ++i) {
          const auto at = static_cast<size_t>(g * s.Hk * s.Dv + i);
          dw[at] += ddt * c.v_at(0, i / s.Dv, j, i % s.Dv);
          want.dv[static_cast<size_t>((i / s.Dv * s.M + j) * s.Dv + i % s.Dv)] += ddt * static_cast<double>(gate.w[at]);
        }
      }
    AttendGradients first;
    for (const int n : {1, 2, 3}) {
      const UseThreads threads(n);
      AttendGradients got = gradients(o.call(), with(c, gate), dout);
      check_gradients(c, got, want);
      CHECK_GRADIENT("dw_dt", got.extra.at("w_dt"), dw, gradient_tolerance(DType::f32));
      CHECK_GRADIENT("da", got.extra.at("a"), da, gradient_tolerance(DType::f32));
      CHECK_GRADIENT("db_dt", got.extra.at("b_dt"), db, gradient_tolerance(DType::f32));
      if (n == 1) first = std::move(got);
      else
        for (const auto& [x, y] :
             {std::pair(&got.dv, &first.dv), std::pair(&got.extra.at("w_dt"), &first.extra.at("w_dt")),
              std::pair(&got.extra.at("a"), &first.extra.at("a"))})
          CHECK(std::memcmp(x->data(), y->data(), static_cast<size_t>(x->bytes())) == 0);
    }
  }
}
