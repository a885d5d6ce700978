// combiner against its definition: p(j | i) from the sets of tokens that a query meets directly and by region.
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <map>
#include <numeric>

#include "heed/kernel/kernels.h"
#include "support/differences.h"
#include "support/gradients.h"

using namespace heed;
using namespace heed::test;

namespace {

using Tokens = std::vector<Index>;
struct Support {
  Tokens direct;
  std::vector<Tokens> regions;
};

Tokens run_of(Index begin, Index end) {
  Tokens tokens(static_cast<size_t>(std::max<Index>(0, end - begin)));
  std::iota(tokens.begin(), tokens.end(), begin);
  return tokens;
}

Support fixed(Index N, Index block, Index i, bool causal) {
  const Index own = i / block;
  Support s{run_of(own * block, causal ? i + 1 : (own + 1) * block), {}};
  for (Index r = 0; r < (causal ? own : N / block); ++r) s.regions.push_back(run_of(r * block, (r + 1) * block));
  return s;
}

/// The past cut into powers of two, the largest first, as the number i has them.
Support logsparse(Index i) {
  Support s{{i}, {}};
  Index begin = 0;
  for (Index size = Index{1} << 40; size > 0; size /= 2)
    if ((i & size) != 0) s.regions.push_back(run_of(begin, begin + size)), begin += size;
  return s;
}

Support mixture(Index block, Index i) {
  const Index r = i / block, c = i % block;
  Support s;
  for (Index above = 0; above < r; ++above) s.direct.push_back(above * block + c);  // (a)
  for (Index before = 0; before <= c; ++before) s.direct.push_back(r * block + before);  // (b)
  for (Index other = 0; other < block; ++other) {  // (c)
    Tokens column;
    for (Index above = 0; above < r; ++above) column.push_back(above * block + other);
    if (other != c && r > 0) s.regions.push_back(column);
  }
  for (Index above = 0; above < r; ++above) {
    if (c > 0) s.regions.push_back(run_of(above * block, above * block + c));  // (d)
    if (c + 1 < block) s.regions.push_back(run_of(above * block + c + 1, (above + 1) * block));  // (e)
  }
  return s;
}

struct Combiner {
  std::string variant;
  Index block = 128;
  bool causal = true;
  std::string call() const { return fmt::format("combiner:variant={},block={}", variant, block); }
  Support support(Index N, Index i) const {
    return variant == "fixed" ? fixed(N, block, i, causal) : variant == "logsparse" ? logsparse(i) : mixture(block, i);
  }
};

Naive naive_combiner(const Case& c, const Combiner& options) {
  const auto& s = c.size;
  const double scale = 1 / std::sqrt(static_cast<double>(s.D));
  using Vector = std::vector<double>;
  const auto dot = [](const Vector& a, const Vector& b) {
    return std::inner_product(a.begin(), a.end(), b.begin(), 0.0);
  };
  Naive result;
  for (Index b = 0; b < s.B; ++b)
    for (Index h = 0; h < s.Hq; ++h) {
      std::vector<Vector> q, k, v;  // scaled queries
      for (Index j = 0; j < s.N; ++j) {
        q.emplace_back(), k.emplace_back(), v.emplace_back();
        for (Index d = 0; d < s.D; ++d)
          q.back().push_back(scale * c.q_at(b, h, j, d)), k.back().push_back(c.k_at(b, c.kv_head(h), j, d));
        for (Index e = 0; e < s.Dv; ++e) v.back().push_back(c.v_at(b, c.kv_head(h), j, e));
      }
      const auto largest = [&](const std::vector<Vector>& x, const Tokens& tokens) {
        Vector most(static_cast<size_t>(s.D), -INFINITY);
        for (const Index j : tokens)
          for (size_t d = 0; d < most.size(); ++d) most[d] = std::max(most[d], x[static_cast<size_t>(j)][d]);
        return most;
      };
      struct Summary {
        Vector key, weights;  // p(j | region)
      };
      std::map<Tokens, Summary> summaries;  // the same for every query
      for (Index i = 0; i < s.N; ++i) {
        const Support support = options.support(s.N, i);
        Vector p(static_cast<size_t>(s.N));  // p(j | i), times the denominator
        double sum = 0;
        const Vector& query = q[static_cast<size_t>(i)];
        for (const Index j : support.direct) {
          const double w = std::exp(dot(query, k[static_cast<size_t>(j)]));
          p[static_cast<size_t>(j)] += w, sum += w;
        }
        for (const Tokens& region : support.regions) {
          Summary& summary = summaries[region];
          if (summary.key.empty()) {
            const Vector pooled = largest(q, region);
            summary.key = largest(k, region);
            for (const Index j : region) summary.weights.push_back(std::exp(dot(pooled, k[static_cast<size_t>(j)])));
            const double all = std::accumulate(summary.weights.begin(), summary.weights.end(), 0.0);
            for (double& w : summary.weights) w /= all;
          }
          const double w = std::exp(dot(query, summary.key));
          for (size_t m = 0; m < region.size(); ++m) p[static_cast<size_t>(region[m])] += w * summary.weights[m];
          sum += w;
        }
        Vector o(static_cast<size_t>(s.Dv));
        for (size_t j = 0; j < p.size(); ++j)
          for (size_t e = 0; p[j] != 0 && e < o.size(); ++e) o[e] += p[j] / sum * v[j][e];
        result.o.insert(result.o.end(), o.begin(), o.end());
        result.lse.push_back(std::log(sum));
        result.pairs += static_cast<Index>(support.direct.size() + support.regions.size());
      }
    }
  return result;
}

/// On every instruction set.
void check_combiner(const Case& c, const Combiner& options) {
  const std::string call = options.call();
  CAPTURE(call);
  const Naive want = naive_combiner(c, options);
  for (const std::string& isa : available_isas()) {
    const UseIsa use(isa);
    const Got got = run(call, c.input(options.causal));
    CHECK_AGREES(got, want, c);
    CHECK(got.stats.pairs == want.pairs);
  }
}

Sizes square(Index n, Index hq = 2, Index hk = 1, Index d = 16, Index dv = 16, Index b = 1) {
  return {b, hq, hk, n, n, d, dv};
}

const std::vector<std::string> variants{"fixed", "logsparse", "mixture"};

}  // namespace

