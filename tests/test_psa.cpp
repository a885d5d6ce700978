// psa against its equations: blocks get levels by importance, one softmax over keys at mixed resolution.
#include <doctest/doctest.h>

#include <cstring>
#include <map>
#include <random>
#include <set>

#include "heed/kernel/kernels.h"
#include "support/levels.h"

using namespace heed;
using namespace heed::test;

namespace {

void check_psa(const Case& c, const PsaOptions& o, bool causal) {
  const std::string call = o.call();
  CAPTURE(call);
  CAPTURE(causal);
  const Got got = run(call, c.input(causal));
  const Levels levels = naive_select(c, o, causal);
  const Naive want = naive_levels(c, levels, o.query_block, o.block, causal);
  CHECK_AGREES(got, want, c);
  const Index undecided = std::count(levels.undecided.begin(), levels.undecided.end(), 1);
  if (undecided == 0) CHECK(got.stats.pairs == want.pairs);
  CHECK(undecided * 4 <= static_cast<Index>(levels.undecided.size()));
}

Sizes square(Index b, Index hq, Index hk, Index n, Index d, Index dv) { return {b, hq, hk, n, n, d, dv}; }

AttendInput with(const Case& c, const Levels& levels, bool causal) {
  AttendInput in = c.input(causal);
  in.extra["levels"] = {levels.of.data(), DType::i32, {c.size.B, c.size.Hq, levels.queries, levels.keys}};
  return in;
}

// Levels drawn from `choices`.
Levels random_levels(const Case& c, Index query_block, Index block, const std::vector<std::int32_t>& choices,
                     std::uint64_t seed) {
  std::mt19937_64 random(seed);
  Levels levels{.queries = (c.size.N + query_block - 1) / query_block,
                .keys = (c.size.N + block - 1) / block,
                .of = {},
                .undecided = {}};
  for (Index i = 0; i < c.size.B * c.size.Hq * levels.queries * levels.keys; ++i)
    levels.of.push_back(choices[random() % choices.size()]);
  return levels;
}

// |o - want| / |want| over everything.
double relative_error(const std::vector<float>& o, const std::vector<float>& want) {
  double off = 0, all = 0;
  for (size_t i = 0; i < o.size(); ++i) {
    const double x = static_cast<double>(o[i]), y = static_cast<double>(want[i]);
    off += (x - y) * (x - y), all += y * y;
  }
  return std::sqrt(off / all);
}

}  // namespace

TEST_CASE("psa equals its equations") {
  for (const std::string& isa : available_isas()) {
    const UseIsa use(isa);
    for (const bool causal : {false, true})
      for (const DType arithmetic : {DType::f32, DType::bf16}) {
        for (const Index n : {1, 15, 16, 17, 65, 261})
          check_psa(Case(square(1, 4, 1, n, 33, 16), DType::f32, arithmetic), {}, causal);
        check_psa(Case(square(2, 2, 2, 259, 64, 40), DType::f32, arithmetic, Layout::tokens), {}, causal);
        check_psa(Case(square(1, 8, 1, 100, 16, 24), DType::f16, arithmetic, Layout::scattered), {}, causal);
        check_psa(Case(square(1, 2, 1, 77, 256, 17), DType::bf16, arithmetic, Layout::reversed), {}, causal);
      }
  }
}

