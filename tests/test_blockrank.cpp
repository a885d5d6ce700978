// blockrank against its mask and its scores: documents see the instruction and themselves, the query section
// everything.
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <random>

#include "heed/kernel/kernels.h"
#include "support/naive.h"

using namespace heed;
using namespace heed::test;

namespace {

using Lengths = std::vector<std::int32_t>;

Index total(const Lengths& lengths) { return std::accumulate(lengths.begin(), lengths.end(), Index{0}); }

AttendInput with_segments(const Case& c, const Lengths& lengths) {
  AttendInput in = c.input();
  in.extra["seg_lens"] = {lengths.data(), DType::i32, {static_cast<Index>(lengths.size())}};
  return in;
}

/// The segment of each token.
std::vector<Index> segment_of(const Lengths& lengths) {
  std::vector<Index> of;
  for (size_t s = 0; s < lengths.size(); ++s)
    of.insert(of.end(), static_cast<size_t>(lengths[s]), static_cast<Index>(s));
  return of;
}

Sees blockrank_sees(const Lengths& lengths) {
  const std::vector<Index> of = segment_of(lengths);
  const auto last = static_cast<Index>(lengths.size()) - 1;
  return [of, last](Index, Index, Index t, Index j) {
    const Index a = of[static_cast<size_t>(t)], b = of[static_cast<size_t>(j)];
    return j <= t && (a == b || b == 0 || a == last);
  };
}

/// [B, documents]
std::vector<double> naive_scores(const Case& c, const Lengths& lengths, Index signals) {
  const auto& s = c.size;
  const std::vector<Index> of = segment_of(lengths);
  const auto documents = static_cast<Index>(lengths.size()) - 2;
  std::vector<double> scores(static_cast<size_t>(s.B * documents), 0);
  for (Index b = 0; b < s.B; ++b)
    for (Index h = 0; h < s.Hq; ++h)
      for (Index t = s.N - signals; t < s.N; ++t) {
        std::vector<double> p(static_cast<size_t>(s.N), 0);
        double sum = 0;
        for (Index j = 0; j < s.N; ++j) {
          if (of[static_cast<size_t>(j)] < 1 || of[static_cast<size_t>(j)] > documents) continue;
          double z = 0;
          for (Index d = 0; d < s.D; ++d) z += c.q_at(b, h, t, d) * c.k_at(b, c.kv_head(h), j, d);
          sum += p[static_cast<size_t>(j)] = std::exp(z / std::sqrt(static_cast<double>(s.D)));
        }
        for (Index j = 0; j < s.N; ++j)
          if (p[static_cast<size_t>(j)] > 0)
            scores[static_cast<size_t>(b * documents + of[static_cast<size_t>(j)] - 1)] +=
                p[static_cast<size_t>(j)] / sum / static_cast<double>(s.Hq * signals);
      }
  return scores;
}

std::vector<float> scores_of(const AttendOutput& out) {
  const Tensor& x = out.extra.at("scores");
  return {x.as<float>(), x.as<float>() + x.size()};
}

void check_blockrank(const Case& c, const Lengths& lengths, Index signals = 2) {
  CAPTURE(c.describe());
  const std::string call = fmt::format("blockrank:signal_tokens={}", signals);
  const Naive want = naive_attention(c, blockrank_sees(lengths));
  const std::vector<double> scores = naive_scores(c, lengths, signals);
  for (const std::string& isa : available_isas()) {
    const UseIsa use(isa);
    const AttendInput in = with_segments(c, lengths);
    const Got got = run(call, in);
    CHECK_AGREES(got, want, c);
    CHECK(got.stats.pairs == want.pairs);
    const AttendOutput out = attend(call, in);
    const std::vector<float> found = scores_of(out);
    REQUIRE(found.size() == scores.size());
    CHECK(out.extra.at("scores").shape() == Shape{c.size.B, static_cast<Index>(lengths.size()) - 2});
    double worst = 0;
    for (size_t i = 0; i < scores.size(); ++i)
      worst = std::max(worst, std::fabs(static_cast<double>(found[i]) - scores[i]));
    CHECK(worst < (c.arithmetic == DType::bf16 ? 1e-3 : 1e-5));
    for (Index b = 0; b < c.size.B; ++b) {
      const auto first = found.begin() + b * static_cast<Index>(lengths.size() - 2);
      CHECK(std::accumulate(first, first + static_cast<Index>(lengths.size()) - 2, 0.0) ==
            doctest::Approx(1).epsilon(1e-5));
    }
  }
}

/// The case with the segments of its document in another order.
Case permuted(const Case& c, const Lengths& lengths, const std::vector<size_t>& order, Lengths& out) {
  std::vector<Index> begins{0};
  for (const std::int32_t x : lengths) begins.push_back(begins.back() + x);
  std::vector<Index> tokens;
  out.clear();
  for (const size_t s : order) {
    out.push_back(lengths[s]);
    for (Index t = begins[s]; t < begins[s + 1]; ++t) tokens.push_back(t);
  }
  Case moved = c;
  for (Index h = 0; h < c.size.Hq; ++h)
    for (Index t = 0; t < c.size.N; ++t)
      for (Index d = 0; d < c.size.D; ++d) {
        const Index from = tokens[static_cast<size_t>(t)];
        moved.q.set(0, h, t, d, c.q.get(0, h, from, d));
        if (h < c.size.Hk)
          moved.k.set(0, h, t, d, c.k.get(0, h, from, d)), moved.v.set(0, h, t, d, c.v.get(0, h, from, d));
      }
  return moved;
}

}  // namespace

