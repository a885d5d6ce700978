// hilo against its definition: some heads inside windows, the others on the windows' means.
#include <doctest/doctest.h>

#include "heed/kernel/kernels.h"
#include "support/grids.h"

using namespace heed;
using namespace heed::test;

namespace {

struct HiLo {
  std::vector<Index> grid;
  Index window;
  double alpha;
  std::string call() const {
    return fmt::format("hilo:grid={},alpha={},window={}", fmt::join(grid, "x"), alpha, window);
  }
};

/// Number of the window of each token, counted in row-major order.
std::vector<Index> windows_of(const HiLo& o) {
  std::vector<Index> number;
  Index tokens = 1;
  for (const Index length : o.grid) tokens *= length;
  for (Index t = 0; t < tokens; ++t) {
    const std::vector<Index> x = coordinates(o.grid, t);
    Index w = 0;
    for (size_t a = 0; a < o.grid.size(); ++a) w = w * ((o.grid[a] + o.window - 1) / o.window) + x[a] / o.window;
    number.push_back(w);
  }
  return number;
}

/// Hi heads see their own window; Lo heads see each window's mean key and mean value.
Naive naive_hilo(const Case& c, const HiLo& o, Index lo_heads) {
  const auto& s = c.size;
  const std::vector<Index> number = windows_of(o);
  Naive result = naive_attention(c, [&](Index, Index h, Index t, Index j) {
    return h < s.Hq - lo_heads && number[static_cast<size_t>(t)] == number[static_cast<size_t>(j)];
  });
  const Index count = number.back() + 1;
  for (Index b = 0; b < s.B; ++b)
    for (Index h = s.Hq - lo_heads; h < s.Hq; ++h) {
      std::vector<std::vector<double>> k(static_cast<size_t>(count), std::vector<double>(static_cast<size_t>(s.D)));
      std::vector<std::vector<double>> v(static_cast<size_t>(count), std::vector<double>(static_cast<size_t>(s.Dv)));
      std::vector<double> tokens(static_cast<size_t>(count));
      for (Index j = 0; j < s.M; ++j) {
        const size_t w = static_cast<size_t>(number[static_cast<size_t>(j)]);
        tokens[w] += 1;
        for (Index d = 0; d < s.D; ++d) k[w][static_cast<size_t>(d)] += c.k_at(b, h, j, d);
        for (Index e = 0; e < s.Dv; ++e) v[w][static_cast<size_t>(e)] += c.v_at(b, h, j, e);
      }
      for (Index t = 0; t < s.N; ++t) {
        std::vector<double> score;
        double sum = 0;
        for (size_t w = 0; w < tokens.size(); ++w) {
          double x = 0;
          for (Index d = 0; d < s.D; ++d) x += c.q_at(b, h, t, d) * k[w][static_cast<size_t>(d)] / tokens[w];
          score.push_back(std::exp(x / std::sqrt(static_cast<double>(s.D))));
          sum += score.back();
        }
        const size_t row = static_cast<size_t>((b * s.Hq + h) * s.N + t);
        result.lse[row] = std::log(sum);
        for (size_t w = 0; w < tokens.size(); ++w)
          for (Index e = 0; e < s.Dv; ++e)
            result.o[row * static_cast<size_t>(s.Dv) + static_cast<size_t>(e)] +=
                score[w] / sum * v[w][static_cast<size_t>(e)] / tokens[w];
        result.pairs += count;
      }
    }
  return result;
}

/// On every instruction set.
void check_hilo(const Case& c, const HiLo& o, Index lo_heads) {
  const Naive want = naive_hilo(c, o, lo_heads);
  const std::string call = o.call();
  CAPTURE(call);
  for (const std::string& isa : available_isas()) {
    const UseIsa use(isa);
    const Got got = run(call, c.input());
    CHECK_AGREES(got, want, c);
    CHECK(got.stats.pairs == want.pairs);
  }
}

Sizes sizes(Index heads, Index n, Index d = 16, Index dv = 16) { return {1, heads, heads, n, n, d, dv}; }

}  // namespace

TEST_CASE("hilo equals its definition") {
  for (const DType arithmetic : {DType::f32, DType::bf16}) {
    check_hilo(Case(sizes(10, 196), DType::f32, arithmetic), {{14, 14}, 2, 0.9}, 9);
    check_hilo(Case(sizes(4, 196, 32, 24), DType::f32, arithmetic), {{14, 14}, 2, 0.5}, 2);
    check_hilo(Case(sizes(5, 195, 17, 40), DType::f16, arithmetic), {{13, 15}, 2, 0.3}, 1);  // cut windows
    check_hilo(Case(sizes(3, 195, 33, 16), DType::bf16, arithmetic), {{15, 13}, 4, 0.7}, 2);
    check_hilo(Case({2, 4, 4, 210, 210, 16, 16}, DType::f32, arithmetic, Layout::tokens), {{5, 6, 7}, 3, 0.5}, 2);
    check_hilo(Case(sizes(2, 301), DType::f32, arithmetic), {{301}, 6, 0.5}, 1);
    check_hilo(Case(sizes(2, 600), DType::f32, arithmetic), {{20, 30}, 9, 0.5}, 1);  // windows of more than a panel
    check_hilo(Case(sizes(2, 600), DType::f32, arithmetic), {{20, 30}, 8, 0.5}, 1);
    check_hilo(Case(sizes(2, 1), DType::f32, arithmetic), {{1, 1}, 2, 0.5}, 1);
    check_hilo(Case(sizes(2, 30), DType::f32, arithmetic), {{5, 6}, 1000000000, 0.5}, 1);
  }
}

