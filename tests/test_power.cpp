// power against its mask: a window of blocks, the sink block, and blocks at distances 1, 2, 4, 8 …
#include <doctest/doctest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <set>

#include "heed/kernel/kernels.h"
#include "heed/plan/coverage.h"
#include "support/naive.h"

using namespace heed;
using namespace heed::test;

namespace {

/// Blocks that query block i sees, found by walking the plan of n blocks of `block` tokens.
std::vector<std::vector<Index>> columns_by_block(Index n, Index block, Index window_blocks, Index sink_blocks) {
  const Case c({1, 1, 1, n * block, n * block, 1, 1});
  const AttendInput in = c.input();
  const Plan plan = plan_of(MechanismCall::parse(fmt::format("power:block={},window_blocks={},sink_blocks={}", block,
                                                             window_blocks, sink_blocks)),
                            in);
  std::vector<std::set<Index>> seen(static_cast<size_t>(n));
  walk(plan, [&](const RowBlock& rows, const std::vector<Tile>& tiles) {
    for (const Tile& tile : tiles)
      for (Index r = 0; r < tile.rows.count; ++r)
        for (Index j = 0; j < tile.columns.count; ++j)
          if (sees(plan, rows, tile, r, j))
            seen[static_cast<size_t>(rows.position(tile.rows[r]) / block)].insert(tile.columns[j] / block);
  });
  std::vector<std::vector<Index>> columns;
  for (const auto& s : seen) columns.emplace_back(s.begin(), s.end());
  return columns;
}

/// Layers after which information of every block has reached the last one, and how many blocks have after each.
std::vector<Index> reached_after(const std::vector<std::vector<Index>>& columns) {
  const size_t n = columns.size();
  std::vector<char> reached(n, 0);
  reached[n - 1] = 1;
  std::vector<Index> counts;
  for (Index before = 1;;) {
    std::vector<char> next = reached;
    for (size_t i = 0; i < n; ++i)
      if (reached[i] != 0)
        for (const Index j : columns[i]) next[static_cast<size_t>(j)] = 1;
    const Index now = std::count(next.begin(), next.end(), 1);
    if (now == before) return counts;
    counts.push_back(now);
    reached = next;
    before = now;
  }
}

/// On every instruction set.
void check_power(const Case& c, Index block, Index window_blocks, Index sink_blocks) {
  const std::string call =
      fmt::format("power:block={},window_blocks={},sink_blocks={}", block, window_blocks, sink_blocks);
  CAPTURE(call);
  const Naive want = naive_attention(c, power_sees(c, block, window_blocks, sink_blocks));
  for (const std::string& isa : available_isas()) {
    const UseIsa use(isa);
    const Got got = run(call, c.input());
    CHECK_AGREES(got, want, c);
    CHECK(got.stats.pairs == want.pairs);
  }
}

}  // namespace

TEST_CASE("power equals its mask") {
  for (const DType arithmetic : {DType::f32, DType::bf16})
    for (const Index block : {5, 16, 64})
      for (const Index window_blocks : {1, 2, 5})
        for (const Index sink_blocks : {0, 1}) {
          check_power(Case({1, 4, 1, 200, 200, 33, 16}, DType::f32, arithmetic), block, window_blocks, sink_blocks);
          check_power(Case({2, 2, 2, 67, 333, 16, 40}, DType::f32, arithmetic), block, window_blocks, sink_blocks);
          check_power(Case({1, 8, 2, 1, 450, 64, 64}, DType::f32, arithmetic), block, window_blocks, sink_blocks);
          check_power(Case({1, 1, 1, 3, 3, 7, 9}, DType::f32, arithmetic), block, window_blocks, sink_blocks);
        }
  check_power(Case({1, 2, 1, 1500, 1500, 8, 8}), 32, 3, 1);
  check_power(Case({1, 2, 1, 700, 1100, 8, 8}, DType::bf16, DType::bf16, Layout::tokens), 20, 1, 0);
}

TEST_CASE("power with a window of all blocks is dense") {
  const Case c({1, 2, 1, 210, 260, 32, 32});
  const Naive dense = naive_attention(c, dense_sees(c, true));
  for (const Index window_blocks : {9, 10, 4000}) {  // 260 keys are 9 blocks of 32
    const Got got = run(fmt::format("power:block=32,window_blocks={}", window_blocks), c.input());
    const std::string differs = difference(got, dense, c, 1e-5);
    CHECK_MESSAGE(differs.empty(), differs);
  }
  CHECK_AGREES(run("power:block=512", c.input()), dense, c);  // fewer tokens than a block
}

