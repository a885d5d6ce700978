// dhsa against its equations: chunks, pooled scores, lists under a budget, softmax over them.
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>

#include "heed/kernel/kernels.h"
#include "heed/plan/chunks.h"
#include "support/boundary_predictor.h"
#include "support/dhsa.h"
#include "support/naive.h"
#include "support/segments.h"

using namespace heed;
using namespace heed::test;

namespace {

void check_dhsa(const Case& c, const DhsaOptions& o, const Logits& logits = {}) {
  const std::string call = o.call();
  CAPTURE(call);
  const Got got = run(call, with(c, logits));
  const Naive want = naive_dhsa(c, o, logits);
  CHECK_AGREES(got, want, c);
  Index undecided = 0;
  for (const char u : want.undecided) undecided += u;
  if (undecided == 0) CHECK(got.stats.pairs == want.pairs);
  CHECK(undecided * 3 <= static_cast<Index>(want.undecided.size()));
}

std::vector<Index> ends(const std::vector<BlockRange>& chunks) {
  std::vector<Index> x;
  for (const BlockRange& c : chunks) x.push_back(c.end);
  return x;
}

}  // namespace

TEST_CASE("dhsa equals its equations") {
  for (const std::string& isa : available_isas()) {
    const UseIsa use(isa);
    for (const DType arithmetic : {DType::f32, DType::bf16})
      for (const Index n : {1, 31, 60, 61, 64, 200, 333})
        for (const bool learned : {false, true})
          check_dhsa(Case({1, 4, 2, n, n, 33, 16}, DType::f32, arithmetic), {},
                     learned ? random_logits(n, 3) : Logits{});
    for (const Index heads : {1, 4}) {
      check_dhsa(Case({2, 4, heads, 259, 259, 64, 40}, DType::f32, DType::f32, Layout::tokens), {.budget = 100},
                 random_logits(518, 4));
      check_dhsa(Case({2, 4, heads, 259, 259, 80, 24}, DType::f16),
                 {.budget = 70, .query_block = 17, .chunks_per_block = 3, .dense_tail = 0});
    }
  }
}

TEST_CASE("dhsa: pooling, budgets and forced tokens") {
  const Case c({1, 2, 1, 300, 300, 24, 16});
  const Logits logits = random_logits(300, 6);
  for (const std::string pooling : {"avg_norm", "avg", "max"})
    for (const Index budget : {24, 25, 90, 299})
      for (const bool learned : {false, true})
        check_dhsa(c, {.budget = budget, .pooling = pooling}, learned ? logits : Logits{});
  check_dhsa(c, {.global = 0, .local = 0}, logits);
  check_dhsa(c, {.global = 60, .local = 0}, logits);
  check_dhsa(c, {.query_block = 64, .global = 0, .local = 5}, logits);  // rows that miss their own key
  check_dhsa(c, {.nms_radius = 0, .threshold = -5}, logits);
  check_dhsa(c, {.chunks_per_block = 1, .nms_radius = 20, .dense_tail = 100}, logits);
  for (const std::string pooling : {"avg_norm", "avg", "max"})
    for (const bool learned : {false, true})
      check_dhsa(c, {.query_block = 20, .chunks_per_block = 3, .pooling = pooling, .strict = true},
                 learned ? logits : Logits{});
  check_dhsa(Case({2, 4, 2, 259, 259, 40, 24}), {.local = 3, .dense_tail = 0, .strict = true}, random_logits(518, 4));
  check_dhsa(Case({1, 1, 1, 7, 7, 16, 16}),
             {.budget = 4, .query_block = 2, .chunks_per_block = 2, .global = 1, .local = 1, .dense_tail = 1},
             random_logits(7, 1));  // shorter than the predictor's two windows
}

TEST_CASE("dhsa with a budget of all keys, or dense to its first row, is dense") {
  const Case c({1, 4, 2, 300, 300, 32, 32});
  const Naive dense = naive_attention(c, dense_sees(c, true));
  for (const std::string call :
       {"dhsa:budget=300", "dhsa:budget=4000", "dhsa:budget=256,dense_tail=300", "dhsa:budget=256,dense_tail=999"})
    for (const bool learned : {false, true}) {
      const Logits logits = learned ? random_logits(300, 2) : Logits{};
      const Got got = run(call, with(c, logits));
      const std::string differs = difference(got, dense, c, 1e-5);
      CHECK_MESSAGE(differs.empty(), differs);
      CHECK(got.stats.pairs == dense.pairs);
    }
}

