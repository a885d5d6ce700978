// Static patterns of blocks as tiles, and heads that share a context by strides.
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <random>

#include "heed/exec/merge.h"
#include "heed/kernel/kernels.h"
#include "heed/plan/block_runs.h"
#include "heed/plan/strided_blocks.h"
#include "support/naive.h"

using namespace heed;
using namespace heed::test;

namespace {

/// Block masks of every KV head, [Hk][n][n], the own block always seen.
struct Pattern {
  Index block, n;
  std::vector<std::vector<char>> of;
  bool sees(Index head, Index i, Index j) const {
    return of[static_cast<size_t>(head)][static_cast<size_t>(i * n + j)] != 0;
  }
};

Pattern random_pattern(Index heads, Index tokens, Index block, double density, std::uint64_t seed) {
  Pattern p{block, (tokens + block - 1) / block, {}};
  std::mt19937_64 random(seed);
  for (Index h = 0; h < heads; ++h) {
    auto& mask = p.of.emplace_back(static_cast<size_t>(p.n * p.n));
    for (Index i = 0; i < p.n; ++i)
      for (Index j = 0; j <= i; ++j)
        mask[static_cast<size_t>(i * p.n + j)] =
            i == j || static_cast<double>(random() % 1000) < 1000 * density ? 1 : 0;
  }
  return p;
}

/// A plan of that pattern over the case's keys [from, to).
struct Made {
  std::shared_ptr<KeyValues> kv;
  Plan plan;
};
Made plan_of_pattern(const Case& c, const Pattern& pattern, Index from, Index to) {
  const auto& s = c.size;
  const Problem problem{.B = s.B, .Hq = s.Hq, .Hk = s.Hk, .N = s.N, .M = s.M, .D = s.D, .Dv = s.Dv, .causal = true};
  Made made{std::make_shared<KeyValues>(s.B * s.Hk, s.D, s.Dv, s.M, c.arithmetic), {}};
  made.kv->append(c.k.view(), c.v.view());
  Rule rule;
  rule.scale = static_cast<float>(1 / std::sqrt(static_cast<double>(s.D)));
  made.plan = make_plan(problem, Queries(c.q.view(), c.arithmetic), *made.kv, rule, Lanes::per_kv_head);
  made.plan.emit = [pattern, from, to](const RowBlock& rows, Tiles& tiles) {
    add_block_rows(rows, pattern.block, tiles, [&](BlockRuns& runs) {
      for (Index j = 0; j <= runs.own(); ++j)
        if (pattern.sees(rows.kv_head, runs.own(), j) && j >= from && j < to) runs.add(j, j + 1);
    });
  };
  return made;
}

}  // namespace

TEST_CASE("any pattern of blocks equals its mask") {
  for (const std::string& isa : available_isas()) {
    const UseIsa use(isa);
    for (const DType arithmetic : {DType::f32, DType::bf16})
      for (const Index block : {1, 7, 16, 64, 100})
        for (const double density : {0.05, 0.3, 0.8}) {
          for (const Sizes& s :
               {Sizes{2, 4, 2, 201, 201, 33, 16}, Sizes{1, 8, 1, 70, 331, 16, 24}, Sizes{1, 2, 2, 1, 200, 64, 16}}) {
            const Case c(s, DType::f32, arithmetic);
            const Pattern pattern = random_pattern(s.Hk, s.M, block, density, 3);
            const Naive want = naive_attention(c, [&](Index, Index h, Index t, Index j) {
              return j <= position(c, t) && pattern.sees(c.kv_head(h), position(c, t) / block, j / block);
            });
            const Made made = plan_of_pattern(c, pattern, 0, 1 << 20);
            const Got got = run(made.plan);
            CHECK_AGREES(got, want, c);
            CHECK(got.stats.pairs == want.pairs);
          }
        }
  }
}

