// Pooled columns, levels by rank and curves through grids: what pyramids are made of.
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <random>

#include "heed/plan/curve.h"
#include "heed/plan/level_rule.h"
#include "heed/plan/pyramid.h"
#include "support/naive.h"

using namespace heed;
using namespace heed::test;

namespace {

KeyValues key_values(const Case& c) {
  KeyValues kv(c.size.B * c.size.Hk, c.size.D, c.size.Dv, c.size.M, c.arithmetic);
  kv.append(c.k.view(), c.v.view());
  return kv;
}

std::vector<std::int32_t> levels_of(const LevelRule& rule, const std::vector<float>& score, bool logarithms = false) {
  std::vector<std::int32_t> levels(score.size(), -1);
  rule.assign(score.data(), static_cast<Index>(score.size()), logarithms, levels.data(), thread_scratch());
  return levels;
}

}  // namespace

TEST_CASE("pooled columns are true means, with their weights and positions") {
  for (const DType arithmetic : {DType::f32, DType::bf16})
    for (const Index size : {1, 2, 3, 8, 16, 100, 203, 1000}) {
      const Case c({2, 2, 2, 1, 203, 17, 40}, DType::f32, arithmetic);
      const KeyValues kv = key_values(c);
      const PooledColumns pooled = pool_every(kv, 203, size);
      CHECK(pooled.columns() == (203 + size - 1) / size);
      CHECK(pooled.means->size() == pooled.columns());
      const double off = arithmetic == DType::f32 ? 1e-6 : 4e-3;
      std::vector<float> key(17), value(40);
      for (Index head = 0; head < 4; ++head)
        for (Index j = 0; j < pooled.columns(); ++j) {
          const Index from = j * size, to = std::min<Index>(203, from + size);
          CHECK(pooled.position[static_cast<size_t>(j)] == to - 1);
          CHECK(static_cast<double>(pooled.log_weight[static_cast<size_t>(j)]) ==
                doctest::Approx(std::log(static_cast<double>(to - from))));
          pooled.means->read_key(head, j, key.data()), pooled.means->read_value(head, j, value.data());
          double worst = 0;
          for (Index d = 0; d < 17; ++d) {
            double sum = 0;
            for (Index t = from; t < to; ++t) sum += c.k_at(head / 2, head % 2, t, d);
            worst = std::max(worst, std::fabs(static_cast<double>(key[static_cast<size_t>(d)]) -
                                              sum / static_cast<double>(to - from)));
          }
          for (Index e = 0; e < 40; ++e) {
            double sum = 0;
            for (Index t = from; t < to; ++t) sum += c.v_at(head / 2, head % 2, t, e);
            worst = std::max(worst, std::fabs(static_cast<double>(value[static_cast<size_t>(e)]) -
                                              sum / static_cast<double>(to - from)));
          }
          CHECK(worst < 4 * off);
        }
    }
}

TEST_CASE("groups of any tokens are pooled, and a prefix of the tokens alone") {
  const Case c({1, 1, 1, 1, 50, 16, 16});
  const KeyValues kv = key_values(c);
  const std::vector<std::int32_t> order{4, 7, 30, 1, 49};
  const std::vector<Index> begins{0, 3, 5};
  const PooledColumns pooled = pool_groups(kv, order, begins);
  CHECK(pooled.position == std::vector<std::int32_t>{30, 49});
  std::vector<float> key(16);
  pooled.means->read_key(0, 0, key.data());
  for (Index d = 0; d < 16; ++d)
    CHECK(static_cast<double>(key[static_cast<size_t>(d)]) ==
          doctest::Approx((c.k_at(0, 0, 4, d) + c.k_at(0, 0, 7, d) + c.k_at(0, 0, 30, d)) / 3).epsilon(1e-5));
  CHECK(pool_every(kv, 21, 4).columns() == 6);
  CHECK(pool_every(kv, 21, 4).position.back() == 20);
}