TEST_CASE("power with single-token blocks and no window is the pure pattern") {
  const Case c({1, 2, 1, 300, 300, 16, 16});
  const Sees pure = [](Index, Index, Index t, Index j) {
    return j <= t && (t == j || std::has_single_bit(static_cast<unsigned>(t - j)));
  };
  const Got got = run("power:block=1,window_blocks=1,sink_blocks=0", c.input());
  const Naive want = naive_attention(c, pure);
  CHECK_AGREES(got, want, c);
  CHECK(got.stats.pairs == want.pairs);
}

TEST_CASE("power: a row of blocks is short") {
  for (const auto& [n, w, sink] :
       std::vector<std::array<Index, 3>>{{128, 5, 1}, {128, 1, 0}, {100, 3, 1}, {257, 1, 1}}) {
    const auto columns = columns_by_block(n, 1, w, sink);
    for (Index i = 0; i < n; ++i) {
      std::set<Index> want;
      for (Index j = std::max<Index>(0, i - w + 1); j <= i; ++j) want.insert(j);
      for (Index d = 1; d <= i; d *= 2) want.insert(i - d);
      if (sink == 1) want.insert(0);
      CHECK(columns[static_cast<size_t>(i)] == std::vector<Index>(want.begin(), want.end()));
      CHECK(static_cast<Index>(columns[static_cast<size_t>(i)].size()) <=
            w + 1 + std::bit_width(static_cast<unsigned long>(n)) - 1);
    }
  }
  CHECK(columns_by_block(128, 3, 5, 1).back().size() == 10);
}

TEST_CASE("power: hops and coverage of the paper's patterns") {
  // Blocks reached after 1, 2, 3, 4 layers from the last of 128: 7.8, 27.3, 58.6, 85.9 %.
  const auto reached = reached_after(columns_by_block(128, 2, 5, 1));
  REQUIRE(reached.size() == 6);
  CHECK(std::vector<Index>(reached.begin(), reached.begin() + 4) == std::vector<Index>{10, 35, 75, 110});
  CHECK(reached.back() == 128);
  CHECK(reached_after(columns_by_block(256, 1, 5, 1)).size() == 7);
  CHECK(reached_after(columns_by_block(512, 1, 5, 1)).size() == 8);
  CHECK(reached_after(columns_by_block(128, 1, 1, 0)).size() == 7);
}

TEST_CASE("coverage and hops of the paper's table") {
  const auto power_row = [](Index i, Index j) { return i - j < 5 || ((i - j) & (i - j - 1)) == 0 || j == 0; };
  const auto pure = [](Index i, Index j) { return ((i - j) & (i - j - 1)) == 0; };
  const auto sliding = [](Index i, Index j) { return i - j < 9 || j == 0; };
  const auto stride = [](Index i, Index j) { return i - j < 6 || (i - j) % 32 == 0 || j == 0; };
  const auto even = [](Index i, Index j) { return (i - j) % 2 == 0 && i - j < 20; };
  CHECK(hops_to_cover(128, power_row) == 6);
  CHECK(hops_to_cover(256, power_row) == 7);
  CHECK(hops_to_cover(512, power_row) == 8);
  CHECK(hops_to_cover(128, pure) == 7);
  CHECK(hops_to_cover(256, pure) == 8);
  CHECK(hops_to_cover(512, pure) == 9);
  CHECK(hops_to_cover(128, sliding) == 16);
  CHECK(hops_to_cover(256, sliding) == 32);
  CHECK(hops_to_cover(512, sliding) > 40);
  for (const Index n : {128, 256, 512}) CHECK(hops_to_cover(n, stride) == 8);
  CHECK(hops_to_cover(128, even) == -1);
  CHECK(hops_to_cover(1, pure) >= 0);
  CHECK(coverage(128, even).back() == 0.5);
  const auto first = [](const std::vector<double>& shares) {
    std::vector<Index> blocks;
    for (size_t i = 0; i < 4; ++i) blocks.push_back(std::lround(shares.at(i) * 128));
    return blocks;
  };
  CHECK(first(coverage(128, power_row)) == std::vector<Index>{10, 35, 75, 110});
  CHECK(first(coverage(128, sliding)) == std::vector<Index>{10, 18, 26, 34});
}

