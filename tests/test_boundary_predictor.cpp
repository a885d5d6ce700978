// dhsa's boundary predictor against its equations, and what it is to learn against the whole attention map.
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <tuple>

#include "heed/kernel/kernels.h"
#include "heed/mechanism/boundary_predictor.h"
#include "support/boundary_predictor.h"
#include "support/naive.h"

using namespace heed;
using namespace heed::test;

namespace {

// [N][C]: the keys of all KV heads side by side.
std::vector<std::vector<double>> key_rows(const Case& c, Index b) {
  std::vector<std::vector<double>> rows(static_cast<size_t>(c.size.N));
  for (Index t = 0; t < c.size.N; ++t)
    for (Index h = 0; h < c.size.Hk; ++h)
      for (Index f = 0; f < c.size.D; ++f) rows[static_cast<size_t>(t)].push_back(c.k_at(b, h, t, f));
  return rows;
}

AttendInput with(const Case& c, const PredictorWeights& w) {
  AttendInput in = c.input();
  in.extra = w.tensors();
  return in;
}

std::vector<float> logits_of(const Case& c, const PredictorWeights& w, Index half, Index heads, Index b = 0) {
  const CheckedCall call = check(MechanismCall::parse("dhsa"), with(c, w));
  return mechanism::BoundaryPredictor::of(call.inputs, half, heads)->logits(b);
}

void check_predictor(const Case& c, const PredictorWeights& w, Index half, Index heads) {
  CAPTURE(c.describe());
  const Index n = c.size.N;
  for (Index b = 0; b < c.size.B; ++b) {
    const std::vector<float> got = logits_of(c, w, half, heads, b);
    const std::vector<std::vector<double>> keys = key_rows(c, b);
    REQUIRE(static_cast<Index>(got.size()) == n);
    for (Index i = 0; i < n; ++i) {
      const auto logit = static_cast<double>(got[static_cast<size_t>(i)]);
      if (i < half - 1 || i >= n - half) CHECK(logit == -100);
      else CHECK(std::fabs(logit - naive_boundary_logit(keys, i, half, heads, w)) < 2e-5);
    }
  }
}

}  // namespace

TEST_CASE("the boundary predictor equals its equations") {
  for (const std::string& isa : available_isas()) {
    const UseIsa use(isa);
    for (const Index n : {1, 7, 8, 9, 70, 71, 72, 140})
      check_predictor(Case({1, 4, 2, n, n, 18, 16}), PredictorWeights(36, 20, 1), 4, 4);
    check_predictor(Case({2, 6, 3, 75, 75, 64, 16}, DType::f16, DType::f32, Layout::tokens),
                    PredictorWeights(192, 256, 2), 4, 4);
    check_predictor(Case({1, 2, 1, 66, 66, 35, 16}, DType::f32, DType::bf16), PredictorWeights(35, 1, 3), 3, 7);
    check_predictor(Case({1, 2, 2, 50, 50, 40, 16}), PredictorWeights(80, 70, 4), 1, 1);
    check_predictor(Case({1, 2, 2, 90, 90, 32, 16}), PredictorWeights(64, 65, 5), 16, 64);
  }
}

TEST_CASE("the boundary predictor: the same bits for any number of threads, and in the plan") {
  const Case c({2, 4, 2, 500, 500, 32, 16});
  const PredictorWeights w(64, 64, 6);
  std::vector<float> both = logits_of(c, w, 4, 4, 0);
  for (const int count : {1, 3}) {
    const UseThreads threads(count);
    CHECK(same_bits(logits_of(c, w, 4, 4), both));
  }
  const std::vector<float> second = logits_of(c, w, 4, 4, 1);
  both.insert(both.end(), second.begin(), second.end());
  // dhsa cuts where the predictor says, and where given logits say when both are there.
  const std::string call = "dhsa:budget=100,global=16,local=16,query_block=32,threshold=0.2,nms_radius=2";
  AttendInput given = c.input();
  given.extra["boundary_logits"] = {both.data(), DType::f32, {2, 500}};
  const Got want = run(call, given), predicted = run(call, with(c, w)), even = run(call, c.input());
  CHECK(same_bits(predicted.o, want.o));
  CHECK_FALSE(same_bits(even.o, want.o));
  const PredictorWeights other(64, 64, 7);
  given.extra.merge(other.tensors());
  CHECK(same_bits(run(call, given).o, want.o));
  CHECK_FALSE(same_bits(run(call + ",predictor_heads=8", with(c, w)).o, want.o));
}