TEST_CASE("the likeness of a group's ends") {
  Case c({1, 1, 1, 1, 37, 8, 8});
  for (Index j = 0; j < 37; ++j)
    for (Index d = 0; d < 8; ++d)
      c.k.set(0, 0, j, d, j < 16 ? (d == j % 4 / 2 ? 2.0 + static_cast<double>(j) : 0) : d == 0 ? 1 : 0);
  const KeyValues kv = key_values(c);
  // Tokens 0, 1 of every four lie along one axis and 2, 3 along another; later ones all along one.
  CHECK(end_similarity(kv, 37, 16, 2) == std::vector<float>{1, 1, 1});
  CHECK(end_similarity(kv, 37, 16, 4) == std::vector<float>{0, 1, 1});
  CHECK(end_similarity(kv, 37, 16, 8) == std::vector<float>{0, 1, -1});
  CHECK(end_similarity(kv, 33, 16, 2) == std::vector<float>{1, 1, -1});
}

TEST_CASE("levels by shares of blocks and of importance") {
  const std::vector<LevelBound> bounds{{1, .3}, {2, .5}, {8, .8}};
  const std::vector<float> score{1, 9, 8, 3, 7, 2, 6, 5, 4, 0};
  CHECK(levels_of({bounds, ShareOf::blocks, 0}, score) == std::vector<std::int32_t>{0, 1, 1, 8, 1, 8, 2, 2, 8, 0});
  // Sums of 45: 9 17 24 30 35 39 42 44 45 45; below 13.5, 22.5 and 36 stay 1, 2 and 5 blocks, and one goes beyond.
  CHECK(levels_of({bounds, ShareOf::importance, 0}, score) == std::vector<std::int32_t>{0, 1, 1, 0, 2, 0, 8, 8, 8, 0});
  CHECK(levels_of({bounds, ShareOf::importance, .35}, score) ==
        std::vector<std::int32_t>{0, 1, 1, 0, 1, 0, 1, 8, 8, 0});
  // The best block exceeds every share: the first level has its least, the others nothing.
  CHECK(levels_of({bounds, ShareOf::importance, 0}, {1, 100, 1}) == std::vector<std::int32_t>{0, 1, 0});
  CHECK(levels_of({{{1, 0}, {4, 1}}, ShareOf::blocks, 0}, {5, 5, 5}) == std::vector<std::int32_t>{1, 4, 4});
  CHECK(levels_of({bounds, ShareOf::blocks, 0}, {-3}) == std::vector<std::int32_t>{1});
  const std::vector<float> logs{std::log(1.0f), std::log(9.0f), std::log(8.0f), std::log(2.0f)};
  CHECK(levels_of({bounds, ShareOf::importance, 0}, logs, true) ==
        levels_of({bounds, ShareOf::importance, 0}, {1, 9, 8, 2}));
}

TEST_CASE("the curve visits every token once; its inverse undoes it") {
  for (Index a = 1; a <= 7; ++a)
    for (Index b = 1; b <= 9; ++b)
      for (Index c = 1; c <= 8; ++c) {
        const std::vector<std::int32_t> order = gilbert_order({a, b, c}), back = inverse(order);
        REQUIRE(static_cast<Index>(order.size()) == a * b * c);
        for (size_t i = 0; i < order.size(); ++i) {
          REQUIRE(back[static_cast<size_t>(order[i])] == static_cast<std::int32_t>(i));
          REQUIRE(order[static_cast<size_t>(back[i])] == static_cast<std::int32_t>(i));
        }
      }
}

