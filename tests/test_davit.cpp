// davit against its definition: attention inside windows, and attention between channels.
#include <doctest/doctest.h>

#include <numeric>

#include "heed/kernel/kernels.h"
#include "support/grids.h"

using namespace heed;
using namespace heed::test;

namespace {

/// A = softmax over j of scale · sum over tokens of q[t][i] · k[t][j]; o[t][i] = sum over j of A[i][j] · v[t][j].
std::vector<double> naive_channel(const Case& c, double scale) {
  const auto& s = c.size;
  std::vector<double> o(static_cast<size_t>(s.B * s.Hq * s.N * s.D));
  for (Index b = 0; b < s.B; ++b)
    for (Index h = 0; h < s.Hq; ++h) {
      const Index g = c.kv_head(h);
      std::vector<std::vector<double>> q, k, v;  // [channel][token]
      for (Index i = 0; i < s.D; ++i) {
        q.emplace_back(), k.emplace_back(), v.emplace_back();
        for (Index t = 0; t < s.N; ++t) {
          q.back().push_back(c.q_at(b, h, t, i));
          k.back().push_back(c.k_at(b, g, t, i));
          v.back().push_back(c.v_at(b, g, t, i));
        }
      }
      for (Index i = 0; i < s.D; ++i) {
        std::vector<double> a;
        double most = -INFINITY, sum = 0;
        for (const std::vector<double>& key : k) {
          a.push_back(scale * std::inner_product(key.begin(), key.end(), q[static_cast<size_t>(i)].begin(), 0.0));
          most = std::max(most, a.back());
        }
        for (double& x : a) sum += x = std::exp(x - most);
        for (Index t = 0; t < s.N; ++t) {
          double& out = o[static_cast<size_t>(((b * s.Hq + h) * s.N + t) * s.D + i)];
          for (size_t j = 0; j < a.size(); ++j) out += a[j] / sum * v[j][static_cast<size_t>(t)];
        }
      }
    }
  return o;
}

/// Largest difference in units of the head's largest output.
double channel_error(const AttendOutput& got, const std::vector<double>& want, const Case& c) {
  REQUIRE(got.o.shape() == Shape{c.size.B, c.size.Hq, c.size.N, c.size.D});
  const size_t head = static_cast<size_t>(c.size.N * c.size.D);
  double worst = 0;
  for (size_t first = 0; first < want.size(); first += head) {
    double largest = 0, error = 0;
    for (size_t i = first; i < first + head; ++i) {
      largest = std::max(largest, std::fabs(want[i]));
      const double e = std::fabs(got.o.as<float>()[i] - want[i]);
      error = e <= error ? error : e;  // a NaN stays
    }
    worst = error / largest <= worst ? worst : error / largest;
  }
  return worst;
}

/// On every instruction set.
void check_channel(const Case& c, const std::string& call, double scale) {
  const std::vector<double> want = naive_channel(c, scale);
  CAPTURE(call);
  for (const std::string& isa : available_isas()) {
    const UseIsa use(isa);
    const AttendOutput got = attend(call, c.input());
    const double error = channel_error(got, want, c);
    CHECK_MESSAGE(error <= (c.arithmetic == DType::bf16 ? 2e-2 : 1e-5), c.describe(), ": ", error);
    CHECK(got.lse.size() == 0);  // it has none
    CHECK(got.stats.pairs == c.size.B * c.size.Hq * c.size.D * c.size.D);
  }
}

Sees window_sees(const std::vector<Index>& grid, Index window) {
  return [grid, window](Index, Index, Index t, Index j) {
    const std::vector<Index> x = coordinates(grid, t), y = coordinates(grid, j);
    bool same = true;
    for (size_t a = 0; a < grid.size(); ++a) same = same && x[a] / window == y[a] / window;
    return same;
  };
}

}  // namespace

TEST_CASE("davit's channel attention equals its definition") {
  for (const DType arithmetic : {DType::f32, DType::bf16}) {
    for (const Index d : {16, 32, 48})
      for (const Index n : {1, 2, 49, 300}) {
        const Case c({1, 3, 3, n, n, d, d}, DType::f32, arithmetic);
        check_channel(c, "davit:kind=channel", 1 / std::sqrt(static_cast<double>(d)));
        check_channel(c, "davit:scale_mode=tokens", 1 / std::sqrt(static_cast<double>(n)));
      }
    check_channel(Case({2, 4, 2, 259, 259, 33, 33}, DType::f16, arithmetic, Layout::tokens), "davit",
                  1 / std::sqrt(33.0));
    check_channel(Case({1, 1, 1, 5, 5, 100, 100}, DType::f32, arithmetic, Layout::scattered), "davit", 0.1);
    // More than one slab of tokens: sums of thousands must keep their digits.
    check_channel(Case({1, 1, 1, 9001, 9001, 32, 32}, DType::f32, arithmetic), "davit", 1 / std::sqrt(32.0));
  }
  const Case c({1, 2, 2, 77, 77, 16, 16});
  AttendInput in = c.input();
  in.scale = 0.07f;
  for (const std::string call : {"davit", "davit:scale_mode=tokens"})  // a scale that is given stands
    CHECK(channel_error(attend(call, in), naive_channel(c, 0.07f), c) < 1e-5);
}

