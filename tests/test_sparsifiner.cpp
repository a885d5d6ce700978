// sparsifiner against its equations: a low-rank guess of who matters, softmax over the best guesses.
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <random>

#include "heed/kernel/kernels.h"
#include "support/differences.h"
#include "support/gradients.h"

using namespace heed;
using namespace heed::test;

namespace {

struct Weights {
  Index c, r;
  std::vector<float> p_q, p_q_b, p_k, p_k_b, w_dn, w_up;
  Weights(const Sizes& s, Index channels, Index rank, std::uint64_t seed, float up = 0.05f) : c(channels), r(rank) {
    std::mt19937_64 random(seed);
    std::normal_distribution<float> normal;
    const auto fill = [&](std::vector<float>& x, Index count, float amplitude) {
      for (Index i = 0; i < count; ++i) x.push_back(amplitude * normal(random));
    };
    fill(p_q, c * s.D, 0.4f), fill(p_q_b, c, 0.3f), fill(p_k, c * s.D, 0.4f), fill(p_k_b, c, 0.3f);
    fill(w_dn, s.N * r, 0.3f), fill(w_up, s.N * r, up);
  }
};

struct SparsifinerOptions {
  double keep = 0.25;
  Index coef_top_k = 4;
  double basis_threshold = 0.02;
  bool drop_zero = false;
  double pred_scale = 0;  // 0: not said
  std::string call() const {
    return fmt::format("sparsifiner:keep={},coef_top_k={},basis_threshold={},drop_zero={}{}", keep, coef_top_k,
                       basis_threshold, drop_zero, pred_scale == 0 ? "" : fmt::format(",pred_scale={}", pred_scale));
  }
};

AttendInput with(const Case& c, const Weights& w) {
  AttendInput in = c.input();
  in.extra["p_q"] = {w.p_q.data(), DType::f32, {w.c, c.size.D}};
  in.extra["p_k"] = {w.p_k.data(), DType::f32, {w.c, c.size.D}};
  in.extra["p_q_b"] = {w.p_q_b.data(), DType::f32, {w.c}};
  in.extra["p_k_b"] = {w.p_k_b.data(), DType::f32, {w.c}};
  in.extra["w_dn"] = {w.w_dn.data(), DType::f32, {c.size.N, w.r}};
  in.extra["w_up"] = {w.w_up.data(), DType::f32, {c.size.N, w.r}};
  return in;
}

// Indices by falling score, the lower first among equals.
std::vector<Index> ranked(const std::vector<double>& x) {
  std::vector<Index> order(x.size());
  for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<Index>(i);
  std::stable_sort(order.begin(), order.end(),
                   [&](Index i, Index j) { return x[static_cast<size_t>(i)] > x[static_cast<size_t>(j)]; });
  return order;
}

Naive naive_sparsifiner(const Case& c, const Weights& w, const SparsifinerOptions& o) {
  const auto& s = c.size;
  const Index n = s.N;
  const double scale = o.pred_scale != 0 ? o.pred_scale : 1 / std::sqrt(static_cast<double>(w.c));
  const auto d = [](float x) { return static_cast<double>(x); };
  const Index count = static_cast<Index>(std::ceil(o.keep * static_cast<double>(n) - 1e-9));
  auto seen = std::make_shared<std::vector<char>>(static_cast<size_t>(s.B * s.Hq * n * n), 0);
  std::vector<char> near(static_cast<size_t>(s.B * s.Hq * n), 0);
  for (Index b = 0; b < s.B; ++b)
    for (Index h = 0; h < s.Hq; ++h) {
      std::vector<double> reduced(static_cast<size_t>(w.c * w.r), 0);
      for (Index j = 0; j < n; ++j)
        for (Index i = 0; i < w.c; ++i) {
          double x = d(w.p_k_b[static_cast<size_t>(i)]);
          for (Index f = 0; f < s.D; ++f)
            x += d(w.p_k[static_cast<size_t>(i * s.D + f)]) * c.k_at(b, c.kv_head(h), j, f);
          for (Index m = 0; m < w.r; ++m)
            reduced[static_cast<size_t>(i * w.r + m)] += x * d(w.w_dn[static_cast<size_t>(j * w.r + m)]);
        }
      for (Index t = 0; t < n; ++t) {
        const size_t row = static_cast<size_t>((b * s.Hq + h) * n + t);
        if (t == 0) {
          std::fill_n(seen->begin() + static_cast<std::ptrdiff_t>(row) * n, n, 1);
          continue;
        }
        std::vector<double> z(static_cast<size_t>(w.r), 0);
        for (Index i = 0; i < w.c; ++i) {
          double x = d(w.p_q_b[static_cast<size_t>(i)]);
          for (Index f = 0; f < s.D; ++f) x += d(w.p_q[static_cast<size_t>(i * s.D + f)]) * c.q_at(b, h, t, f);
          for (Index m = 0; m < w.r; ++m)
            z[static_cast<size_t>(m)] += scale * x * reduced[static_cast<size_t>(i * w.r + m)];
        }
        double total = 0;
        const double top = *std::max_element(z.begin(), z.end());
        for (double& x : z) x = std::exp(x - top), total += x;
        for (double& x : z) x /= total;
        const std::vector<Index> order = ranked(z);
        const size_t few = static_cast<size_t>(o.coef_top_k);
        // A coefficient that is nearly nothing cannot move anything either.
        if (few < order.size() && z[static_cast<size_t>(order[few - 1])] - z[static_cast<size_t>(order[few])] <
                                      1e-5 * z[static_cast<size_t>(order[few - 1])])
          near[row] = 1;
        std::vector<double> guess(static_cast<size_t>(n), 0);
        for (size_t k = 0; k < few; ++k) {
          const Index m = order[k];
          for (Index j = 0; j < n; ++j) {
            const double u = std::fabs(d(w.w_up[static_cast<size_t>(j * w.r + m)]));
            if (u > o.basis_threshold) guess[static_cast<size_t>(j)] += z[static_cast<size_t>(m)] * u;
          }
        }
        const std::vector<Index> best = ranked(guess);
        for (Index k = 0; k < count; ++k) {
          const Index j = best[static_cast<size_t>(k)];
          if (!o.drop_zero || guess[static_cast<size_t>(j)] > 0)
            (*seen)[row * static_cast<size_t>(n) + static_cast<size_t>(j)] = 1;
        }
        if (count < n) {
          const double last = guess[static_cast<size_t>(best[static_cast<size_t>(count - 1)])],
                       next = guess[static_cast<size_t>(best[static_cast<size_t>(count)])];
          if (last > 0 && last - next < 1e-5 * last) near[row] = 1;
        }
      }
    }
  Naive result = naive_attention(c, [&c, n, seen](Index b, Index h, Index t, Index j) {
    return (*seen)[static_cast<size_t>(((b * c.size.Hq + h) * n + t) * n + j)] != 0;
  });
  result.undecided = near;
  return result;
}

void check_sparsifiner(const Case& c, const Weights& w, const SparsifinerOptions& o) {
  const std::string call = o.call();
  CAPTURE(call);
  const Got got = run(call, with(c, w));
  const Naive want = naive_sparsifiner(c, w, o);
  CHECK_AGREES(got, want, c);
  Index undecided = 0;
  for (const char u : want.undecided) undecided += u;
  if (!o.drop_zero || undecided == 0) CHECK(got.stats.pairs == want.pairs);
  CHECK(undecided * 5 <= static_cast<Index>(want.undecided.size()));
}

}  // namespace