TEST_CASE("runs that touch or overlap become one, and what is not past is left out") {
  const Case c({1, 1, 1, 100, 100, 1, 1});
  const Made made = plan_of_pattern(c, random_pattern(1, 100, 10, 0, 1), 0, 10);
  Scratch scratch;
  std::vector<Tile> list;
  Tiles tiles(scratch, list);
  const RowBlock rows{.first = 50, .rows = 25};
  std::vector<Index> owns;
  add_block_rows(rows, 3, 25, 10, tiles, [&](BlockRuns& runs) {
    owns.push_back(runs.own());
    runs.add(0, 0);
    runs.add(0, 1);
    runs.add(0, 2);
    runs.add(1, 2);
    runs.add(2, 3);
    runs.add(4, 5);
    runs.add(6, 99);
    runs.add(50, 60);
  });
  CHECK(owns == std::vector<Index>{5, 5, 6, 6, 7, 7});  // once to count
  // Own block 5 sees blocks 0–2 and 4. Blocks 6 and 7 share those, and a causal tile that ends at the last row.
  const auto shows = [&](size_t i, const Set& at, const Set& columns, Mask::Kind kind) {
    const Tile& tile = list.at(i);
    return tile.rows.first == at.first && tile.rows.count == at.count && tile.columns.first == columns.first &&
           tile.columns.count == columns.count && tile.mask.kind == kind;
  };
  REQUIRE(list.size() == 5);
  CHECK(shows(0, Set::range(3, 10), Set::range(0, 30), Mask::Kind::full));
  CHECK(shows(1, Set::range(3, 10), Set::range(40, 50), Mask::Kind::full));
  CHECK(shows(2, Set::range(10, 25), Set::range(0, 30), Mask::Kind::full));
  CHECK(shows(3, Set::range(10, 25), Set::range(40, 50), Mask::Kind::full));
  CHECK(shows(4, Set::range(10, 25), Set::range(60, 75), Mask::Kind::band));
}

TEST_CASE("blocks of queries share what they see alike, and chunks that they see whole are one tile") {
  const auto tiles_of = [](Index first, Index rows, Index block, Index window) {
    Scratch scratch;
    std::vector<Tile> list;
    Tiles tiles(scratch, list);
    add_block_rows(RowBlock{.first = first, .rows = rows}, block, tiles, [&](BlockRuns& runs) {
      runs.add(0, 1);
      runs.add(std::max<Index>(0, runs.own() - window + 1), runs.own() + 1);
    });
    return list;
  };
  // Rows 4096 … 4351, blocks 64 … 67 of 64, a window of 32 blocks: the sink; ragged ends in the chunk of blocks 32 …
  // 35, of which they see 33 on, 34 on, 35 and nothing; everything from there, hidden by causality alone.
  const auto list = tiles_of(4096, 256, 64, 32);
  REQUIRE(list.size() == 1 + 3 + 1);
  CHECK(list[0].columns.count == 64);
  CHECK(list[0].rows.count == 256);
  for (size_t i = 1; i < 4; ++i) {
    CHECK(list[i].rows.count == 64);
    CHECK(list[i].columns.first == 2112 + 64 * (static_cast<Index>(i) - 1));
    CHECK(list[i].columns.first + list[i].columns.count == 2304);
  }
  CHECK(list[4].rows.count == 256);
  CHECK(list[4].columns.first == 2304);
  CHECK(list[4].columns.count == 4096 + 256 - 2304);
  CHECK(list[4].mask.kind == Mask::Kind::band);
  CHECK(tiles_of(256, 256, 64, 99).size() == 1);
  // Chunks may be cut anywhere: rows that end inside a block, and one row.
  CHECK(tiles_of(4096, 100, 64, 32).size() == 1 + 2 + 1);
  CHECK(tiles_of(4200, 1, 64, 32).size() == 2);
}