TEST_CASE("the curve steps to a neighbour, and its runs are compact") {
  const auto steps = [](const Extents& length) {
    const std::vector<std::int32_t> order = gilbert_order(length);
    Index worst = 0;
    for (size_t i = 1; i < order.size(); ++i) {
      const Index x = order[i - 1], y = order[i], plane = length[1] * length[2];
      worst =
          std::max(worst, std::abs(x / plane - y / plane) + std::abs(x % plane / length[2] - y % plane / length[2]) +
                              std::abs(x % length[2] - y % length[2]));
    }
    return worst;
  };
  for (Index a = 2; a <= 16; a += 2)
    for (Index b = 2; b <= 16; b += 2)
      for (Index c = 2; c <= 16; c += 2) {
        CAPTURE(a);
        CAPTURE(b);
        CAPTURE(c);
        CHECK(steps({a, b, c}) == 1);
        if (a == 2) CHECK(steps({1, b, c}) == 1);  // images
      }
  CHECK(steps({1, 1, 9}) == 1);
  CHECK(steps({30, 48, 80}) == 1);  // a video's latents
  for (const Extents& odd : {Extents{3, 5, 7}, Extents{13, 15, 21}, Extents{1, 15, 13}}) CHECK(steps(odd) <= 3);

  // Runs of 64 tokens of 16·16·16: a line by line order spans 4 by 16, the curve about 4 by 4 by 4.
  const std::vector<std::int32_t> order = gilbert_order({16, 16, 16});
  for (size_t run = 0; run < order.size(); run += 64)
    for (const Index divisor : {256, 16, 1}) {
      Index low = 16, high = 0;
      for (size_t i = run; i < run + 64; ++i) {
        const Index x = order[i] / divisor % 16;
        low = std::min(low, x), high = std::max(high, x);
      }
      CHECK(high - low < 8);
    }
}

TEST_CASE("along the curve a video's blocks pool better than line by line") {
  // A smooth random field on 8·16·16: sums of waves about sixteen tokens long.
  constexpr Index n = 2048, d = 32, waves = 24;
  const Extents length{8, 16, 16};
  std::mt19937_64 random(9);
  std::normal_distribution<double> normal;
  std::array<std::vector<std::vector<double>>, 3> fields;
  for (auto& field : fields) {
    field.assign(n, std::vector<double>(d, 0));
    for (Index w = 0; w < waves; ++w) {
      const double a = normal(random) * 0.4, b = normal(random) * 0.4, e = normal(random) * 0.4,
                   phase = 6.28 * normal(random);
      std::vector<double> direction;
      for (Index i = 0; i < d; ++i) direction.push_back(normal(random));
      for (Index t = 0; t < n; ++t) {
        const double x = std::cos(a * static_cast<double>(t / 256) + b * static_cast<double>(t / 16 % 16) +
                                  e * static_cast<double>(t % 16) + phase);
        for (Index i = 0; i < d; ++i)
          field[static_cast<size_t>(t)][static_cast<size_t>(i)] +=
              x * direction[static_cast<size_t>(i)] * std::sqrt(2.0 / waves);
      }
    }
  }
  const auto error = [&](const std::vector<std::int32_t>& order, const std::string& call) {
    Case c({1, 1, 1, n, n, d, d});
    for (Index t = 0; t < n; ++t)
      for (Index i = 0; i < d; ++i) {
        const auto at = [&](size_t f) {
          return fields[f][static_cast<size_t>(order[static_cast<size_t>(t)])][static_cast<size_t>(i)];
        };
        c.q.set(0, 0, t, i, 1.5 * (0.6 * at(0) + 0.8 * at(1))), c.k.set(0, 0, t, i, at(1)), c.v.set(0, 0, t, i, at(2));
      }
    const Got dense = run("dense", c.input()), psa = run(call, c.input());
    double off = 0, all = 0;
    for (size_t i = 0; i < dense.o.size(); ++i) {
      const double x = static_cast<double>(psa.o[i]), y = static_cast<double>(dense.o[i]);
      off += (x - y) * (x - y), all += y * y;
    }
    return std::sqrt(off / all);
  };
  std::vector<std::int32_t> raster(n);
  std::iota(raster.begin(), raster.end(), 0);
  // The gain is in the means: 2·2·2 neighbours are more alike than 8 in a line. Where most blocks are skipped, as by
  // default, skipping makes most of the error, and on rougher fields than this one the curve may even lose.
  const std::vector<std::int32_t> curve = gilbert_order(length);
  const std::string pooled = "psa:query_block=64,block=32,ratios=1:.1,2:.15,8:1",
                    skipped = "psa:query_block=64,block=32";
  CHECK(error(curve, pooled) < 0.5 * error(raster, pooled));
  CHECK(error(curve, skipped) < 0.9 * error(raster, skipped));
}