TEST_CASE("sparsifiner equals its equations") {
  for (const std::string& isa : available_isas()) {
    const UseIsa use(isa);
    for (const DType arithmetic : {DType::f32, DType::bf16})
      for (const Index n : {1, 2, 63, 64, 65, 197}) {
        const Case c({1, 4, 2, n, n, 33, 16}, DType::f32, arithmetic);
        check_sparsifiner(c, Weights(c.size, 16, std::max<Index>(4, n / 6), 3), {});
      }
    const Case batch({2, 3, 3, 130, 130, 64, 40}, DType::f32, DType::f32, Layout::tokens);
    check_sparsifiner(batch, Weights(batch.size, 32, 70, 4), {.keep = 0.4, .coef_top_k = 8});
    const Case half({1, 4, 1, 300, 300, 16, 24}, DType::f16);
    check_sparsifiner(half, Weights(half.size, 5, 11, 5), {.keep = 0.1, .coef_top_k = 11, .pred_scale = 0.1});
  }
}

TEST_CASE("sparsifiner: shares, thresholds and zero guesses") {
  const Case c({1, 2, 1, 150, 150, 24, 16});
  const Weights w(c.size, 12, 25, 6, 0.02f);  // two thirds of |w_up| lie below the threshold
  for (const double keep : {0.01, 0.3, 0.5, 0.999})
    for (const bool drop_zero : {false, true})
      for (const Index coefficients : {1, 3, 25})
        check_sparsifiner(c, w, {.keep = keep, .coef_top_k = coefficients, .drop_zero = drop_zero});
  check_sparsifiner(c, w, {.basis_threshold = 0});
  check_sparsifiner(c, w, {.basis_threshold = 0.055, .drop_zero = true});  // hardly a guess left
  // 0.3·10 keys are 3, although the product lies above 3 in f64.
  const Case ten({1, 1, 1, 10, 10, 16, 16});
  CHECK(run("sparsifiner:keep=0.3,coef_top_k=2", with(ten, Weights(ten.size, 4, 4, 1))).stats.pairs == 10 + 9 * 3);
}