TEST_CASE("a predictor that does not fit is refused") {
  const Case c({1, 2, 2, 40, 40, 16, 16});
  const auto bad = [&](const std::string& call, const PredictorWeights& w, const char* without,
                       const std::string& message, bool usage = false) {
    AttendInput in = with(c, w);
    if (without != nullptr) in.extra.erase(without);
    if (usage) CHECK_FAILS(run(call, in), UsageError, message);
    else CHECK_FAILS(run(call, in), Error, message);
  };
  const PredictorWeights w(32, 8, 1), wide(48, 8, 1);
  bad("dhsa", w, "predictor_norm",
      "dhsa: tensor predictor_norm is missing, expected all of the predictor's or none: predictor_score was given");
  bad("dhsa", w, "predictor_score",
      "dhsa: tensor predictor_score is missing, expected all of the predictor's or none: predictor_hidden was given");
  bad("dhsa", wide, nullptr, "predictor_qkv: shape = [3, 48, 48], expected [3, 32, 32]: [3, C, C], C = Hk·D");
  AttendInput in = with(c, w);
  in.extra["predictor_score"] = {w.score.data(), DType::f32, {5}};
  CHECK_FAILS(run("dhsa", in), Error,
              "predictor_score: shape = [5], expected [9]: [H + 1], H as predictor_hidden has it");
  in = with(c, w);
  in.extra["predictor_hidden"] = {w.hidden.data(), DType::f32, {128, 8}};
  CHECK_FAILS(run("dhsa", in), Error, "predictor_hidden: shape = [128, 8], expected [130, 8]: [4C + 2, H], C = Hk·D");
  bad("dhsa:predictor_heads=5", w, nullptr,
      "dhsa: predictor_heads = 5, expected a divisor of the 32 features of a token's keys", true);
}

TEST_CASE("boundary labels are those of the whole attention map") {
  for (const std::string& isa : available_isas()) {
    const UseIsa use(isa);
    Index ones = 0, zeros = 0, near = 0;
    for (const auto& [n, half, hk] : {std::tuple{Index{1}, Index{4}, Index{1}},
                                      {15, 4, 2},
                                      {16, 4, 2},
                                      {17, 4, 1},
                                      {61, 1, 4},
                                      {130, 4, 2},
                                      {133, 7, 2}}) {
      // Large scores: some keys are heard far more than others.
      const Case c({2, 4, hk, n, n, 24, 8}, DType::f32, n == 130 ? DType::bf16 : DType::f32, Layout::packed, 5, 2);
      const NamedTensors got = calibrate(MechanismCall::parse(fmt::format("dhsa:half_window={}", half)), c.input());
      const Tensor &labels = got.at("labels"), &keys = got.at("keys");
      REQUIRE(labels.shape() == Shape{2, n});
      REQUIRE(keys.shape() == Shape{2, n, hk * 24});
      for (Index b = 0; b < 2; ++b) {
        const std::vector<std::vector<double>> rows = key_rows(c, b);
        std::vector<double> a(static_cast<size_t>(n * n), 0.0);
        for (Index h = 0; h < 4; ++h)
          for (Index i = 0; i < n; ++i) {
            std::vector<double> p;
            double sum = 0;
            for (Index j = 0; j <= i; ++j) {
              double s = 0;
              for (Index f = 0; f < 24; ++f) s += c.q_at(b, h, i, f) * c.k_at(b, c.kv_head(h), j, f);
              p.push_back(std::exp(s / std::sqrt(24.0)));
              sum += p.back();
            }
            for (Index j = 0; j <= i; ++j) a[static_cast<size_t>(i * n + j)] += p[static_cast<size_t>(j)] / sum / 4;
          }
        for (Index i = 0; i < n; ++i) {
          for (size_t f = 0; f < rows[0].size(); ++f)
            CHECK(static_cast<double>(keys.as<float>()[(b * n + i) * hk * 24 + static_cast<Index>(f)]) ==
                  rows[static_cast<size_t>(i)][f]);
          const float label = labels.as<float>()[b * n + i];
          if (i < 2 * half - 1 || i >= n - 2 * half) {
            CHECK(label == -1);
            continue;
          }
          double past = 0, future = 0;
          for (Index r = i + half; r < n; ++r)
            for (Index j = i - half + 1; j <= i + half; ++j)
              (j <= i ? past : future) += a[static_cast<size_t>(r * n + j)];
          const double ratio = (std::max(past, future) + 1e-6) / (std::min(past, future) + 1e-6);
          if (std::fabs(ratio - 2) < 1e-4) {
            ++near;
            continue;
          }
          CHECK(label == (ratio >= 2 ? 1.0f : 0.0f));
          ++(ratio >= 2 ? ones : zeros);
        }
      }
    }
    CHECK(ones > 50);
    CHECK(zeros > 50);
    CHECK(near < 10);
  }
}

TEST_CASE("boundary labels: the same for any number of threads") {
  const Case c({1, 6, 2, 300, 300, 16, 16});
  NamedTensors first;
  for (const int count : {1, 2, 5}) {
    const UseThreads threads(count);
    NamedTensors got = calibrate(MechanismCall::parse("dhsa"), c.input());
    if (count == 1) first = std::move(got);
    else
      for (const char* name : {"keys", "labels"})
        CHECK(std::memcmp(got.at(name).data(), first.at(name).data(), static_cast<size_t>(first.at(name).bytes())) ==
              0);
  }
}