TEST_CASE("davit's channel attention moves with its tokens") {
  const Case c({1, 2, 2, 150, 150, 32, 32});
  Case moved = c;
  const auto from = [](Index t) { return t * 7 % 150; };
  for (Index h = 0; h < 2; ++h)
    for (Index t = 0; t < 150; ++t)
      for (Index d = 0; d < 32; ++d) {
        moved.q.set(0, h, t, d, c.q.get(0, h, from(t), d));
        moved.k.set(0, h, t, d, c.k.get(0, h, from(t), d));
        moved.v.set(0, h, t, d, c.v.get(0, h, from(t), d));
      }
  const AttendOutput a = attend("davit", c.input()), b = attend("davit", moved.input());
  float worst = 0;
  for (Index h = 0; h < 2; ++h)
    for (Index t = 0; t < 150; ++t)
      for (Index d = 0; d < 32; ++d)
        worst = std::max(
            worst, std::fabs(b.o.as<float>()[(h * 150 + t) * 32 + d] - a.o.as<float>()[(h * 150 + from(t)) * 32 + d]));
  CHECK(worst < 5e-6);
}

TEST_CASE("davit: rows of the channels' weights sum to 1") {
  Case c({1, 2, 2, 90, 90, 32, 32});
  for (Index h = 0; h < 2; ++h)
    for (Index t = 0; t < 90; ++t)
      for (Index d = 0; d < 32; ++d) c.v.set(0, h, t, d, 1);
  const AttendOutput got = attend("davit", c.input());
  for (Index i = 0; i < got.o.size(); ++i) CHECK(got.o.as<float>()[i] == doctest::Approx(1).epsilon(1e-6));
}

TEST_CASE("davit's window attention equals its definition") {
  struct Setting {
    std::vector<Index> grid;
    Index window;
  };
  const Setting settings[] = {{{14, 14}, 7}, {{15, 20}, 7}, {{20, 15}, 4}, {{9, 31}, 12},
                              {{1, 40}, 3},  {{64, 4}, 1},  {{233}, 7},    {{5, 6, 7}, 3}};
  for (const DType arithmetic : {DType::f32, DType::bf16})
    for (const Setting& s : settings) {
      const Index n = std::accumulate(s.grid.begin(), s.grid.end(), Index{1}, std::multiplies<>());
      const std::string call = fmt::format("davit:kind=window,grid={},window={}", fmt::join(s.grid, "x"), s.window);
      CAPTURE(call);
      for (const Index group : {1, 4}) {
        const Case c({1, 4, 4 / group, n, n, 33, 24}, DType::f32, arithmetic);
        const Naive want = naive_attention(c, window_sees(s.grid, s.window));
        for (const std::string& isa : available_isas()) {
          const UseIsa use(isa);
          const Got got = run(call, c.input());
          CHECK_AGREES(got, want, c);
          CHECK(got.stats.pairs == want.pairs);
        }
      }
    }
}

TEST_CASE("davit's window attention with one window is dense attention") {
  const Case c({1, 2, 2, 143, 143, 32, 32});
  const Naive want = naive_attention(c, dense_sees(c, false));
  for (const Index window : {13, 14, 1000000000})
    CHECK_AGREES(run(fmt::format("davit:kind=window,grid=11x13,window={}", window), c.input()), want, c);
}

TEST_CASE("davit: the same bits for any number of threads") {
  const Case c({2, 4, 2, 4500, 4500, 16, 16});
  for (const std::string call : {"davit", "davit:kind=window,grid=45x100"}) {
    std::vector<float> first;
    for (const int threads : {1, 2, 3}) {
      const UseThreads use(threads);
      const AttendOutput got = attend(call, c.input());
      const std::vector<float> o(got.o.as<float>(), got.o.as<float>() + got.o.size());
      if (threads == 1) first = o;
      CHECK(same_bits(o, first));
    }
  }
}

TEST_CASE("davit refuses what it cannot mean") {
  const Case c({1, 2, 2, 30, 30, 16, 8});
  CHECK_FAILS(run("davit", c.input()), Error,
              "v: head size 8, expected that of q, 16, where channels attend to channels");
  CHECK_FAILS(run("davit:kind=window", c.input()), UsageError,
              "davit: grid is missing, expected lengths of the token grid's axes, such as 14x14");
  CHECK_FAILS(run("davit:kind=window,grid=5x6,window=0", c.input()), UsageError, "davit: window = 0, expected >= 1");
  CHECK_FAILS(run("davit:kind=window,grid=5x5", c.input()), UsageError,
              "davit: grid = 5x5, expected lengths whose product is N = 30");
  CHECK_FAILS(run("davit:kind=both", c.input()), UsageError, "davit: kind = both, expected one of channel, window");
  CHECK_FAILS(run("davit", c.input(true)), UsageError,
              "davit: causal = true, expected false: it is not causal by definition");
  const Case unequal({1, 2, 2, 30, 31, 16, 16});
  CHECK_FAILS(run("davit", unequal.input()), Error,
              "davit: 30 queries and 31 keys, expected as many of one as of the other");
}