TEST_CASE("psa: shares, modes, strides, folds, blocks of any size") {
  for (const bool causal : {false, true}) {
    const Case c(square(1, 2, 1, 303, 24, 16));
    for (const bool threshold : {false, true}) {
      check_psa(c, {.threshold = threshold, .ratios = {{1, .05}, {2, .15}, {4, .25}, {8, .5}}}, causal);
      check_psa(c, {.threshold = threshold, .ratios = {{1, .4}, {2, .5}, {4, .6}, {8, .8}}}, causal);
      check_psa(c, {.threshold = threshold, .ratios = {{1, .1}, {2, .15}, {4, .15}, {8, .35}}}, causal);
      check_psa(c, {.threshold = threshold, .ratios = {{8, 1}}}, causal);
      check_psa(c, {.threshold = threshold, .ratios = {{1, 0}, {4, .6}}, .min_full = 0.2}, causal);
      check_psa(c, {.threshold = threshold, .ratios = {{2, .3}}, .min_full = 0}, causal);
      check_psa(c, {.query_block = 8, .block = 8, .threshold = threshold, .fold = 4},
                causal);  // several share a row block
      check_psa(c, {.query_block = 8, .block = 40, .threshold = threshold, .sample_stride = 3}, causal);
      check_psa(c, {.query_block = 48, .block = 24, .threshold = threshold, .sample_stride = 1, .fold = 1}, causal);
      check_psa(c, {.query_block = 1000, .block = 16, .threshold = threshold, .sample_stride = 2}, causal);
      check_psa(c, {.query_block = 64, .block = 4000, .threshold = threshold, .sample_stride = 100}, causal);
      check_psa(c,
                {.query_block = 128,
                 .block = 64,
                 .threshold = threshold,
                 .ratios = {{1, .21}, {2, .37}, {8, .7}},
                 .fold = 16},
                causal);
    }
  }
  check_psa(Case(square(1, 1, 1, 200, 16, 16)), {.query_block = 13, .sample_stride = 5}, false);
}

TEST_CASE("psa: no block is pooled coarser than its keys are alike") {
  Case c(square(1, 4, 2, 301, 24, 16));
  // Neighbours are alike to different degrees along the sequence.
  for (Index g = 0; g < 2; ++g)
    for (Index j = 1; j < 301; ++j) {
      const double rho = static_cast<double>(j) / 301;
      for (Index d = 0; d < 24; ++d)
        c.k.set(0, g, j, d, rho * c.k.get(0, g, j - 1, d) + std::sqrt(1 - rho * rho) * c.k.get(0, g, j, d));
    }
  std::map<std::int32_t, int> met;
  for (const bool causal : {false, true})
    for (const double t : {0.2, 0.6, -1.0, 1.0}) {
      const PsaOptions o{.ratios = {{1, .1}, {4, .2}, {8, 1}}, .cap = true, .t2 = t, .t4 = t, .t8 = t};
      check_psa(c, o, causal);
      if (!causal && t == 0.6)
        for (const std::int32_t z : naive_select(c, o, causal).of) ++met[z];
      // Nothing is as alike as 1, so nothing is pooled.
      if (t == 1.0) {
        for (const std::int32_t z : naive_select(c, o, causal).of) CHECK((z == 0 || z == 1));
      }
    }
  CHECK((met[1] > 0 && met[2] > 0 && met[8] > 0));
  const Case random(square(1, 2, 1, 400, 64, 16));
  const PsaOptions strict{.ratios = {{1, .1}, {8, 1}}, .cap = true};
  const Got got = run(strict.call(), random.input());
  const std::string differs = difference(got, naive_attention(random, dense_sees(random, false)), random, 1e-5);
  CHECK_MESSAGE(differs.empty(), differs);
}

TEST_CASE("psa with given levels: means repeated, in any mixture, skipped rows included") {
  for (const std::string& isa : available_isas()) {
    const UseIsa use(isa);
    for (const bool causal : {false, true})
      for (const auto& [n, query_block, block] :
           {std::array<Index, 3>{1, 32, 16}, {9, 8, 8}, {64, 32, 16}, {203, 8, 8}, {203, 50, 24}, {300, 128, 64}}) {
        const Case c(square(2, 4, 2, n, 20, 24));
        for (const std::vector<std::int32_t>& choices :
             {std::vector<std::int32_t>{0, 1, 2, 4, 8}, {0, 0, 0, 0, 8}, {4}, {1, 8}}) {
          const Levels levels = random_levels(c, query_block, block, choices, static_cast<std::uint64_t>(n));
          const std::string call = fmt::format("psa:query_block={},block={}", query_block, block);
          CAPTURE(call);
          const Got got = run(call, with(c, levels, causal));
          const Naive want = naive_levels(c, levels, query_block, block, causal);
          CHECK_AGREES(got, want, c);
          CHECK(got.stats.pairs == want.pairs);
        }
      }
  }
}

