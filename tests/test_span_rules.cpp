// Rules for spans: what they keep and lose, and the choice of one for every head under a budget.
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <random>
#include <set>

#include "heed/plan/span_rules.h"
#include "support/naive.h"

using namespace heed;
using namespace heed::test;

namespace {

RuleProblem random_problem(Index layers, Index heads, Index rules, size_t lengths, double share, std::uint64_t seed) {
  std::mt19937_64 random(seed);
  RuleProblem p{.layers = layers, .heads = heads, .rules = rules};
  // Costlier rules lose less, more so in some heads than in others.
  for (size_t k = 0; k < lengths; ++k) {
    auto& cost = p.cost.emplace_back();
    for (Index r = 0; r < rules; ++r) cost.push_back(1 + 2 * r + static_cast<Index>(random() % 3));
    p.most.push_back(
        static_cast<Index>(share * static_cast<double>(layers * heads * *std::max_element(cost.begin(), cost.end()))));
  }
  for (Index h = 0; h < layers * heads; ++h) {
    const double scale = std::exp(static_cast<double>(random() % 300) / 100);
    for (Index r = 0; r < rules; ++r)
      p.loss.push_back(scale * (static_cast<double>(rules - r) + static_cast<double>(random() % 100) / 200));
  }
  return p;
}

double loss_of(const RuleProblem& p, const std::vector<Index>& chosen) {
  double sum = 0;
  for (size_t h = 0; h < chosen.size(); ++h)
    sum += p.loss[h * static_cast<size_t>(p.rules) + static_cast<size_t>(chosen[h])];
  return sum;
}

Index cost_of(const RuleProblem& p, const std::vector<Index>& chosen, size_t k) {
  Index sum = 0;
  for (const Index r : chosen) sum += p.cost[k][static_cast<size_t>(r)];
  return sum;
}

bool few_rules(const RuleProblem& p, const std::vector<Index>& chosen) {
  for (Index layer = 0; layer < p.layers; ++layer) {
    const auto first = chosen.begin() + layer * p.heads;
    if (static_cast<Index>(std::set<Index>(first, first + p.heads).size()) > p.rules_per_layer) return false;
  }
  return true;
}

bool allowed(const RuleProblem& p, const std::vector<Index>& chosen) {
  for (size_t k = 0; k < p.most.size(); ++k) {
    const Index cost = cost_of(p, chosen, k);
    if (cost > p.most[k] || static_cast<double>(cost) < p.least_share * static_cast<double>(p.most[k]) - 1e-9)
      return false;
  }
  return few_rules(p, chosen);
}

/// Least loss of all choices, or infinity.
double brute_force(const RuleProblem& p) {
  std::vector<Index> chosen(static_cast<size_t>(p.layers * p.heads), 0);
  double best = INFINITY;
  for (;;) {
    if (allowed(p, chosen)) best = std::min(best, loss_of(p, chosen));
    size_t at = 0;
    while (at < chosen.size() && ++chosen[at] == p.rules) chosen[at++] = 0;
    if (at == chosen.size()) return best;
  }
}

/// Starts from the cheapest rule and takes the step that gains the most for its cost while it fits.
std::vector<Index> greedy(const RuleProblem& p) {
  std::vector<Index> chosen(static_cast<size_t>(p.layers * p.heads),
                            std::min_element(p.cost[0].begin(), p.cost[0].end()) - p.cost[0].begin());
  for (;;) {
    double best = 0;
    std::vector<Index> next;
    for (size_t h = 0; h < chosen.size(); ++h)
      for (Index r = 0; r < p.rules; ++r) {
        std::vector<Index> trial = chosen;
        trial[h] = r;
        const double gain = loss_of(p, chosen) - loss_of(p, trial);
        const Index cost = cost_of(p, trial, 0) - cost_of(p, chosen, 0);
        if (gain <= 0 || cost_of(p, trial, 0) > p.most[0] || !few_rules(p, trial)) continue;
        const double rate = gain / static_cast<double>(std::max<Index>(cost, 1));
        if (rate > best) best = rate, next = trial;
      }
    if (next.empty()) return chosen;
    chosen = next;
  }
}

}  // namespace

TEST_CASE("the choice of rules is the best there is") {
  int feasible = 0;
  for (std::uint64_t seed = 0; seed < 12; ++seed)
    for (const size_t lengths : {1, 2})
      for (const auto& [layers, heads] : {std::pair<Index, Index>{1, 4}, {2, 2}, {4, 1}, {2, 3}}) {
        const Index rules = layers * heads == 6 ? 4 : 6;  // 1296 or 4096 choices
        for (const double share : {0.35, 0.6}) {
          RuleProblem p = random_problem(layers, heads, rules, lengths, share, seed);
          p.rules_per_layer = seed % 4 == 3 ? 1 : 2;
          const double best = brute_force(p);
          if (best == INFINITY) {
            CHECK_THROWS_AS(choose_rules(p), Error);
            continue;
          }
          ++feasible;
          const std::vector<Index> chosen = choose_rules(p);
          CHECK(allowed(p, chosen));
          CHECK(loss_of(p, chosen) == doctest::Approx(best).epsilon(1e-12));
        }
      }
  CHECK(feasible > 100);
}