TEST_CASE("blockrank equals its mask, and scores its documents") {
  for (const DType arithmetic : {DType::f32, DType::bf16})
    for (const Lengths& lengths :
         {Lengths{20, 31, 1, 64, 17, 70, 9}, Lengths{0, 5, 90, 2}, Lengths{130, 200, 3, 140, 30}, Lengths{3, 1, 2}}) {
      const Index n = total(lengths);
      check_blockrank(Case({1, 4, 1, n, n, 33, 16}, DType::f32, arithmetic), lengths);
      check_blockrank(Case({2, 8, 2, n, n, 16, 40}, DType::bf16, arithmetic, Layout::scattered), lengths, 1);
      check_blockrank(Case({1, 2, 2, n, n, 128, 8}, DType::f16, arithmetic, Layout::reversed), lengths);
    }
  const Lengths lengths{100, 333, 257, 10, 411, 60};
  check_blockrank(Case({1, 2, 1, total(lengths), total(lengths), 8, 8}), lengths, 16);
}

TEST_CASE("blockrank with one document, or none named, is dense causal") {
  const Case c({1, 4, 2, 200, 200, 32, 32});
  const Naive dense = naive_attention(c, dense_sees(c, true));
  CHECK_AGREES(run("blockrank", with_segments(c, {40, 130, 30})), dense, c);
  // Fewer than three segments.
  for (const std::string call : {"blockrank:segment=100", "blockrank:segment=150", "blockrank:segment=9000"}) {
    const Got got = run(call, c.input());
    CHECK_AGREES(got, dense, c);
    CHECK(got.stats.pairs == dense.pairs);
    CHECK(attend(call, c.input()).extra.empty());
  }
}

TEST_CASE("blockrank: segments of equal length are named by a parameter") {
  const Case c({1, 2, 1, 200, 200, 16, 16});
  for (const auto& [segment, lengths] : std::vector<std::pair<Index, Lengths>>{
           {64, {64, 64, 64, 8}}, {50, {50, 50, 50, 50}}, {33, {33, 33, 33, 33, 33, 33, 2}}}) {
    const std::string call = fmt::format("blockrank:segment={}", segment);
    CHECK(same_bits(run(call, c.input()).o, run("blockrank", with_segments(c, lengths)).o));
    CHECK(same_bits(scores_of(attend(call, c.input())), scores_of(attend("blockrank", with_segments(c, lengths)))));
  }
  // A last segment shorter than signal_tokens: what there is of it.
  CHECK(scores_of(attend("blockrank:segment=199,signal_tokens=5", Case({1, 2, 1, 399, 399, 16, 16}).input())).size() ==
        1);
}

