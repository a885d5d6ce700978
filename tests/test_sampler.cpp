// Which token follows: greedy, and drawn from the distribution that the options leave.

#include <doctest/doctest.h>

#include <cmath>
#include <limits>
#include <map>

#include "heed/base/error.h"
#include "heed/model/sampler.h"

using namespace heed;
using namespace heed::model;

namespace {

// Share of each token among many draws.
std::map<Token, double> shares(const SamplerOptions& options, const std::vector<float>& logits, int draws = 40000) {
  Sampler sampler(options);
  std::map<Token, double> counted;
  for (int i = 0; i < draws; ++i) counted[sampler.next(logits)] += 1.0 / draws;
  return counted;
}

std::vector<float> logits_of(const std::vector<double>& probabilities) {
  std::vector<float> x;
  for (double p : probabilities) x.push_back(static_cast<float>(std::log(p) + 3));
  return x;
}

void check_shares(const std::map<Token, double>& got, const std::map<Token, double>& want) {
  for (const auto& [token, share] : got) CHECK_MESSAGE(want.count(token) == 1, "token ", token, " drawn");
  for (const auto& [token, share] : want) {
    REQUIRE(got.count(token) == 1);
    CHECK(got.at(token) == doctest::Approx(share).scale(1).epsilon(0.012));
  }
}

}  // namespace

TEST_CASE("temperature 0 takes the largest logit, the lowest id among equals") {
  Sampler sampler({});
  CHECK(sampler.next({1, 5, 5, 2}) == 1);
  CHECK(sampler.next({-3}) == 0);
  const float infinity = std::numeric_limits<float>::infinity();
  CHECK(sampler.next({-infinity, -2, -infinity}) == 1);
  CHECK_THROWS_WITH_AS(sampler.next({}), "logits: none, expected at least one", Error);
}

TEST_CASE("draws follow the tempered distribution") {
  const std::vector<float> x = logits_of({0.1, 0.4, 0.2, 0.3});
  check_shares(shares({.temperature = 1, .seed = 3}, x), {{0, 0.1}, {1, 0.4}, {2, 0.2}, {3, 0.3}});
  // Temperature 0.5 squares the probabilities: 0.01, 0.16, 0.04, 0.09 of 0.3.
  check_shares(shares({.temperature = 0.5, .seed = 3}, x),
               {{0, 0.01 / 0.3}, {1, 0.16 / 0.3}, {2, 0.04 / 0.3}, {3, 0.3}});
}

TEST_CASE("top-k, top-p and min-p leave tokens out, in that order") {
  const std::vector<float> x = logits_of({0.1, 0.4, 0.2, 0.3});
  check_shares(shares({.temperature = 1, .top_k = 2}, x), {{1, 4 / 7.0}, {3, 3 / 7.0}});
  // 0.4 + 0.3 < 0.75 <= 0.4 + 0.3 + 0.2.
  check_shares(shares({.temperature = 1, .top_p = 0.75}, x), {{1, 4 / 9.0}, {3, 3 / 9.0}, {2, 2 / 9.0}});
  // 0.2 >= 0.45 · 0.4 > 0.1.
  check_shares(shares({.temperature = 1, .min_p = 0.45}, x), {{1, 4 / 9.0}, {3, 3 / 9.0}, {2, 2 / 9.0}});
  // Within the best three, 4/9 alone is below 0.7, 7/9 is not; without top-k 0.7 would need exactly two as well,
  // 0.72 would need three.
  check_shares(shares({.temperature = 1, .top_k = 3, .top_p = 0.72}, x), {{1, 4 / 7.0}, {3, 3 / 7.0}});
  check_shares(shares({.temperature = 1, .top_p = 1e-9}, x), {{1, 1}});
  check_shares(shares({.temperature = 1, .min_p = 1}, x), {{1, 1}});
}

TEST_CASE("the seed decides the draws") {
  const std::vector<float> x(100, 0.5f);
  Sampler a({.temperature = 1, .seed = 7}), b({.temperature = 1, .seed = 7}), c({.temperature = 1, .seed = 8});
  int same = 0, other = 0;
  for (int i = 0; i < 50; ++i) {
    const Token t = a.next(x);
    same += t == b.next(x);
    other += t == c.next(x);
  }
  CHECK(same == 50);
  CHECK(other < 10);
}

TEST_CASE("options out of range are refused") {
  CHECK_THROWS_WITH_AS(Sampler({.temperature = -1}), "temperature = -1, expected a number >= 0", UsageError);
  CHECK_THROWS_AS(Sampler({.temperature = std::nan("")}), UsageError);
  CHECK_THROWS_WITH_AS(Sampler({.top_k = -2}), "top_k = -2, expected >= 0", UsageError);
  CHECK_THROWS_WITH_AS(Sampler({.top_p = 0}), "top_p = 0, expected above 0, at most 1", UsageError);
  CHECK_THROWS_AS(Sampler({.top_p = 1.5}), UsageError);
  CHECK_THROWS_WITH_AS(Sampler({.min_p = -0.1}), "min_p = -0.1, expected 0 … 1", UsageError);
}

TEST_CASE("the largest logits come first, ties by id") {
  const auto top = top_logits({1, 3, 2, 3, -1}, 3);
  REQUIRE(top.size() == 3);
  CHECK(top[0] == std::pair<Token, float>{1, 3});
  CHECK(top[1] == std::pair<Token, float>{3, 3});
  CHECK(top[2] == std::pair<Token, float>{2, 2});
  CHECK(top_logits({1, 2}, 9).size() == 2);
  CHECK(top_logits({1, 2}, 0).empty());
}