TEST_CASE("hilo's heads: alpha 0 is windows, alpha 1 means, the share is exact") {
  const Case c(sizes(10, 143));
  check_hilo(c, {{11, 13}, 3, 0}, 0);
  check_hilo(c, {{11, 13}, 3, 1}, 10);
  check_hilo(c, {{11, 13}, 3, 0.3}, 3);  // 0.3 · 10 = 3, whatever the rounding
  check_hilo(c, {{11, 13}, 3, 0.39}, 3);
}

TEST_CASE("hilo with windows of one token is dense attention in every head") {
  const Case c(sizes(4, 143));
  const Naive dense = naive_attention(c, dense_sees(c, false));
  for (const double alpha : {0.0, 0.5, 1.0}) CHECK_AGREES(run(HiLo{{11, 13}, 1, alpha}.call(), c.input()), dense, c);
}

TEST_CASE("hilo: a token changes its own window of Hi; moved inside it, no Lo output of others") {
  const HiLo o{{12, 14}, 2, 0.5};
  const Case c(sizes(2, 168));
  const std::vector<Index> number = windows_of(o);
  const Got before = run(o.call(), c.input());
  const Index token = 31, other = 32;  // (2, 3) and (2, 4) lie in different windows, (2, 3) and (3, 3) in one
  CHECK(number[token] != number[other]);
  Case changed = c;
  for (Index d = 0; d < 16; ++d) changed.k.set(0, 0, token, d, 3), changed.v.set(0, 0, token, d, -50);
  const Got after = run(o.call(), changed.input());
  for (Index t = 0; t < 168; ++t) {
    const bool same = std::equal(before.o.begin() + t * 16, before.o.begin() + (t + 1) * 16, after.o.begin() + t * 16);
    CHECK(same == (number[static_cast<size_t>(t)] != number[token]));
  }
  const Index below = token + 14;
  CHECK(number[token] == number[below]);
  Case moved = c;
  for (Index d = 0; d < 16; ++d)
    for (Sample* x : {&moved.q, &moved.k, &moved.v}) {
      const double a = x->get(0, 1, token, d), b = x->get(0, 1, below, d);
      x->set(0, 1, token, d, b), x->set(0, 1, below, d, a);
    }
  const Got swapped = run(o.call(), moved.input());
  for (Index t = 0; t < 168; ++t)
    for (Index d = 0; d < 16; ++d) {
      const Index from = t == token ? below : t == below ? token : t;
      CHECK(swapped.o[static_cast<size_t>((168 + t) * 16 + d)] ==
            doctest::Approx(before.o[static_cast<size_t>((168 + from) * 16 + d)]).epsilon(1e-5));
    }
}

TEST_CASE("hilo: the same bits for any number of threads") {
  const Case c({2, 4, 4, 600, 600, 16, 16});
  Got first;
  for (const int threads : {1, 2, 3}) {
    const UseThreads use(threads);
    const Got got = run("hilo:grid=20x30,alpha=0.5,window=3", c.input());
    if (threads == 1) first = got;
    CHECK(same_bits(got.o, first.o));
    CHECK(same_bits(got.lse, first.lse));
  }
}

TEST_CASE("hilo refuses what it cannot mean") {
  const Case c(sizes(2, 30));
  CHECK_FAILS(run("hilo", c.input()), UsageError,
              "hilo: grid is missing, expected lengths of the token grid's axes, row-major, such as 14x14");
  CHECK_FAILS(run("hilo:grid=5x7", c.input()), UsageError,
              "hilo: grid = 5x7, expected lengths whose product is N = 30");
  CHECK_FAILS(run("hilo:grid=5x6,alpha=1.1", c.input()), UsageError, "hilo: alpha = 1.1, expected 0 … 1");
  CHECK_FAILS(run("hilo:grid=5x6,alpha=-0.1", c.input()), UsageError, "hilo: alpha = -0.1, expected 0 … 1");
  CHECK_FAILS(run("hilo:grid=5x6,window=0", c.input()), UsageError, "hilo: window = 0, expected >= 1");
  CHECK_FAILS(run("hilo:grid=5x6", c.input(true)), UsageError,
              "hilo: causal = true, expected false: it is not causal by definition");
  const Case grouped({1, 4, 2, 30, 30, 16, 16});
  CHECK_FAILS(run("hilo:grid=5x6", grouped.input()), Error,
              "hilo: 4 heads of q and 2 of k, expected as many of one as of the other");
}