TEST_CASE("sparsifiner that keeps all is dense, whatever the predictor holds") {
  const Case c({1, 4, 2, 197, 197, 32, 32});
  const Naive dense = naive_attention(c, dense_sees(c, false));
  for (const std::uint64_t seed : {1, 2}) {
    const Got got = run("sparsifiner:keep=1", with(c, Weights(c.size, 16, 32, seed)));
    const std::string differs = difference(got, dense, c, 1e-5);
    CHECK_MESSAGE(differs.empty(), differs);
  }
}

TEST_CASE("sparsifiner: every row keeps exactly its share, the first sees all, empty rows give zeros") {
  const Case c({1, 2, 2, 197, 197, 16, 16});
  const Weights w(c.size, 8, 32, 2);
  const AttendInput in = with(c, w);
  const Plan plan = plan_of(MechanismCall::parse("sparsifiner"), in);
  walk(plan, [&](const RowBlock& rows, const std::vector<Tile>& tiles) {
    for (Index i = 0; i < rows.rows; ++i) {
      Index count = 0;
      for (const Tile& tile : tiles)
        for (Index r = 0; r < tile.columns.count; ++r) count += sees(plan, rows, tile, i, r) ? 1 : 0;
      CHECK(count == (rows.token(i) == 0 ? 197 : 50));
    }
  });
  // No entry of the basis is left: nothing is positive.
  const Got empty = run("sparsifiner:drop_zero=true,basis_threshold=9", in);
  for (Index h = 0; h < 2; ++h)
    for (Index t = 1; t < 197; ++t) {
      const size_t row = static_cast<size_t>(h * 197 + t);
      CHECK(empty.lse[row] == -INFINITY);
      for (size_t e = 0; e < 16; ++e) CHECK(empty.o[row * 16 + e] == 0);
    }
  CHECK(std::isfinite(empty.lse[0]));
}

TEST_CASE("sparsifiner's mask does not change when the basis is scaled") {
  const Case c({1, 2, 1, 197, 197, 16, 16});
  Weights w(c.size, 8, 32, 2);
  const Got before = run("sparsifiner:basis_threshold=0", with(c, w));
  for (float& x : w.w_up) x *= 8;  // a power of two, so that no guess is rounded anew
  const Got after = run("sparsifiner:basis_threshold=0", with(c, w));
  CHECK(same_bits(before.o, after.o));
}