TEST_CASE("parts of a pattern's columns merge to the whole") {
  const Case c({1, 4, 2, 150, 150, 32, 16});
  const Pattern pattern = random_pattern(2, 150, 16, 0.4, 5);
  const Got whole = run(plan_of_pattern(c, pattern, 0, 99).plan);
  for (const Index cut : {1, 3, 9}) {
    Got a = run(plan_of_pattern(c, pattern, 0, cut).plan), b = run(plan_of_pattern(c, pattern, cut, 99).plan);
    merge({a.o.data(), a.lse.data(), 600, 16}, {b.o.data(), b.lse.data(), 600, 16});
    double worst = 0;
    for (size_t i = 0; i < a.o.size(); ++i)
      worst = std::max(worst, static_cast<double>(std::fabs(a.o[i] - whole.o[i])));
    for (size_t i = 0; i < a.lse.size(); ++i)
      worst = std::max(worst, static_cast<double>(std::fabs(a.lse[i] - whole.lse[i])));
    CHECK(worst < 5e-6);
  }
}

TEST_CASE("coverage is the union of the heads, counted by brute force") {
  const auto brute = [](const StridedBlocks& s, Index n) {
    Index seen = 0;
    for (Index i = 0; i < n; ++i)
      for (Index j = 0; j <= i; ++j) {
        bool any = false;
        for (Index h = 0; h < s.heads; ++h)
          any = any || h >= s.heads - s.dense || i - j < s.local || (j + h * s.step + s.offset) % s.stride == 0;
        seen += any ? 1 : 0;
      }
    return static_cast<double>(seen) / static_cast<double>(n * (n + 1) / 2);
  };
  for (const Index heads : {1, 2, 3, 4, 8})
    for (const Index stride : {1, 2, 3, 4, 8, 16})
      for (const Index local : {1, 4})
        for (const Index step : {0, 1, 4})
          for (const Index dense : {0, 1})
            for (const Index n : {1, 4, 5, 37}) {
              const StridedBlocks s{heads, local, stride, step, stride - 1, dense};
              CHECK(s.coverage(n) == brute(s, n));
            }
  // As many KV heads as the stride, each one step further: everything.
  for (const Index v : {2, 4, 16})
    CHECK(StridedBlocks{.heads = v, .local = 1, .stride = v, .step = 1}.coverage(128) == 1);
  // Figures of the reference pattern with few heads: 50.8 %, 30 %.
  CHECK(std::lround(1000 * StridedBlocks{.heads = 8, .local = 4, .stride = 16, .step = 1}.coverage(128)) == 508);
  CHECK(std::lround(100 * StridedBlocks{.heads = 4, .local = 4, .stride = 16, .step = 4}.coverage(128)) == 30);
  CHECK(std::lround(100 * StridedBlocks{.heads = 6, .local = 4, .stride = 8, .step = 1}.coverage(128)) == 76);
}

TEST_CASE("a forgotten block is never seen again, and no seen one is forgotten too late") {
  for (const Index stride : {1, 2, 5, 8})
    for (const Index local : {1, 3})
      for (const Index dense : {0, 1}) {
        const StridedBlocks s{
            .heads = 3, .local = local, .stride = stride, .step = 1, .offset = stride / 2, .dense = dense};
        constexpr Index n = 60;
        for (Index h = 0; h < 3; ++h)
          for (Index j = 0; j < n; ++j) {
            Index last = j;  // the last block of queries that sees j, of many more than n
            for (Index i = j; i < 4 * n; ++i)
              if (s.sees(h, i, j)) last = i;
            for (Index i = j; i < n; ++i) CHECK(s.may_forget(h, i, j) == (i > last));
          }
        // The figure of the paper's cache: local + about i / stride blocks are left.
        for (Index h = 0; h < 3 - dense; ++h) {
          Index kept = 0;
          for (Index j = 0; j < n; ++j) kept += s.may_forget(h, n - 1, j) ? 0 : 1;
          if (stride > 1) CHECK(kept <= local + (n + stride - 1) / stride);
        }
      }
}