TEST_CASE("power: every block is reached within ceil(log2 n) layers") {
  for (Index n = 2; n <= 1024; n = n < 40 ? n + 1 : n * 3 / 2 + 1)
    for (const Index sink : {0, 1}) {
      const auto reached = reached_after(columns_by_block(n, 1, 1, sink));
      CHECK(reached.back() == n);
      CHECK(static_cast<int>(reached.size()) <= std::bit_width(static_cast<unsigned long>(n - 1)));
      if (sink == 0) {
        // The pure pattern needs as many hops as the gap has binary ones.
        int most = 0;
        for (Index gap = 0; gap < n; ++gap) most = std::max(most, std::popcount(static_cast<unsigned long>(gap)));
        CHECK(static_cast<int>(reached.size()) == most);
      }
    }
  CHECK(reached_after(columns_by_block(1024, 1, 1, 0)).back() == 1024);
}

TEST_CASE("power: decoding gives the rows of the prefill") {
  const Case c({1, 2, 1, 170, 170, 32, 16});
  const Naive want = naive_attention(c, power_sees(c, 10, 2, 1));
  for (const Index t : {0, 9, 10, 77, 80, 160, 169}) {
    Case one({1, 2, 1, 1, t + 1, 32, 16});
    for (Index d = 0; d < 32; ++d)
      for (Index h = 0; h < 2; ++h) one.q.set(0, h, 0, d, c.q.get(0, h, t, d));
    for (Index j = 0; j <= t; ++j) {
      for (Index d = 0; d < 32; ++d) one.k.set(0, 0, j, d, c.k.get(0, 0, j, d));
      for (Index d = 0; d < 16; ++d) one.v.set(0, 0, j, d, c.v.get(0, 0, j, d));
    }
    Naive row;
    for (size_t h = 0; h < 2; ++h) {
      const auto i = static_cast<std::ptrdiff_t>(h * 170) + t;
      row.o.insert(row.o.end(), want.o.begin() + i * 16, want.o.begin() + (i + 1) * 16);
      row.lse.push_back(want.lse[static_cast<size_t>(i)]);
    }
    CHECK_AGREES(run("power:block=10,window_blocks=2", one.input()), row, one);
  }
}

TEST_CASE("power: no output depends on a later token") {
  for (const std::string& isa : available_isas()) {
    const UseIsa use(isa);
    const Sizes s{1, 2, 1, 280, 300, 16, 16};
    const Case c(s);
    const std::string call = "power:block=16,window_blocks=2";
    const Got before = run(call, c.input());
    for (const Index t : {0, 12, 50, 130, 255, 270}) {
      Case changed = c;
      for (Index h = 0; h < 2; ++h)
        for (Index later = t + 1; later < s.N; ++later) changed.q.set(0, h, later, 2, -7);
      for (Index j = position(c, t) + 1; j < s.M; ++j)
        for (Index d = 0; d < 16; ++d) changed.k.set(0, 0, j, d, 20), changed.v.set(0, 0, j, d, 500);
      const Got after = run(call, changed.input());
      Index differing = 0;
      for (Index h = 0; h < 2; ++h)
        for (Index i = 0; i <= t; ++i) {
          const size_t row = static_cast<size_t>(h * s.N + i);
          differing +=
              std::memcmp(&before.o[row * 16], &after.o[row * 16], 64) != 0 || before.lse[row] != after.lse[row];
        }
      CHECK_MESSAGE(differing == 0, differing, " rows at or before ", t, " changed");
    }
  }
}

TEST_CASE("power: the same bits for any number of threads") {
  for (const std::string& isa : available_isas()) {
    const UseIsa use(isa);
    for (const Sizes& s : {Sizes{2, 4, 2, 600, 600, 16, 16}, Sizes{1, 4, 1, 1, 900, 32, 32}}) {
      const Case c(s);
      Got first;
      for (const int n : {1, 2, 3}) {
        const UseThreads threads(n);
        const Got got = run("power:block=24,window_blocks=3", c.input());
        if (n == 1) first = got;
        CHECK(same_bits(got.o, first.o));
        CHECK(same_bits(got.lse, first.lse));
      }
    }
  }
}

TEST_CASE("power refuses what it cannot mean") {
  const Case c({1, 1, 1, 8, 8, 16, 16});
  CHECK_FAILS(run("power:window_blocks=0", c.input()), UsageError, "power: window_blocks = 0, expected >= 1");
  CHECK_FAILS(run("power:block=0", c.input()), UsageError, "power: block = 0, expected >= 1");
  CHECK_THROWS_AS(run("power:sink_blocks=2", c.input()), UsageError);
}