TEST_CASE("chunks partition the tokens and keep their distance") {
  for (const Index n : {1, 3, 8, 100, 1000})
    for (const Index radius : {0, 3, 8})
      for (const Index forced : {Index{-1}, n - 1, n / 2, n}) {
        const Logits logits = random_logits(n, static_cast<std::uint64_t>(n + radius));
        const PeakRule rule{.most = 20, .threshold = 1.1, .radius = radius, .margin = 4, .forced = forced};
        const std::vector<BlockRange> chunks = cut_at_peaks(logits, rule);
        Index at = 0, last = -1000;
        for (const BlockRange& c : chunks) {
          CHECK(c.begin == at);
          CHECK(c.end > c.begin);
          at = c.end;
          if (c.end == n) continue;
          const Index end = c.end - 1;
          CHECK(end - last > radius);
          if (end != forced) CHECK((logits[static_cast<size_t>(end)] > 1.1f && end >= 3 && end < n - 4));
          if (forced >= 0 && forced < n) CHECK(end <= forced);
          last = end;
        }
        CHECK(at == n);
        CHECK(static_cast<Index>(chunks.size()) <= 22);
      }
  // By rank: 9 beats its neighbours 8 and 10; 20 and 30 are equal and the lower wins the last place.
  Logits logits(40, 0.0f);
  logits[8] = 4, logits[9] = 5, logits[10] = 4, logits[20] = 3, logits[30] = 3;
  CHECK(ends(cut_at_peaks(logits, {.most = 2, .threshold = 1, .radius = 2, .margin = 1, .forced = -1})) ==
        std::vector<Index>{10, 21, 40});
  CHECK(ends(cut_at_peaks(logits, {.most = 9, .threshold = 3, .radius = 0, .margin = 1, .forced = 25})) ==
        std::vector<Index>{9, 10, 11, 26, 40});
  CHECK(ends(cut_at_peaks(Logits(7, 9.0f), {.most = 9, .threshold = 1, .radius = 0, .margin = 4, .forced = -1})) ==
        std::vector<Index>{7});
  // In order: the first of neighbours, and of the first t tokens at most t/10.
  CHECK(ends(cut_at_peaks(logits, {.most = 1, .threshold = 1, .radius = 2, .margin = 1, .forced = -1, .per = 10})) ==
        std::vector<Index>{10, 21, 31, 40});
  CHECK(ends(cut_at_peaks(logits, {.most = 1, .threshold = 1, .radius = 1, .margin = 1, .forced = 31, .per = 8})) ==
        std::vector<Index>{9, 21, 32, 40});
  CHECK(ends(cut_evenly(10, 4)) == std::vector<Index>{4, 8, 10});
}

TEST_CASE("pooled chunks: naive means, and what a doubled chunk scores") {
  const Sizes s{1, 1, 2, 48, 48, 20, 16};
  Case c(s);
  // Tokens 30 … 39 repeat 20 … 29.
  for (Index h = 0; h < 2; ++h)
    for (Index j = 30; j < 40; ++j)
      for (Index d = 0; d < 20; ++d) c.k.set(0, h, j, d, c.k.get(0, h, j - 10, d));
  KeyValues kv(2, 20, 16, 48, DType::f32);
  const auto heads = [](const Sample& x) {
    const TensorView v = x.view();
    return TensorView{v.data, v.dtype, {v.shape[1], v.shape[2], v.shape[3]}, {v.stride[1], v.stride[2], v.stride[3]}};
  };
  kv.append(heads(c.k), heads(c.v));
  const Problem problem{.B = 1, .Hq = 2, .Hk = 2, .N = 48, .M = 48, .D = 20, .Dv = 16, .causal = true};
  const std::vector<BlockRange> chunks{{20, 30}, {20, 40}, {0, 1}, {3, 48}};
  for (const auto& [pooling, factor] :
       {std::pair{Pooling::avg_norm, std::sqrt(2.0)}, {Pooling::avg, 1.0}, {Pooling::max, 1.0}}) {
    const std::vector<float> panels = pool_keys(kv, problem, 0, chunks, pooling);
    for (size_t i = 0; i < chunks.size(); ++i)
      for (Index d = 0; d < 20; ++d) {
        double sum = 0, most = -INFINITY;
        for (Index t = chunks[i].begin; t < chunks[i].end; ++t) {
          const double mean = (c.k_at(0, 0, t, d) + c.k_at(0, 1, t, d)) / 2;
          sum += mean, most = std::max(most, mean);
        }
        const double count = static_cast<double>(chunks[i].size());
        const double want = pooling == Pooling::max   ? most
                            : pooling == Pooling::avg ? sum / count
                                                      : sum / std::sqrt(count);
        CHECK(static_cast<double>(panels[static_cast<size_t>(d * 64) + i]) == doctest::Approx(want).epsilon(1e-5));
      }
    for (Index d = 0; d < 20; ++d)
      CHECK(static_cast<double>(panels[static_cast<size_t>(d * 64) + 1]) ==
            doctest::Approx(factor * static_cast<double>(panels[static_cast<size_t>(d * 64)])).epsilon(1e-5));
  }
}