TEST_CASE("psa with every block in full is dense, and where groups are constant any level is") {
  for (const bool causal : {false, true}) {
    const Case c(square(1, 4, 2, 301, 32, 40));
    const Naive dense = naive_attention(c, dense_sees(c, causal));
    const Got full = run("psa:ratios=1:1", c.input(causal));
    const std::string differs = difference(full, dense, c, 1e-5);
    CHECK_MESSAGE(differs.empty(), differs);
    CHECK(full.stats.pairs == dense.pairs);

    Case constant = c;
    for (Index g = 0; g < 2; ++g)
      for (Index j = 0; j < 301; ++j) {
        for (Index d = 0; d < 32; ++d) constant.k.set(0, g, j, d, c.k.get(0, g, j / 8 * 8, d));
        for (Index e = 0; e < 40; ++e) constant.v.set(0, g, j, e, c.v.get(0, g, j / 8 * 8, e));
      }
    Levels levels = random_levels(c, 32, 16, {1, 2, 4, 8}, 3);
    for (size_t i = 0; causal && i < levels.of.size();
         ++i) {  // queries see half-past groups only where those are in full
      const Index u = static_cast<Index>(i) / levels.keys % levels.queries, k = static_cast<Index>(i) % levels.keys;
      if (k * 16 + 16 > u * 32) levels.of[i] = 1;
    }
    const Got pooled = run("psa:query_block=32,block=16", with(constant, levels, causal));
    const std::string off = difference(pooled, naive_attention(constant, dense_sees(constant, causal)), constant, 1e-5);
    CHECK_MESSAGE(off.empty(), off);
    CHECK(pooled.stats.pairs < dense.pairs);
  }
}

TEST_CASE("psa's levels partition the blocks, and its density is the sum of 1/level") {
  const Case c(square(1, 2, 1, 4096, 16, 16));
  for (const bool causal : {false, true}) {
    const AttendInput in = c.input(causal);
    const Plan plan = plan_of(MechanismCall::parse("psa"), in);
    Index tiles_planned = 0, pairs = 0;
    walk(plan, [&](const RowBlock& rows, const std::vector<Tile>& tiles) {
      std::map<Index, std::map<Index, double>> held;  // query block, key block -> level and share of its columns
      for (const Tile& tile : tiles) {
        const Index z = 4096 / plan.sources[static_cast<size_t>(tile.source)].views[0].columns;
        const Index u = (rows.first + tile.rows[0]) / 128;
        CHECK((rows.first + tile.rows[0]) % 128 == 0);
        CHECK(tile.rows.count == 128);
        for (Index r = 0; r < tile.columns.count; ++r) held[u][tile.columns[r] * z / 64] += static_cast<double>(z) / 64;
        ++tiles_planned;
        for (Index i = 0; i < tile.rows.count; ++i)
          for (Index r = 0; causal && r < tile.columns.count; ++r) pairs += sees(plan, rows, tile, i, r) ? 1 : 0;
        if (!causal) pairs += tile.rows.count * tile.columns.count;
      }
      for (const auto& [u, blocks] : held) {
        for (const auto& [k, share] : blocks) CHECK(share == 1);  // each block once, as a whole, at one level
        if (!causal) CHECK(static_cast<Index>(blocks.size()) == 22);  // int(.35 · 64)
      }
    });
    const Got got = run(plan);
    CHECK(got.stats.pairs == pairs);
    CHECK(got.stats.tiles_visited == tiles_planned);
    CHECK(got.stats.tiles_planned == tiles_planned);
    // int(.10·64) = 6 in full, int(.15·64) - 6 = 3 at 2, 22 - 9 = 13 at 8.
    if (!causal) {
      const double density = (6 + 3 / 2.0 + 13 / 8.0) / 64, counted = static_cast<double>(pairs) / (2.0 * 4096 * 4096);
      CHECK(counted == doctest::Approx(density).epsilon(1e-9));
      const double products = static_cast<double>(got.stats.pairs_computed) / (2.0 * 4096 * 4096);
      CHECK(products < density * 1.15);  // cut panels at the ends of lists
    }
  }
}

