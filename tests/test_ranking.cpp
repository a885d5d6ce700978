// The cut of a ranking of all pairs of a row and a block against a full sort.
#include <doctest/doctest.h>

#include <limits>
#include <random>

#include "heed/plan/ranking.h"
#include "support/ranking.h"

using namespace heed;
using namespace heed::test;

TEST_CASE("the cut of a ranking is that of a full sort") {
  std::mt19937_64 random(11);
  std::normal_distribution<float> normal;
  for (int trial = 0; trial < 120; ++trial) {
    const Index rows = 1 + static_cast<Index>(random() % 90), blocks = 1 + static_cast<Index>(random() % 40);
    const int kind = trial % 4;  // spread, few values, huge and tiny ones, nearly equal
    std::vector<float> scores(static_cast<size_t>(rows * blocks));
    for (float& x : scores) {
      x = normal(random);
      if (kind == 1) x = std::round(x);
      if (kind == 2) x = std::copysign(std::exp(20 * x), normal(random));
      if (kind == 3) x = 1000 + 1e-3f * x;
    }
    std::vector<std::int32_t> own;
    std::vector<Pair> ranked;
    double least = INFINITY, most = -INFINITY, own_sum = 0, sum = 0;
    for (Index t = 0; t < rows; ++t) {
      own.push_back(static_cast<std::int32_t>(random() % static_cast<std::uint64_t>(blocks)));
      for (Index b = 0; b < blocks; ++b) {
        const double x = scores[static_cast<size_t>(t * blocks + b)];
        least = std::min(least, x), most = std::max(most, x), sum += x;
        if (b == own.back()) own_sum += x;
        else ranked.push_back({x, b, t});
      }
    }
    sum -= least * static_cast<double>(rows * blocks), own_sum -= least * static_cast<double>(rows);
    sort_pairs(ranked);
    for (const double mass : {0.0, 0.07, 0.25, 0.6, 0.93, 1.0}) {
      const size_t end = prefix(ranked, least, most, own_sum, sum, mass);
      const RankCut cut = cut_at_mass(
          [&](const auto& visit) {
            for (Index t = rows; t-- > 0;) visit(t, scores.data() + t * blocks);  // the order of rows does not matter
          },
          blocks, own, mass);
      WantedBlocks wanted(rows, blocks, thread_scratch());
      for (Index t = 0; t < rows; ++t) wanted.want_ranked(t, t, scores.data() + t * blocks, cut);
      std::vector<char> in(static_cast<size_t>(rows * blocks), 0), want = in;
      for (size_t i = 0; i < end; ++i) want[static_cast<size_t>(ranked[i].token * blocks + ranked[i].block)] = 1;
      for (Index b = 0; b < blocks; ++b) {
        const Set list = wanted.rows_of(b);
        for (Index i = 0; i < list.count; ++i) in[static_cast<size_t>(list[i] * blocks + b)] = 1;
      }
      for (Index t = 0; t < rows; ++t) {
        const auto at = static_cast<size_t>(t * blocks + own[static_cast<size_t>(t)]);
        in[at] = want[at] = 0;  // own pairs are not ranked
      }
      INFO("trial ", trial, " mass ", mass);
      CHECK(in == want);
    }
  }
}