TEST_CASE("dhsa's softmax is causal; its selection looks ahead, as the method does") {
  const DhsaOptions o{.chunks_per_block = 1, .dense_tail = 0};  // 8 chunk ends at most
  const Case c({1, 2, 1, 256, 256, 16, 16});
  const Logits logits = random_logits(256, 8);
  const Got before = run(o.call(), with(c, logits));
  const auto rows_changed = [&](const Got& after, Index from, Index to) {
    Index count = 0;
    for (Index h = 0; h < 2; ++h)
      for (Index t = from; t < to; ++t)
        count += std::memcmp(&before.o[static_cast<size_t>((h * 256 + t) * 16)],
                             &after.o[static_cast<size_t>((h * 256 + t) * 16)], 64) != 0
                     ? 1
                     : 0;
    return count;
  };
  // Lists do not depend on values: later ones change nothing.
  for (const Index t : {0, 40, 130, 200}) {
    Case changed = c;
    for (Index j = t + 1; j < 256; ++j)
      for (Index d = 0; d < 16; ++d) changed.v.set(0, 0, j, d, 500);
    CHECK(rows_changed(run(o.call(), with(changed, logits)), 0, t + 1) == 0);
  }
  // (i) Queries of the same block steer the list, those of later blocks do not.
  Case queries = c;
  for (Index t = 210; t < 256; ++t)
    for (Index d = 0; d < 16; ++d) queries.q.set(0, 0, t, d, -9), queries.q.set(0, 1, t, d, 7);
  const Got steered = run(o.call(), with(queries, logits));
  CHECK(rows_changed(steered, 0, 192) == 0);
  CHECK(rows_changed(steered, 192, 210) > 0);
  // (iii) A boundary found late takes the place of an earlier one.
  Logits late = logits;
  for (size_t i = 200; i < 250; i += 10) late[i] = 50;
  CHECK(rows_changed(run(o.call(), with(c, late)), 0, 190) > 0);
  // (ii) A chunk that reaches past the block is scored with what lies there: with one chunk end at 59, chunk
  // [59, 256) competes with [0, 59) for the places of block [64, 96).
  Logits one(256, 0.0f);
  one[58] = 5;
  const DhsaOptions wide{.budget = 40, .global = 0, .local = 8, .dense_tail = 0};
  const Got straddling = run(wide.call(), with(c, one));
  Index changed_rows = 0;
  for (const double sign : {-1.0, 1.0}) {
    Case later = c;
    for (Index j = 96; j < 256; ++j)
      for (Index d = 0; d < 16; ++d) {
        double mean = 0;
        for (Index t = 64; t < 96; ++t) mean += c.q_at(0, 0, t, d) + c.q_at(0, 1, t, d);
        later.k.set(0, 0, j, d, sign * mean);
      }
    const Got got = run(wide.call(), with(later, one));
    for (Index t = 64; t < 96; ++t)
      changed_rows +=
          std::memcmp(&got.o[static_cast<size_t>(t * 16)], &straddling.o[static_cast<size_t>(t * 16)], 64) != 0 ? 1 : 0;
  }
  CHECK(changed_rows > 0);
}