TEST_CASE("combiner fixed equals its definition") {
  for (const DType arithmetic : {DType::f32, DType::bf16})
    for (const bool causal : {true, false}) {
      for (const Index block : {1, 5, 20, 60, 300})
        check_combiner(Case(square(300), DType::f32, arithmetic), {"fixed", block, causal});
      check_combiner(Case(square(192, 4, 4, 33, 24, 2), DType::f16, arithmetic, Layout::scattered),
                     {"fixed", 16, causal});
      check_combiner(Case(square(210, 8, 2, 64, 80), DType::bf16, arithmetic, Layout::tokens), {"fixed", 70, causal});
      check_combiner(Case(square(1), DType::f32, arithmetic), {"fixed", 1, causal});
      check_combiner(Case(square(640, 1, 1, 256, 16), DType::f32, arithmetic), {"fixed", 128, causal});
    }
}

TEST_CASE("combiner logsparse equals its definition") {
  for (const DType arithmetic : {DType::f32, DType::bf16}) {
    for (const Index n : {1, 2, 3, 63, 64, 65, 129, 300})
      check_combiner(Case(square(n), DType::f32, arithmetic), {"logsparse"});
    check_combiner(Case(square(257, 4, 4, 33, 24, 2), DType::f16, arithmetic, Layout::scattered), {"logsparse"});
    check_combiner(Case(square(200, 8, 2, 64, 80), DType::bf16, arithmetic, Layout::reversed), {"logsparse"});
  }
  check_combiner(Case(square(1100, 1)), {"logsparse"});
}

TEST_CASE("combiner mixture equals its definition") {
  for (const DType arithmetic : {DType::f32, DType::bf16}) {
    for (const Index block : {1, 6, 15, 60, 180})
      check_combiner(Case(square(180), DType::f32, arithmetic), {"mixture", block});
    check_combiner(Case(square(192, 4, 4, 33, 24, 2), DType::f16, arithmetic, Layout::scattered), {"mixture", 12});
    check_combiner(Case(square(200, 8, 2, 64, 80), DType::bf16, arithmetic, Layout::tokens), {"mixture", 20});
    check_combiner(Case(square(1), DType::f32, arithmetic), {"mixture", 1});
  }
  check_combiner(Case(square(3280, 1)), {"mixture", 205});  // several row blocks
  check_combiner(Case(square(990, 1)), {"mixture", 330});  // rows of more than a chunk
}