TEST_CASE("psa: later blocks of queries and keys change nothing; inside a block later values do not") {
  for (const PsaOptions& o :
       {PsaOptions{},
        PsaOptions{
            .query_block = 8, .block = 8, .threshold = true, .fold = 4, .cap = true, .t2 = 0, .t4 = 0, .t8 = 0}}) {
    const Case c(square(1, 2, 1, 320, 16, 16));
    const Got before = run(o.call(), c.input(true));
    const auto changed_rows = [&](const Case& changed, Index end) {
      const Got after = run(o.call(), changed.input(true));
      Index count = 0;
      for (Index h = 0; h < 2; ++h)
        for (Index t = 0; t < end; ++t) {
          const size_t row = static_cast<size_t>(h * 320 + t);
          count += std::memcmp(&before.o[row * 16], &after.o[row * 16], 64) != 0 || before.lse[row] != after.lse[row]
                       ? 1
                       : 0;
        }
      return count;
    };
    for (const Index end : {32, 64, 160, 288}) {
      Case changed = c;
      for (Index j = end; j < 320; ++j)
        for (Index d = 0; d < 16; ++d) {
          changed.k.set(0, 0, j, d, 20 - static_cast<double>(j % 7)), changed.v.set(0, 0, j, d, 500);
          changed.q.set(0, 0, j, d, -7), changed.q.set(0, 1, j, d, 3);
        }
      CHECK(changed_rows(changed, end) == 0);
      CHECK(changed_rows(changed, 320) > 0);
    }
    // The queries of a block choose together, by its keys and queries; values have no say.
    for (const Index t : {0, 3, 33, 150, 310}) {
      Case changed = c;
      for (Index j = t + 1; j < 320; ++j)
        for (Index d = 0; d < 16; ++d) changed.v.set(0, 0, j, d, 500);
      CHECK(changed_rows(changed, t + 1) == 0);
    }
  }
}

TEST_CASE("psa: the same bits for any number of threads") {
  for (const std::string& isa : available_isas()) {
    const UseIsa use(isa);
    for (const bool causal : {false, true})
      for (const Sizes& s : {square(2, 4, 2, 600, 16, 16), square(1, 2, 1, 2400, 32, 16)}) {
        const Case c(s);
        Got first;
        for (const int n : {1, 2, 3}) {
          const UseThreads threads(n);
          const Got got = run("psa:query_block=64,block=32,similarity_cap=true,t2=0,t4=0,t8=0", c.input(causal));
          if (n == 1) first = got;
          CHECK(same_bits(got.o, first.o));
          CHECK(same_bits(got.lse, first.lse));
        }
      }
  }
}

TEST_CASE("psa at the same budget errs less than keeping and dropping blocks") {
  // a, b, c autoregressive of unit variance; q = 1.5·(.6 a + .8 b), k = b, v = c; the true weights rank the blocks.
  // Found: rho 0: 1.13 dropped, 0.95 pooled; 0.9: 0.76, 0.43; 0.97: 0.38, 0.19; 0.99: 0.21, 0.09.
  constexpr Index n = 4096, d = 32, query_block = 128, block = 32, queries = n / query_block, blocks = n / block;
  for (const double rho : {0.0, 0.9, 0.99}) {
    std::mt19937_64 random(3);
    std::normal_distribution<double> normal;
    Case c(square(1, 1, 1, n, d, d));
    std::vector<float> q, k;
    std::array<std::vector<double>, 3> state;
    for (auto& x : state)
      for (Index i = 0; i < d; ++i) x.push_back(normal(random));
    for (Index t = 0; t < n; ++t)
      for (size_t i = 0; i < d; ++i) {
        for (auto& x : state) x[i] = rho * x[i] + std::sqrt(1 - rho * rho) * normal(random);
        c.q.set(0, 0, t, static_cast<Index>(i), 1.5 * (0.6 * state[0][i] + 0.8 * state[1][i]));
        c.k.set(0, 0, t, static_cast<Index>(i), state[1][i]), c.v.set(0, 0, t, static_cast<Index>(i), state[2][i]);
        q.push_back(static_cast<float>(c.q.get(0, 0, t, static_cast<Index>(i))) / std::sqrt(static_cast<float>(d)));
        k.push_back(static_cast<float>(state[1][i]));
      }
    const Got dense = run("dense", c.input());
    std::vector<double> mass(queries * blocks, 0);
    for (size_t i = 0; i < n; ++i)
      for (size_t j = 0; j < n; ++j) {
        float x = 0;
        for (size_t e = 0; e < d; ++e) x += q[i * d + e] * k[j * d + e];
        mass[i / query_block * blocks + j / block] += static_cast<double>(std::exp(x - dense.lse[i]));
      }
    // Ranked blocks up to each share of them get each level.
    const auto error = [&](const std::vector<std::pair<std::int32_t, double>>& shares) {
      Levels levels{
          .queries = queries, .keys = blocks, .of = std::vector<std::int32_t>(queries * blocks, 0), .undecided = {}};
      for (size_t u = 0; u < queries; ++u) {
        std::vector<size_t> order;
        for (size_t b = 0; b < blocks; ++b) order.push_back(b);
        std::stable_sort(order.begin(), order.end(),
                         [&](size_t x, size_t y) { return mass[u * blocks + x] > mass[u * blocks + y]; });
        size_t at = 0;
        for (const auto& [z, share] : shares)
          for (; at < static_cast<size_t>(share * blocks + 0.5); ++at) levels.of[u * blocks + order[at]] = z;
      }
      return relative_error(run("psa:query_block=128,block=32", with(c, levels, false)).o, dense.o);
    };
    const double kept = error({{1, .15}}), pyramid = error({{1, .10}, {2, .15}, {8, .35}});
    CAPTURE(rho);
    CAPTURE(kept);
    CAPTURE(pyramid);
    CHECK(pyramid < kept);
    if (rho >= 0.9) CHECK(pyramid <= 0.65 * kept);
  }
}

