// Influence maps against what hiding a key really does: the key is taken away from its row, the other weights grow to
// one again, and the loss is computed once more.
#include <doctest/doctest.h>

#include <cmath>
#include <cstring>
#include <random>

#include "heed/base/threads.h"
#include "heed/exec/influence.h"
#include "support/cases.h"
#include "support/naive.h"

using namespace heed;
using namespace heed::test;

namespace {

// Dense causal attention of one head, f64, and what its rows give when key `hidden` of row `row` is taken away.
struct Head {
  const Case& c;
  Index h;
  std::vector<double> weights(Index i, Index hidden = -1) const {
    std::vector<double> w;
    double sum = 0;
    for (Index j = 0; j <= i; ++j) {
      double s = 0;
      for (Index f = 0; f < c.size.D; ++f) s += c.q_at(0, h, i, f) * c.k_at(0, h / (c.size.Hq / c.size.Hk), j, f);
      w.push_back(j == hidden ? 0 : std::exp(s / std::sqrt(static_cast<double>(c.size.D))));
      sum += w.back();
    }
    if (sum > 0)
      for (double& x : w) x /= sum;
    return w;
  }
  std::vector<double> output(Index i, Index hidden = -1) const {
    const std::vector<double> w = weights(i, hidden);
    std::vector<double> o(static_cast<size_t>(c.size.Dv), 0);
    for (Index j = 0; j <= i; ++j)
      for (Index f = 0; f < c.size.Dv; ++f)
        o[static_cast<size_t>(f)] += w[static_cast<size_t>(j)] * c.v_at(0, h / (c.size.Hq / c.size.Hk), j, f);
    return o;
  }
};

struct Kept {
  Tensor o, lse, dout;
  InfluenceInput input(const Case& c) const {
    return {c.q.view(),
            c.k.view(),
            c.v.view(),
            o.view(),
            dout.view(),
            lse.view(),
            static_cast<float>(1 / std::sqrt(static_cast<double>(c.size.D)))};
  }
};

// What attention gave, and a gradient of the loss per row: `slope(head, row, o)`.
template <class Slope>
Kept keep(const Case& c, const Slope& slope) {
  AttendInput in = c.input();
  in.causal = true;
  AttendOutput out = attend(MechanismCall::parse("dense"), in);
  Kept kept{std::move(out.o), std::move(out.lse), Tensor(DType::f32, {1, c.size.Hq, c.size.N, c.size.Dv})};
  for (Index h = 0; h < c.size.Hq; ++h)
    for (Index i = 0; i < c.size.N; ++i) {
      const std::vector<double> g = slope(h, i, Head{c, h}.output(i));
      for (Index f = 0; f < c.size.Dv; ++f)
        kept.dout.as<float>()[(h * c.size.N + i) * c.size.Dv + f] = static_cast<float>(g[static_cast<size_t>(f)]);
    }
  return kept;
}

}  // namespace

TEST_CASE("influence is what hiding a key changes in a linear loss") {
  for (const Index n : {1, 15, 16, 70, 131}) {
    const Case c({1, 4, 2, n, n, 12, 20});
    std::mt19937_64 random(static_cast<std::uint64_t>(n));
    std::normal_distribution<double> normal;
    std::vector<std::vector<std::vector<double>>> slopes(4);  // of the loss Σ <slope_i, o_i>
    for (auto& head : slopes)
      for (Index i = 0; i < n; ++i) {
        auto& row = head.emplace_back();
        for (int f = 0; f < 20; ++f) row.push_back(normal(random));
      }
    const Kept kept = keep(c, [&](Index h, Index i, const std::vector<double>&) {
      return slopes[static_cast<size_t>(h)][static_cast<size_t>(i)];
    });
    for (const Index block : {16, 64, 100}) {
      const Tensor got = influence_map(kept.input(c), block);
      const Index blocks = (n + block - 1) / block;
      REQUIRE(got.shape() == Shape{1, 4, blocks, blocks});
      for (Index h = 0; h < 4; ++h) {
        const Head head{c, h};
        std::vector<double> want(static_cast<size_t>(blocks * blocks), 0);
        for (Index i = 0; i < n; ++i) {
          const std::vector<double> all = head.output(i);
          for (Index j = 0; j <= i; ++j) {
            const std::vector<double> less = head.output(i, j);  // zeros where no key is left
            double change = 0;
            for (size_t f = 0; f < all.size(); ++f)
              change += slopes[static_cast<size_t>(h)][static_cast<size_t>(i)][f] * (less[f] - all[f]);
            want[static_cast<size_t>(i / block * blocks + j / block)] += std::abs(change);
          }
        }
        for (Index at = 0; at < blocks * blocks; ++at)
          CHECK(static_cast<double>(got.as<float>()[h * blocks * blocks + at]) ==
                doctest::Approx(want[static_cast<size_t>(at)]).epsilon(1e-4));
      }
    }
  }
}

// The loss bends: then the formula is the first order of a small change. Scaled down, it must match.
TEST_CASE("influence is the first order of what hiding a key changes in any loss") {
  const Index n = 40;
  const Case c({1, 2, 1, n, n, 8, 8});
  const double small = 1e-3;
  const auto loss = [&](const std::vector<double>& o) {
    double sum = 0;
    for (size_t f = 0; f < o.size(); ++f) sum += std::sin(small * o[f] + static_cast<double>(f));
    return sum;
  };
  const Kept kept = keep(c, [&](Index, Index, const std::vector<double>& o) {
    std::vector<double> g;
    for (size_t f = 0; f < o.size(); ++f) g.push_back(small * std::cos(small * o[f] + static_cast<double>(f)));
    return g;
  });
  const Tensor got = influence_map(kept.input(c), 1);  // every pair alone
  for (Index h = 0; h < 2; ++h) {
    double most = 0;
    for (Index i = 0; i < n * n; ++i) most = std::max(most, static_cast<double>(got.as<float>()[h * n * n + i]));
    for (Index i = 0; i < n; ++i)
      for (Index j = 0; j <= i; ++j) {
        const Head head{c, h};
        const double change = std::abs(loss(head.output(i, j)) - loss(head.output(i)));
        CHECK(std::abs(static_cast<double>(got.as<float>()[(h * n + i) * n + j]) - change) < 1e-3 * most);
      }
  }
}

TEST_CASE("an influence map has the same bits for any number of threads, and refuses what does not fit") {
  const Case c({1, 4, 2, 90, 90, 12, 12});
  const Kept kept = keep(c, [](Index h, Index i, std::vector<double> o) {
    for (double& x : o) x = std::sin(static_cast<double>(h + i) + x);
    return o;
  });
  const int before = threads();
  set_threads(1);
  const Tensor one = influence_map(kept.input(c), 16);
  set_threads(3);
  const Tensor three = influence_map(kept.input(c), 16);
  set_threads(before);
  CHECK(std::memcmp(one.data(), three.data(), static_cast<size_t>(one.bytes())) == 0);
  InfluenceInput in = kept.input(c);
  in.lse.shape = {1, 4, 89};
  CHECK_FAILS(influence_map(in, 16), Error, "lse: shape = [1, 4, 89], expected [1, 4, 90]");
  CHECK_FAILS(influence_map(kept.input(c), 0), Error, "block = 0, expected >= 1");
}