TEST_CASE("combiner fixed is dense causal attention with one block, and with blocks of one token") {
  const Case c(square(300, 4, 2, 32, 32));
  const Naive dense = naive_attention(c, dense_sees(c, true));
  for (const Index block : {1, 300}) CHECK_AGREES(run(Combiner{"fixed", block}.call(), c.input(true)), dense, c);
}

TEST_CASE("combiner's weights, by unit values, are those of its definition on every earlier token") {
  const Index n = 120;
  Case c(square(n, 1, 1, 16, n));
  for (Index j = 0; j < n; ++j)
    for (Index e = 0; e < n; ++e) c.v.set(0, 0, j, e, j == e ? 1 : 0);
  for (const std::string& variant : variants) {
    const Got got = run(Combiner{variant, 10}.call(), c.input(true));
    CHECK_AGREES(got, naive_combiner(c, {variant, 10}), c);
    for (Index i = 0; i < n; ++i) {
      double sum = 0;
      for (Index j = 0; j < n; ++j) {
        const float p = got.o[static_cast<size_t>(i * n + j)];
        sum += p;
        CHECK((j <= i ? p > 0 : p == 0));
      }
      CHECK(std::fabs(sum - 1) <= 1e-5);
    }
  }
}

TEST_CASE("combiner logsparse's spans part the past for every length") {
  // With queries and keys of zero every span has the same weight, which its tokens share evenly.
  for (Index n = 1; n <= 300; ++n) {
    Case c(square(n, 1, 1, 16, n));
    for (Index j = 0; j < n; ++j) {
      for (Index d = 0; d < 16; ++d) c.q.set(0, 0, j, d, 0), c.k.set(0, 0, j, d, 0);
      for (Index e = 0; e < n; ++e) c.v.set(0, 0, j, e, j == e ? 1 : 0);
    }
    const Got got = run("combiner:variant=logsparse", c.input(true));
    const Index last = n - 1;
    Index spans = 1, wrong = 0, begin = 0;
    for (Index bit = 1; bit <= last; bit *= 2) spans += (last & bit) != 0 ? 1 : 0;
    const auto share = [&](Index j, Index size) {
      wrong +=
          std::fabs(got.o[static_cast<size_t>(last * n + j)] * static_cast<double>(spans * size) - 1) > 1e-5 ? 1 : 0;
    };
    for (Index size = 512; size > 0; size /= 2) {
      if ((last & size) == 0) continue;
      for (Index j = begin; j < begin + size; ++j) share(j, size);
      begin += size;
    }
    share(last, 1);
    CHECK_MESSAGE(wrong == 0, "N ", n);
  }
}

TEST_CASE("combiner is causal, bit for bit") {
  const Index n = 240;
  for (const std::string& isa : available_isas()) {
    const UseIsa use(isa);
    const Case c(square(n));
    for (const std::string& variant : variants) {
      const std::string call = Combiner{variant, 20}.call();
      const Got before = run(call, c.input(true));
      for (const Index t : {0, 1, 19, 20, 63, 64, 130, 238}) {
        Case changed = c;
        for (Index j = t + 1; j < n; ++j)
          for (Index d = 0; d < 16; ++d) {
            for (Index h = 0; h < 2; ++h) changed.q.set(0, h, j, d, 9);
            changed.k.set(0, 0, j, d, 20), changed.v.set(0, 0, j, d, 500);
          }
        const Got after = run(call, changed.input(true));
        for (Index h = 0; h < 2; ++h) {
          const auto first = h * n * 16, end = first + (t + 1) * 16;
          CHECK_MESSAGE(std::equal(before.o.begin() + first, before.o.begin() + end, after.o.begin() + first), call,
                        " ", t);
          CHECK(std::equal(before.lse.begin() + h * n, before.lse.begin() + h * n + t + 1, after.lse.begin() + h * n));
        }
      }
    }
  }
}