TEST_CASE("psa refuses what it cannot mean") {
  const Case c(square(1, 2, 1, 40, 16, 16));
  const auto refused = [&](const std::string& params, const std::string& line, bool causal = false) {
    CHECK_FAILS(run("psa:" + params, c.input(causal)), UsageError, "psa: " + line);
  };
  refused("block=12", "block = 12, expected a multiple of 8");
  refused("block=0", "block = 0, expected >= 8");
  refused("query_block=0", "query_block = 0, expected >= 1");
  refused("mode=best", "mode = best, expected one of topk, threshold");
  refused("ratios=1:.2,2:.1", "ratios = 1:.2,2:.1, expected cumulative shares from 0 to 1 that do not fall");
  refused("ratios=1:.2,2:1.1", "ratios = 1:.2,2:1.1, expected cumulative shares from 0 to 1 that do not fall");
  refused("ratios=1:-.2", "ratios = 1:-.2, expected cumulative shares from 0 to 1 that do not fall");
  refused("ratios=2:.1,1:.2", "ratios = 2:.1,1:.2, expected ascending levels");
  refused("ratios=1:.1,1:.2", "ratios = 1:.1,1:.2, expected ascending levels");
  refused("ratios=1:.1,3:.2", "ratios = 1:.1,3:.2, expected levels 1, 2, 4 and 8");
  refused("ratios=1:.1,16:.2", "ratios = 1:.1,16:.2, expected levels 1, 2, 4 and 8");
  for (const std::string text : {"1", "1:", "1:x", ":1", "1:.1,", "1:.1;2:.2", "1:.1x"})
    refused("ratios=" + text, "ratios = " + text + ", expected level:share pairs joined by commas, such as 1:.1,2:.15");
  refused("sample_stride=0", "sample_stride = 0, expected >= 1");
  refused("min_full=1.5", "min_full = 1.5, expected 0 … 1");
  refused("t4=2", "t4 = 2, expected -1 … 1");
  refused("block=40", "fold = 16, expected a divisor of block = 40 and of query_block = 128", true);
  refused("query_block=24", "fold = 16, expected a divisor of block = 64 and of query_block = 24", true);
  CHECK_FAILS(run("psa", Case({1, 1, 1, 8, 9, 16, 16}).input()), Error,
              "psa: 8 queries and 9 keys, expected as many of one as of the other");

  Levels levels = random_levels(c, 128, 64, {1}, 1);
  levels.of[1] = 3;
  CHECK_FAILS(run("psa", with(c, levels, false)), Error, "levels: holds 3, expected 0, 1, 2, 4 or 8");
  levels.of[1] = -1;
  CHECK_FAILS(run("psa", with(c, levels, false)), Error, "levels: holds -1, expected 0, 1, 2, 4 or 8");
  levels.of.resize(100);
  levels.keys = 2;
  CHECK_FAILS(run("psa", with(c, levels, false)), Error,
              "levels: shape = [1, 2, 1, 2], expected [B, Hq, query blocks, key blocks] = [1, 2, 1, 1]");
}