TEST_CASE("blockrank: the order of documents only orders the scores") {
  const Lengths lengths{24, 31, 50, 17, 64, 40, 30};
  const Index n = total(lengths);
  const Case c({1, 4, 2, n, n, 32, 32});
  const AttendOutput before = attend("blockrank", with_segments(c, lengths));
  const std::vector<float> scores = scores_of(before);
  std::mt19937_64 random(9);
  for (int trial = 0; trial < 5; ++trial) {
    std::vector<size_t> order{0, 1, 2, 3, 4, 5, 6};
    std::shuffle(order.begin() + 1, order.end() - 1, random);
    Lengths moved_lengths;
    const Case moved = permuted(c, lengths, order, moved_lengths);
    const AttendOutput after = attend("blockrank", with_segments(moved, moved_lengths));
    const std::vector<float> moved_scores = scores_of(after);
    double worst = 0;
    for (size_t i = 0; i < moved_scores.size(); ++i)
      worst = std::max(worst, static_cast<double>(std::fabs(moved_scores[i] - scores[order[i + 1] - 1])));
    CHECK(worst < 1e-6);
    // The query section stands where it stood and hears the same, in another order of summation.
    double moved_most = 0;
    for (Index h = 0; h < 4; ++h)
      for (Index i = (h * n + n - 30) * 32; i < (h + 1) * n * 32; ++i)
        moved_most =
            std::max(moved_most, static_cast<double>(std::fabs(after.o.as<float>()[i] - before.o.as<float>()[i])));
    CHECK(moved_most < 5e-6);
  }
}

TEST_CASE("blockrank: no document's output depends on another document, or on the query section") {
  const Lengths lengths{24, 100, 50, 170, 64, 30};
  const Index n = total(lengths);
  const std::vector<Index> of = segment_of(lengths);
  const Case c({1, 4, 2, n, n, 16, 16});
  const Got before = run("blockrank", with_segments(c, lengths));
  for (Index s = 1; s < 6; ++s) {
    Case changed = c;
    for (Index t = 0; t < n; ++t)
      if (of[static_cast<size_t>(t)] == s)
        for (Index d = 0; d < 16; ++d) {
          for (Index h = 0; h < 4; ++h) changed.q.set(0, h, t, d, -7);
          for (Index g = 0; g < 2; ++g) changed.k.set(0, g, t, d, 20), changed.v.set(0, g, t, d, 500);
        }
    const Got after = run("blockrank", with_segments(changed, lengths));
    Index differing = 0;
    for (Index h = 0; h < 4; ++h)
      for (Index t = 0; t < n; ++t) {
        if (of[static_cast<size_t>(t)] == s || of[static_cast<size_t>(t)] == 5) continue;
        const auto row = static_cast<size_t>(h * n + t);
        differing += std::memcmp(&before.o[row * 16], &after.o[row * 16], 64) != 0 || before.lse[row] != after.lse[row];
      }
    CHECK_MESSAGE(differing == 0, differing, " rows outside segment ", s, " changed");
  }
  // Inside a document, and in the query section, later tokens change nothing.
  for (const Index t : {10, 60, 150, 300, 420}) {
    Case changed = c;
    for (Index j = t + 1; j < n; ++j)
      for (Index d = 0; d < 16; ++d)
        for (Index g = 0; g < 2; ++g) changed.k.set(0, g, j, d, 20), changed.v.set(0, g, j, d, 500);
    const Got after = run("blockrank", with_segments(changed, lengths));
    for (Index h = 0; h < 4; ++h)
      CHECK(std::memcmp(&before.o[static_cast<size_t>(h * n * 16)], &after.o[static_cast<size_t>(h * n * 16)],
                        static_cast<size_t>(t + 1) * 64) == 0);
  }
}