TEST_CASE("combiner of a prefix is the prefix of combiner: what decoding step by step needs") {
  const Index n = 200;
  const Case c(square(n));
  for (const std::string& variant : variants) {
    const std::string call = Combiner{variant, 10}.call();
    const Got whole = run(call, c.input(true));
    for (Index end = variant == "logsparse" ? 1 : 10; end <= n; end += variant == "logsparse" ? 7 : 10) {
      AttendInput part = c.input(true);
      part.q.shape[2] = part.k.shape[2] = part.v.shape[2] = end;
      const Got got = run(call, part);
      for (Index h = 0; h < 2; ++h)
        for (Index e = 0; e < 16; ++e)
          CHECK(std::fabs(got.o[static_cast<size_t>((h * end + end - 1) * 16 + e)] -
                          whole.o[static_cast<size_t>((h * n + end - 1) * 16 + e)]) <= 1e-5);
    }
  }
}

TEST_CASE("combiner: the same bits for any number of threads") {
  for (const Index n : {120, 1200}) {
    const Case c(square(n, 4, 2, 16, 16, 2));
    for (const std::string& variant : variants) {
      Got first;
      for (const int threads : {1, 2, 3}) {
        const UseThreads use(threads);
        const Got got = run(Combiner{variant, 40}.call(), c.input(true));
        if (threads == 1) first = got;
        CHECK(same_bits(got.o, first.o));
        CHECK(same_bits(got.lse, first.lse));
      }
    }
  }
}

TEST_CASE("combiner's tiles: a block and the regions before it; a negative scale pools scaled queries") {
  const Case c(square(512, 1));
  const Got got = run("combiner:block=64", c.input(true));
  CHECK(got.stats.tiles_planned == 8 + 7);
  CHECK(got.stats.tiles_visited == got.stats.tiles_planned);
  // Queries negated and the scale negated: the same scores.
  Case negated = c;
  for (Index t = 0; t < 512; ++t)
    for (Index d = 0; d < 16; ++d) negated.q.set(0, 0, t, d, -c.q.get(0, 0, t, d));
  AttendInput in = negated.input(true);
  in.scale = -0.25f;
  CHECK_AGREES(run("combiner:block=64", in), naive_combiner(c, {"fixed", 64}), c);
}

TEST_CASE("combiner refuses what it cannot mean") {
  const Case c(square(30));
  CHECK_FAILS(run("combiner:block=0", c.input(true)), UsageError, "combiner: block = 0, expected >= 1");
  CHECK_FAILS(run("combiner:block=7", c.input(true)), UsageError, "combiner: block = 7, expected a divisor of N = 30");
  CHECK_FAILS(run("combiner", c.input()), UsageError, "combiner: block = 128, expected a divisor of N = 30");
  CHECK_FAILS(run("combiner:variant=mixture,block=7", c.input(true)), UsageError,
              "combiner: block = 7, expected a divisor of N = 30");
  for (const char* variant : {"logsparse", "mixture"})
    CHECK_FAILS(run(fmt::format("combiner:variant={},block=10", variant), c.input()), UsageError,
                fmt::format("combiner: causal = false, expected true with variant = {}", variant));
  CHECK_THROWS_AS(static_cast<void>(run("combiner:variant=axial,block=10", c.input(true))), UsageError);
  const Case longer({1, 1, 1, 20, 30, 16, 16});
  CHECK_FAILS(run("combiner:block=10", longer.input(true)), Error,
              "combiner: 20 queries and 30 keys, expected as many of one as of the other");
}

namespace {

void check_combiner_gradients(const Case& given, const Combiner& options) {
  const std::string call = options.call();
  CAPTURE(call);
  CAPTURE(given.describe());
  Case c = widened(given);
  const Sample dout = random_dout(c.size);
  const auto loss = [&] { return loss_of(naive_combiner(c, options).o, dout); };
  const std::vector<double> dq = differences(c.q, loss), dk = differences(c.k, loss), dv = differences(c.v, loss);
  const double tolerance = gradient_tolerance(given.arithmetic);
  for (const std::string& isa : available_isas()) {
    const UseIsa use(isa);
    const AttendGradients got = gradients(call, given.input(options.causal), dout);
    CHECK_GRADIENT("dq", got.dq, dq, tolerance);
    CHECK_GRADIENT("dk", got.dk, dk, tolerance);
    CHECK_GRADIENT("dv", got.dv, dv, tolerance);
  }
}

}  // namespace

