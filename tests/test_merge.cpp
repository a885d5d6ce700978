// merge: attention over disjoint sets of keys, put together.
#include <doctest/doctest.h>

#include <cmath>
#include <limits>
#include <random>

#include "heed/exec/merge.h"
#include "support/naive.h"

using namespace heed;
using namespace heed::test;

namespace {

constexpr float inf = std::numeric_limits<float>::infinity();

struct Rows {
  Index count, dv;
  std::vector<float> o, lse;
  Rows(Index rows, Index features)
      : count(rows), dv(features), o(static_cast<size_t>(rows * features), 0), lse(static_cast<size_t>(rows), -inf) {}
  Partial partial() { return {o.data(), lse.data(), count, dv}; }
};

/// One row's softmax over keys [begin, end) of given scores and values, in f64, rounded to f32.
void attend_row(const std::vector<double>& score, const std::vector<double>& value, Index begin, Index end, Rows& out,
                Index row) {
  double top = -INFINITY, sum = 0;
  for (Index j = begin; j < end; ++j) top = std::max(top, score[static_cast<size_t>(j)]);
  if (begin >= end) return;
  std::vector<double> o(static_cast<size_t>(out.dv), 0.0);
  for (Index j = begin; j < end; ++j) {
    const double p = std::exp(score[static_cast<size_t>(j)] - top);
    sum += p;
    for (Index e = 0; e < out.dv; ++e) o[static_cast<size_t>(e)] += p * value[static_cast<size_t>(j * out.dv + e)];
  }
  for (Index e = 0; e < out.dv; ++e)
    out.o[static_cast<size_t>(row * out.dv + e)] = static_cast<float>(o[static_cast<size_t>(e)] / sum);
  out.lse[static_cast<size_t>(row)] = static_cast<float>(top + std::log(sum));
}

void check_close(const Rows& got, const Rows& want) {
  double worst_o = 0, worst_lse = 0;
  for (size_t i = 0; i < got.o.size(); ++i) worst_o = std::max(worst_o, std::fabs(double(got.o[i]) - want.o[i]));
  for (size_t i = 0; i < got.lse.size(); ++i) {
    if (want.lse[i] == -inf) {
      CHECK(got.lse[i] == -inf);
      continue;
    }
    worst_lse = std::max(worst_lse,
                         std::fabs(double(got.lse[i]) - want.lse[i]) / std::max(1.0, std::fabs(double(want.lse[i]))));
  }
  CHECK(worst_o < 2e-5);
  CHECK(worst_lse < 2e-6);
}

}  // namespace

TEST_CASE("three parts merge to the whole, in any order of merging") {
  std::mt19937_64 random(5);
  for (const Index dv : {Index{1}, Index{7}, Index{16}, Index{33}, Index{80}})
    for (const double spread : {1.0, 30.0, 300.0}) {
      const Index rows = 41, keys = 60;
      Rows a(rows, dv), b(rows, dv), c(rows, dv), whole(rows, dv);
      std::normal_distribution<double> normal(0, 1);
      for (Index row = 0; row < rows; ++row) {
        std::vector<double> score(static_cast<size_t>(keys)), value(static_cast<size_t>(keys * dv));
        for (double& x : score) x = spread * normal(random);
        for (double& x : value) x = std::fmod(normal(random), 1.0);
        // Cuts at random: parts are often empty.
        Index first = static_cast<Index>(random() % 61), second = static_cast<Index>(random() % 61);
        if (row % 5 == 0) first = 0;
        if (row % 7 == 0) second = first;
        if (first > second) std::swap(first, second);
        attend_row(score, value, 0, first, a, row);
        attend_row(score, value, first, second, b, row);
        attend_row(score, value, second, keys, c, row);
        attend_row(score, value, 0, keys, whole, row);
      }
      Rows left = a, right = b;
      merge(left.partial(), b.partial());
      merge(left.partial(), c.partial());
      check_close(left, whole);
      merge(right.partial(), c.partial());
      Rows again = a;
      merge(again.partial(), right.partial());
      check_close(again, whole);
      Rows swapped = c;
      merge(swapped.partial(), b.partial());
      merge(swapped.partial(), a.partial());
      check_close(swapped, whole);
    }
}

TEST_CASE("empty rows are the neutral element") {
  Rows a(2, 3), b(2, 3);
  merge(a.partial(), b.partial());
  for (const float x : a.o) CHECK(x == 0);
  for (const float x : a.lse) CHECK(x == -inf);
  b.o = {1, 2, 3, 0, 0, 0};
  b.lse[0] = -500;
  merge(a.partial(), b.partial());
  CHECK(a.o == b.o);
  CHECK(a.lse[0] == -500);
  CHECK(a.lse[1] == -inf);
  merge(a.partial(), Rows(2, 3).partial());
  CHECK(a.o == b.o);
  CHECK(a.lse[0] == -500);
}

TEST_CASE("merge refuses other shapes and writes nothing") {
  Rows a(2, 3), fewer(1, 3), narrower(2, 2);
  a.o = {1, 2, 3, 4, 5, 6};
  a.lse = {0, 1};
  const Rows before = a;
  CHECK_THROWS_AS(merge(a.partial(), fewer.partial()), Error);
  CHECK_THROWS_AS(merge(a.partial(), narrower.partial()), Error);
  CHECK(a.o == before.o);
  CHECK(a.lse == before.lse);
}

TEST_CASE("attention over two halves of the keys merges to attention over all") {
  const Case c({1, 4, 2, 50, 160, 32, 24});
  const auto halves = [&](bool upper) {
    std::vector<std::uint8_t> mask(160);
    for (Index j = 0; j < 160; ++j) mask[static_cast<size_t>(j)] = (j >= 120) == upper;
    return mask;
  };
  const std::vector<std::uint8_t> lower = halves(false), upper = halves(true);
  AttendInput in = c.input(true);
  in.extra["key_mask"] = {lower.data(), DType::u8, {1, 160}};
  Got a = run("dense", in);
  in.extra["key_mask"] = {upper.data(), DType::u8, {1, 160}};
  Got b = run("dense", in);  // its first rows see no key
  merge({a.o.data(), a.lse.data(), 200, 24}, {b.o.data(), b.lse.data(), 200, 24});
  CHECK_AGREES(a, naive_attention(c, dense_sees(c, true)), c);
}