TEST_CASE("the choice keeps to its budget, to two rules a layer, and is no worse than a greedy one") {
  for (std::uint64_t seed = 0; seed < 4; ++seed)
    for (const double share : {0.3, 0.5, 0.7}) {
      const RuleProblem p = random_problem(6, 5, 9, 1, share, seed);
      const std::vector<Index> chosen = choose_rules(p);
      CHECK(allowed(p, chosen));
      CHECK(loss_of(p, chosen) <= loss_of(p, greedy(p)) + 1e-9);
    }
  // Large enough for sums to be rounded: still within the budget at every length, and not worse than greedy by much.
  for (const size_t lengths : {1, 3}) {
    RuleProblem p = random_problem(12, 9, 20, lengths, 0.5, 7);
    for (auto& cost : p.cost)
      for (Index& x : cost) x *= 37;
    for (Index& most : p.most) most *= 37;
    const std::vector<Index> chosen = choose_rules(p);
    CHECK(allowed(p, chosen));
    if (lengths == 1) CHECK(loss_of(p, chosen) <= loss_of(p, greedy(p)) * 1.005);
  }
}

TEST_CASE("candidate rules fit their lengths") {
  const auto rules =
      candidate_rules({.shortest = 512, .longest = 2048, .extended = 4096, .alpha_step = 256, .betas = 9});
  std::set<std::pair<double, double>> want;
  for (int alpha = -512; alpha <= 2048; alpha += 256)
    for (int b = 0; b <= 8; ++b) {
      const double beta = b / 8.0;
      if (alpha + beta * 512 > 0 && alpha + beta * 2048 <= 2048 && alpha + beta * 4096 <= 4096)
        want.insert({alpha, beta});
    }
  std::set<std::pair<double, double>> got;
  for (const SpanRule& r : rules) got.insert({r.alpha, r.beta});
  CHECK(got == want);
  CHECK(got.size() == rules.size());
  CHECK(got.count({0, 1}) == 1);  // dense
  CHECK_FAILS(candidate_rules({.shortest = 512, .longest = 256}), Error,
              "lengths = 512, 256, 16384, expected ascending ones >= 1");
  CHECK_FAILS(candidate_rules({.alpha_step = 0}), Error, "alpha_step = 0, expected >= 1");
}

TEST_CASE("kept blocks and lost influence are those of the mask") {
  std::mt19937_64 random(3);
  for (const Index tokens : {64, 512, 1000, 2048})
    for (const SpanRule rule :
         {SpanRule{0, 1}, SpanRule{0, 0.125}, SpanRule{-512, 0.5}, SpanRule{300, 0.25}, SpanRule{1024, 0}}) {
      const Index n = (tokens + 63) / 64;
      const Index window = std::max<Index>(
          1,
          static_cast<Index>(std::floor(rule.alpha / 64) + std::floor(rule.beta * static_cast<double>(tokens) / 64)));
      std::vector<float> influence;
      for (Index i = 0; i < n * n; ++i) influence.push_back(static_cast<float>(random() % 1000) / 1000);
      double lost = 0;
      Index last_row = 0;
      for (Index u = 0; u < n; ++u)
        for (Index v = 0; v <= u; ++v) {
          const bool kept = v == 0 || v > u - window;
          if (!kept) lost += static_cast<double>(influence[static_cast<size_t>(u * n + v)]);
          if (kept && u == n - 1) ++last_row;
        }
      CHECK(lost_influence(influence, rule, tokens, 64) == doctest::Approx(lost));
      CHECK(kept_blocks(rule, tokens, 64) == last_row);
    }
}

TEST_CASE("a choice that cannot be made is refused") {
  RuleProblem p = random_problem(1, 2, 3, 1, 0.5, 1);
  p.most[0] = 1;
  CHECK_FAILS(choose_rules(p), Error, "budget = 1, expected one that 3 rules for 2 heads can use 0.9 of");
  p.rules_per_layer = 3;
  CHECK_FAILS(choose_rules(p), Error, "rules_per_layer = 3, expected 1 or 2");
  p.loss.pop_back();
  CHECK_FAILS(choose_rules(p), Error, "loss: 5 values, expected 6");
}