TEST_CASE("sparsifiner: the same bits for any number of threads") {
  for (const std::string& isa : available_isas()) {
    const UseIsa use(isa);
    const Case c({2, 4, 2, 300, 300, 16, 16});
    const Weights w(c.size, 8, 40, 2);
    Got first;
    for (const int n : {1, 2, 3}) {
      const UseThreads threads(n);
      const Got got = run("sparsifiner", with(c, w));
      if (n == 1) first = got;
      CHECK(same_bits(got.o, first.o));
      CHECK(same_bits(got.lse, first.lse));
    }
  }
}

TEST_CASE("sparsifiner refuses what it cannot mean") {
  const Case c({1, 1, 1, 20, 20, 16, 16});
  const Weights w(c.size, 4, 6, 1);
  const AttendInput in = with(c, w);
  CHECK_FAILS(run("sparsifiner:keep=0", in), UsageError, "sparsifiner: keep = 0, expected above 0 and at most 1");
  CHECK_FAILS(run("sparsifiner:keep=1.1", in), UsageError, "sparsifiner: keep = 1.1, expected above 0 and at most 1");
  CHECK_FAILS(run("sparsifiner", in), UsageError,
              "sparsifiner: coef_top_k = 8, expected at most 6, the columns of w_dn");
  CHECK_FAILS(run("sparsifiner:coef_top_k=0", in), UsageError, "sparsifiner: coef_top_k = 0, expected >= 1");
  AttendInput wrong = in;
  wrong.extra["w_dn"] = {w.w_dn.data(), DType::f32, {19, 6}};
  CHECK_FAILS(run("sparsifiner:coef_top_k=2", wrong), Error, "w_dn: shape = [19, 6], expected [N, *]");
  wrong = in, wrong.extra["w_dn"] = {w.w_dn.data(), DType::f32, {20, 0}};
  CHECK_FAILS(run("sparsifiner:coef_top_k=2", wrong), Error, "w_dn: shape = [20, 0], expected at least one column");
  wrong = in, wrong.extra["w_up"] = {w.w_up.data(), DType::f32, {20, 5}};
  CHECK_FAILS(run("sparsifiner:coef_top_k=2", wrong), Error, "w_up: shape = [20, 5], expected 6 on axis 1 as w_dn has");
  wrong = in, wrong.extra["p_k_b"] = {w.p_k_b.data(), DType::f32, {3}};
  CHECK_FAILS(run("sparsifiner:coef_top_k=2", wrong), Error, "p_k_b: shape = [3], expected 4 on axis 0 as p_q has");
  wrong = in, wrong.extra.erase("p_k");
  CHECK_FAILS(run("sparsifiner:coef_top_k=2", wrong), Error,
              "sparsifiner: tensor p_k is missing, expected [c, D], the predictor's key projection");
  wrong = in, wrong.causal = true;
  CHECK_FAILS(run("sparsifiner:coef_top_k=2", wrong), UsageError,
              "sparsifiner: causal = true, expected false: it is not causal by definition");
}

TEST_CASE("sparsifiner's gradients are those of its pattern, and its predictor has none") {
  for (const DType arithmetic : {DType::f32, DType::bf16})
    for (const bool drop_zero : {false, true})
      for (const Sizes& s :
           {Sizes{1, 4, 2, 90, 90, 16, 24}, Sizes{2, 2, 2, 131, 131, 24, 8}, Sizes{1, 2, 1, 1, 1, 16, 16}}) {
        const Case c(s, DType::f32, arithmetic);
        const Weights w(s, 5, 6, 3, drop_zero ? 0.02f : 0.05f);
        const SparsifinerOptions o{.keep = 0.3, .drop_zero = drop_zero};
        const Sample dout = random_dout(s);
        const AttendInput in = with(c, w);
        const Gradients want = naive_gradients(c, met_by_plan(plan_of(MechanismCall::parse(o.call()), in)), dout);
        AttendGradients first;
        for (const int n : {1, 2, 3}) {
          const UseThreads threads(n);
          AttendGradients got = gradients(o.call(), in, dout);
          check_gradients(c, got, want);
          CHECK(got.extra.empty());
          if (n == 1) first = std::move(got);
          else CHECK(std::memcmp(got.dk.data(), first.dk.data(), static_cast<size_t>(got.dk.bytes())) == 0);
        }
      }
}
