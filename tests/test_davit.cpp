// davit against its definition: attention inside windows, and attention between channels.
#include <doctest/doctest.h>

#include <numeric>

#include "heed/kernel/kernels.h"
#include "support/differences.h"
#include "support/gradients.h"
#include "support/grids.h"

using namespace heed;
using namespace heed::test;

namespace {

// One head of the definition, channels by tokens, and its weights [D, D].
struct Head {
  std::vector<std::vector<double>> q, k, v, weight;
};

/// A = softmax over j of scale · sum over tokens of q[t][i] · k[t][j].
Head naive_head(const Case& c, Index b, Index h, double scale) {
  const auto& s = c.size;
  const Index g = c.kv_head(h);
  Head head;
  for (Index i = 0; i < s.D; ++i) {
    head.q.emplace_back(), head.k.emplace_back(), head.v.emplace_back();
    for (Index t = 0; t < s.N; ++t) {
      head.q.back().push_back(c.q_at(b, h, t, i));
      head.k.back().push_back(c.k_at(b, g, t, i));
      head.v.back().push_back(c.v_at(b, g, t, i));
    }
  }
  for (const std::vector<double>& query : head.q) {
    std::vector<double>& a = head.weight.emplace_back();
    double most = -INFINITY, sum = 0;
    for (const std::vector<double>& key : head.k) {
      a.push_back(scale * std::inner_product(key.begin(), key.end(), query.begin(), 0.0));
      most = std::max(most, a.back());
    }
    for (double& x : a) sum += x = std::exp(x - most);
    for (double& x : a) x /= sum;
  }
  return head;
}

/// o[t][i] = sum over j of A[i][j] · v[t][j].
std::vector<double> naive_channel(const Case& c, double scale) {
  const auto& s = c.size;
  std::vector<double> o(static_cast<size_t>(s.B * s.Hq * s.N * s.D));
  for (Index b = 0; b < s.B; ++b)
    for (Index h = 0; h < s.Hq; ++h) {
      const Head head = naive_head(c, b, h, scale);
      for (Index t = 0; t < s.N; ++t)
        for (Index i = 0; i < s.D; ++i)
          for (Index j = 0; j < s.D; ++j)
            o[static_cast<size_t>(((b * s.Hq + h) * s.N + t) * s.D + i)] +=
                head.weight[static_cast<size_t>(i)][static_cast<size_t>(j)] *
                head.v[static_cast<size_t>(j)][static_cast<size_t>(t)];
    }
  return o;
}

/// dA = dO·V over tokens; dS = A ∘ (dA - rowsum(dA ∘ A)); dq = scale·dS·k, dk = scale·dS^T·q, dv = A^T·dO.
Gradients naive_channel_gradients(const Case& c, double scale, const Sample& dout) {
  const auto& s = c.size;
  Gradients g;
  g.dq.resize(static_cast<size_t>(s.B * s.Hq * s.N * s.D));
  g.dk.resize(static_cast<size_t>(s.B * s.Hk * s.N * s.D)), g.dv = g.dk;
  for (Index b = 0; b < s.B; ++b)
    for (Index h = 0; h < s.Hq; ++h) {
      const Head head = naive_head(c, b, h, scale);
      const Index q_first = (b * s.Hq + h) * s.N, kv_first = (b * s.Hk + c.kv_head(h)) * s.N;
      for (Index i = 0; i < s.D; ++i) {
        const auto channel = static_cast<size_t>(i);
        std::vector<double> da(static_cast<size_t>(s.D));
        double mean = 0;
        for (size_t j = 0; j < da.size(); ++j) {
          for (Index t = 0; t < s.N; ++t) da[j] += dout.get(b, h, t, i) * head.v[j][static_cast<size_t>(t)];
          mean += da[j] * head.weight[channel][j];
        }
        for (size_t j = 0; j < da.size(); ++j) {
          const double a = head.weight[channel][j], ds = scale * a * (da[j] - mean);
          for (Index t = 0; t < s.N; ++t) {
            const auto token = static_cast<size_t>(t), at = static_cast<size_t>((kv_first + t) * s.D) + j;
            g.dq[static_cast<size_t>((q_first + t) * s.D + i)] += ds * head.k[j][token];
            g.dk[at] += ds * head.q[channel][token];
            g.dv[at] += a * dout.get(b, h, t, i);
          }
        }
      }
    }
  return g;
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

TEST_CASE("davit's channel attention: gradients from the definition") {
  const auto check = [](const Case& c, const std::string& call, double scale, DType dtype = DType::f32,
                        Layout layout = Layout::packed) {
    CAPTURE(call);
    const Sample dout = random_dout(c.size, dtype, layout);
    const Gradients want = naive_channel_gradients(c, scale, dout);
    for (const std::string& isa : available_isas()) {
      const UseIsa use(isa);
      check_gradients(c, forward_backward(call, c.input(), dout).gradients, want);
    }
  };
  for (const DType arithmetic : {DType::f32, DType::bf16}) {
    for (const Index d : {2, 16, 48, 130})
      for (const Index n : {1, 2, 49, 300}) {
        const Case c({1, 3, 3, n, n, d, d}, DType::f32, arithmetic);
        check(c, "davit:kind=channel", 1 / std::sqrt(static_cast<double>(d)));
        check(c, "davit:scale_mode=tokens", 1 / std::sqrt(static_cast<double>(n)));
      }
    for (const DType dtype : {DType::f16, DType::bf16})
      check(Case({2, 4, 2, 259, 259, 33, 33}, dtype, arithmetic, Layout::tokens), "davit:scale_mode=tokens",
            1 / std::sqrt(259.0), dtype, Layout::tokens);
    check(Case({1, 2, 1, 70, 70, 100, 100}, DType::f32, arithmetic, Layout::scattered), "davit", 0.1, DType::f32,
          Layout::reversed);
    check(Case({1, 1, 1, 9001, 9001, 32, 32}, DType::f32, arithmetic), "davit:scale_mode=tokens",
          1 / std::sqrt(9001.0));
  }
}

TEST_CASE("davit: a channel that is alone has one weight, and only values have gradients") {
  const Case c({1, 2, 2, 49, 49, 1, 1});
  const Sample dout = random_dout(c.size);
  const AttendGradients got = gradients("davit", c.input(), dout);
  for (Index h = 0, i = 0; h < 2; ++h)
    for (Index t = 0; t < 49; ++t, ++i) {
      CHECK(got.dv.as<float>()[i] == doctest::Approx(dout.get(0, h, t, 0)).epsilon(1e-6));
      CHECK(std::fabs(got.dq.as<float>()[i]) < 1e-5f);  // rounding of sums of 49
      CHECK(std::fabs(got.dk.as<float>()[i]) < 1e-5f);
    }
}

TEST_CASE("davit's channel attention: gradients are central differences") {
  for (const Sizes& s : {Sizes{1, 2, 1, 7, 7, 5, 5}, Sizes{2, 2, 2, 5, 5, 6, 6}, Sizes{1, 1, 1, 1, 1, 4, 4}})
    for (const std::string call : {"davit", "davit:scale_mode=tokens"}) {
      CAPTURE(call);
      Case c(s);
      const Sample dout = random_dout(s);
      const double scale = 1 / std::sqrt(static_cast<double>(call == "davit" ? s.D : s.N));
      const auto loss = [&] { return loss_of(naive_channel(c, scale), dout); };
      const AttendGradients got = gradients(call, c.input(), dout);
      CHECK_GRADIENT("dq", got.dq, differences(c.q, loss), gradient_tolerance(DType::f32));
      CHECK_GRADIENT("dk", got.dk, differences(c.k, loss), gradient_tolerance(DType::f32));
      CHECK_GRADIENT("dv", got.dv, differences(c.v, loss), gradient_tolerance(DType::f32));
    }
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
  const Sample dout = random_dout(c.size);
  for (const std::string call : {"davit", "davit:kind=window,grid=45x100"}) {
    Tensor first;
    AttendGradients first_gradients;
    for (const int threads : {1, 2, 3}) {
      const UseThreads use(threads);
      AttendOutput got = attend(call, c.input());
      AttendGradients back = gradients(call, c.input(), dout);
      if (threads == 1) {
        first = std::move(got.o), first_gradients = std::move(back);
        continue;
      }
      CHECK(same_bits(got.o, first));
      CHECK(same_bits(back, first_gradients));
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