TEST_CASE("blockrank: cost grows linearly with the number of documents") {
  // The sheet's example: instruction and documents of 160 tokens, 100 tokens of query.
  const auto count = [](Index documents) {
    Lengths lengths(static_cast<size_t>(documents) + 2, 160);
    lengths.back() = 100;
    const Index n = total(lengths);
    const Case c({1, 1, 1, n, n, 1, 1});
    return run("blockrank", with_segments(c, lengths)).stats;
  };
  const AttendStats at50 = count(50), at100 = count(100), at200 = count(200);
  // Each further document adds the same.
  CHECK(at200.pairs - at100.pairs == 2 * (at100.pairs - at50.pairs));
  CHECK(at100.pairs - at50.pairs == 50 * (160 * 160 + 160 * 161 / 2 + 100 * 160));
  CHECK(static_cast<double>(at100.pairs) == doctest::Approx(5.5e6).epsilon(0.02));
  CHECK(static_cast<double>(at200.pairs) <= 2.2 * static_cast<double>(at100.pairs));
  CHECK(static_cast<double>(at200.pairs_computed) <= 2.2 * static_cast<double>(at100.pairs_computed));
  CHECK(static_cast<double>(at200.tiles_visited) <= 2.2 * static_cast<double>(at100.tiles_visited));
}

TEST_CASE("blockrank: the same bits for any number of threads") {
  const Lengths lengths{100, 150, 90, 170, 190};
  for (const std::string& isa : available_isas()) {
    const UseIsa use(isa);
    const Case c({2, 4, 2, total(lengths), total(lengths), 16, 16});
    Got first;
    std::vector<float> scores;
    for (const int n : {1, 2, 3}) {
      const UseThreads threads(n);
      const Got got = run("blockrank", with_segments(c, lengths));
      const std::vector<float> found = scores_of(attend("blockrank", with_segments(c, lengths)));
      if (n == 1) first = got, scores = found;
      CHECK(same_bits(got.o, first.o));
      CHECK(same_bits(got.lse, first.lse));
      CHECK(same_bits(found, scores));
    }
  }
}

TEST_CASE("blockrank refuses segments that do not fit") {
  const Case c({1, 2, 2, 100, 100, 16, 16});
  CHECK_FAILS(run("blockrank", c.input()), Error,
              "blockrank: tensor seg_lens is missing, expected [S], tokens of each segment, or segment >= 1");
  CHECK_FAILS(run("blockrank", with_segments(c, {10, 20, 30})), Error,
              "seg_lens: 60 tokens in all, expected the 100 of q");
  CHECK_FAILS(run("blockrank", with_segments(c, {50, 50})), Error,
              "seg_lens: 2 segments, expected at least 3: instruction, documents and query section");
  CHECK_FAILS(run("blockrank", with_segments(c, {10, 0, 80, 10})), Error,
              "seg_lens: document 0 holds 0 tokens, expected at least 1");
  CHECK_FAILS(run("blockrank", with_segments(c, {-1, 91, 10})), Error,
              "seg_lens: the instruction holds -1 tokens, expected at least 0");
  CHECK_FAILS(run("blockrank", with_segments(c, {10, 89, 1})), Error,
              "seg_lens: the query section holds 1 tokens, expected at least signal_tokens = 2");
  CHECK_FAILS(run("blockrank:segment=10", with_segments(c, {10, 80, 10})), UsageError,
              "blockrank: segment = 10, expected 0 beside the tensor seg_lens");
  CHECK_FAILS(run("blockrank:signal_tokens=0", c.input()), UsageError, "blockrank: signal_tokens = 0, expected >= 1");
  CHECK_FAILS(run("blockrank", Case({1, 2, 2, 50, 100, 16, 16}).input()), Error,
              "blockrank: 50 queries and 100 keys, expected as many of one as of the other");
}