TEST_CASE("strictly causal dhsa looks ahead no farther than a block of queries, and the predictor's windows") {
  constexpr Index n = 256, d = 16;
  const Case c({1, 2, 1, n, n, d, d});
  const Logits logits = random_logits(n, 8);
  const PredictorWeights predictor(d, 24, 9);
  for (const Index block : {1, 32}) {
    const DhsaOptions o{.query_block = block, .chunks_per_block = 1, .dense_tail = 0, .strict = true};
    for (const bool learned : {false, true}) {
      const auto outputs = [&](const Case& of, const Logits& given) {
        AttendInput in = with(of, given);
        if (learned) in.extra = predictor.tensors();
        return run(o.call(), in).o;
      };
      const std::vector<float> before = outputs(c, logits);
      // Of the first `end` rows, those that a change of all keys and queries from `from` on, and of all logits from
      // `end` on, has changed.
      const auto rows_changed = [&](Index end, Index from) {
        Case changed = c;
        for (Index t = from; t < n; ++t)
          for (Index f = 0; f < d; ++f) {
            changed.k.set(0, 0, t, f, 3 - c.k_at(0, 0, t, f));
            for (Index h = 0; h < 2; ++h) changed.q.set(0, h, t, f, 7);
          }
        Logits later = logits;
        for (Index t = end; t < n; ++t) later[static_cast<size_t>(t)] += 3;
        const std::vector<float> after = outputs(changed, later);
        Index count = 0;
        for (Index row = 0; row < 2 * n; ++row)
          count += row % n < end && std::memcmp(&before[static_cast<size_t>(row * d)],
                                                &after[static_cast<size_t>(row * d)], 4 * d) != 0
                       ? 1
                       : 0;
        return count;
      };
      for (const Index end : {64, 96, 160, 224}) {
        CHECK(rows_changed(end, end + (learned ? o.half_window : 0)) == 0);
        CHECK(rows_changed(end, end - 1) > 0);
      }
    }
  }
}

TEST_CASE("dhsa: chunks at true segment ends recall more than even ones") {
  constexpr Index n = 2048, block = 32, trials = 3;
  double even = 0, dynamic = 0;
  std::mt19937_64 random(17);
  for (Index trial = 0; trial < trials; ++trial) {
    const Segments s(n, 16, block, random);
    Logits truth;
    for (Index i = 0; i < n; ++i)
      truth.push_back(s.ends_after(i) ? 5 + static_cast<float>(s.segment_of[static_cast<size_t>(i)] % 7) : -5.0f);
    const DhsaOptions o{.budget = 96,
                        .query_block = block,
                        .chunks_per_block = 1,
                        .nms_radius = 4,
                        .threshold = 1.1,
                        .global = 0,
                        .local = block,
                        .dense_tail = 0};
    const MechanismCall call = MechanismCall::parse(o.call());
    // From row 1024 on the budget is scarce.
    even += s.recall(plan_of(call, s.c.input()), 1024) / trials;
    dynamic += s.recall(plan_of(call, with(s.c, truth)), 1024) / trials;
  }
  CAPTURE(even);
  CAPTURE(dynamic);
  CHECK(dynamic >= even + 0.1);
}

TEST_CASE("dhsa: the same bits for any number of threads") {
  for (const std::string& isa : available_isas()) {
    const UseIsa use(isa);
    for (const Index n : {200, 700}) {
      const Case c({2, 4, 2, n, n, 16, 16});
      const Logits logits = random_logits(2 * n, 9);
      Got first;
      for (const int count : {1, 2, 3}) {
        const UseThreads threads(count);
        const Got got = run(DhsaOptions{}.call(), with(c, logits));
        if (count == 1) first = got;
        CHECK(same_bits(got.o, first.o));
        CHECK(same_bits(got.lse, first.lse));
      }
    }
  }
}

TEST_CASE("dhsa refuses what it cannot mean") {
  const Case c({1, 1, 1, 300, 300, 16, 16});
  CHECK_FAILS(run("dhsa:budget=255", c.input()), UsageError,
              "dhsa: budget = 255, expected at least global + local = 256");
  CHECK_FAILS(run("dhsa:budget=0", c.input()), UsageError, "dhsa: budget = 0, expected >= 1");
  CHECK_FAILS(run("dhsa:query_block=4", c.input()), UsageError,
              "dhsa: chunks_per_block = 8, expected at most query_block = 4");
  CHECK_FAILS(run("dhsa:pooling=sum", c.input()), UsageError,
              "dhsa: pooling = sum, expected one of avg_norm, avg, max");
  CHECK_NOTHROW(run("dhsa:budget=100", Case({1, 1, 1, 100, 100, 16, 16}).input()));  // nothing to choose
  CHECK_FAILS(run("dhsa", Case({1, 1, 1, 8, 9, 16, 16}).input()), Error,
              "dhsa: 8 queries and 9 keys, expected as many of one as of the other");
  const Logits logits = random_logits(299, 1);
  AttendInput in = c.input();
  in.extra["boundary_logits"] = {logits.data(), DType::f32, {1, 299}};
  CHECK_FAILS(run("dhsa", in), Error, "boundary_logits: shape = [1, 299], expected [B, N]");
}