TEST_CASE("combiner's gradients go through its summaries: central differences of its definition") {
  for (const DType arithmetic : {DType::f32, DType::bf16}) {
    const auto at = [&](const Sizes& s) { return Case(s, DType::f32, arithmetic); };
    for (const bool causal : {true, false}) {
      check_combiner_gradients(at(square(12, 4, 2, 5, 3)), {"fixed", 4, causal});
      check_combiner_gradients(at(square(9, 2, 2, 4, 6, 2)), {"fixed", 3, causal});
      check_combiner_gradients(at(square(8, 2, 1, 4, 4)), {"fixed", 8, causal});
      check_combiner_gradients(at(square(1, 2, 1, 4, 3)), {"fixed", 1, causal});
    }
    for (const Index n : {1, 2, 3, 11, 17}) check_combiner_gradients(at(square(n, 4, 2, 4, 3)), {"logsparse"});
    check_combiner_gradients(at(square(12, 4, 2, 4, 3)), {"mixture", 4});
    check_combiner_gradients(at(square(10, 2, 2, 3, 4, 2)), {"mixture", 5});
    check_combiner_gradients(at(square(6, 2, 1, 4, 4)), {"mixture", 1});
    check_combiner_gradients(at(square(6, 2, 1, 4, 4)), {"mixture", 6});
  }
}

TEST_CASE("combiner's gradients across panels and row blocks: differences along random directions") {
  for (const Combiner& options : {Combiner{"fixed", 50}, Combiner{"fixed", 70, false}, Combiner{"logsparse"},
                                  Combiner{"mixture", 14}, Combiner{"mixture", 175}}) {
    const std::string call = options.call();
    CAPTURE(call);
    Case c(square(350, 4, 2, 8, 8));
    const Sample dout = random_dout(c.size);
    const AttendGradients got = gradients(call, c.input(options.causal), dout);
    const auto along = [&](Sample Case::* which, const Tensor& gradient) {
      const Case before = c;
      const Shape s = (c.*which).view().shape;
      const Sample direction(DType::f32, s[0], s[1], s[2], s[3], Layout::packed, 4, 2e-5);
      double slope = 0, step = 0;
      const auto move = [&](double sign) {
        slope = 0, step = 0;
        for (Index h = 0, at = 0; h < s[1]; ++h)
          for (Index t = 0; t < s[2]; ++t)
            for (Index i = 0; i < s[3]; ++i, ++at) {
              const double x = (before.*which).get(0, h, t, i);
              (c.*which).set(0, h, t, i, x + sign * direction.get(0, h, t, i));
              const double moved = (c.*which).get(0, h, t, i) - x;
              slope += moved * static_cast<double>(gradient.as<float>()[at]), step += moved * moved;
            }
        const double loss = loss_of(naive_combiner(c, options).o, dout);
        c = before;
        return loss;
      };
      const double base = loss_of(naive_combiner(c, options).o, dout);
      const double more = move(1) - base;
      CHECK(std::fabs(more - slope) < 1e-2 * std::fabs(slope) + 1e-4 * std::sqrt(step));
    };
    along(&Case::q, got.dq), along(&Case::k, got.dk), along(&Case::v, got.dv);
  }
}

TEST_CASE("combiner's gradients: the same bits for any number of threads") {
  const Case c(square(360, 4, 2, 16, 16));
  const Sample dout = random_dout(c.size);
  for (const std::string& variant : variants) {
    AttendGradients first;
    for (const int n : {1, 2, 3}) {
      const UseThreads threads(n);
      AttendGradients got = gradients(Combiner{variant, 20}.call(), c.input(true), dout);
      if (n == 1) first = std::move(got);
      else
        for (const auto& [a, b] :
             {std::pair(&got.dq, &first.dq), std::pair(&got.dk, &first.dk), std::pair(&got.dv, &first.dv)})
          CHECK(std::memcmp(a->data(), b->data(), static_cast<size_t>(a->bytes())) == 0);
    }
  }
}
