// gna against its definition: strided windows on grids, groups of queries that share one.
#include <doctest/doctest.h>

#include <random>

#include "heed/base/threads.h"
#include "heed/kernel/kernels.h"
#include "heed/plan/grid_tiles.h"
#include "support/grids.h"

using namespace heed;
using namespace heed::test;

namespace {

Sizes sizes(const Neighborhood& n, Index group = 1, Index d = 16, Index dv = 16) {
  return {1, 2, 2 / group, n.tokens(), n.tokens(), d, dv};
}

/// On every instruction set.
void check_gna(const Neighborhood& n, const Case& c) {
  const std::string call = n.call("gna");
  CAPTURE(call);
  const Naive want = naive_attention(c, neighborhood_sees(n));
  for (const std::string& isa : available_isas()) {
    const UseIsa use(isa);
    const Got got = run(call, c.input());
    CHECK_AGREES(got, want, c);
    CHECK(got.stats.pairs == want.pairs);
  }
}

GridWindow windows_of(const Neighborhood& n) {
  GridWindow w;
  for (size_t a = 0; a < n.grid.size(); ++a)
    w[3 - n.grid.size() + a] = {.length = n.grid[a],
                                .kernel = n.kernel[a],
                                .stride = n.stride[a],
                                .dilation = n.dilation[a],
                                .causal = n.causal[a] != 0};
  return w;
}

}  // namespace

TEST_CASE("gna equals its definition on random grids") {
  std::mt19937 random(11);
  const auto between = [&](Index low, Index high) { return std::uniform_int_distribution<Index>(low, high)(random); };
  for (int round = 0; round < 45; ++round) {
    const size_t axes = 1 + static_cast<size_t>(round % 3);
    Neighborhood n;
    for (size_t a = 0; a < axes; ++a) {
      const Index length = axes == 1 ? between(2, 400) : axes == 2 ? between(2, 23) : between(2, 8);
      const Index d = between(0, 1) == 0 ? 1 : between(1, length / 2), k = between(2, length / d), s = between(1, k);
      n.grid.push_back(length), n.kernel.push_back(k), n.stride.push_back(s), n.dilation.push_back(d),
          n.causal.push_back(between(0, 1));
    }
    const Index d[] = {16, 33, 64}, dv[] = {16, 8, 40};
    const size_t pick = static_cast<size_t>(round % 5 % 3);
    check_gna(n, Case(sizes(n, 1 + round % 2, d[pick], dv[pick]), DType::f32, round % 4 == 3 ? DType::bf16 : DType::f32,
                      Layout::packed, static_cast<std::uint64_t>(round)));
  }
}

TEST_CASE("gna on grids of several query tiles") {
  const Neighborhood many[] = {
      {{32, 32}, {9, 14}, {3, 5}, {1, 1}, {0, 0}},
      {{8, 12, 11}, {4, 6, 5}, {2, 1, 5}, {1, 2, 1}, {1, 0, 0}},
      {{1000}, {130}, {17}, {3}, {0}},
      {{29, 37}, {8, 16}, {8, 16}, {1, 1}, {0, 1}},
  };
  for (const Neighborhood& n : many) check_gna(n, Case(sizes(n)));
}

TEST_CASE("gna with a stride of 1 is natten to the bit") {
  for (const Neighborhood& n :
       {Neighborhood{{20, 30}, {7, 6}, {1, 1}, {1, 2}, {0, 1}}, Neighborhood{{500}, {33}, {1}, {4}, {0}}}) {
    const Case c(sizes(n));
    const Got a = run(n.call("gna"), c.input()), b = run(n.call("natten"), c.input());
    CHECK(same_bits(a.o, b.o));
    CHECK(same_bits(a.lse, b.lse));
  }
}

TEST_CASE("gna with a stride of kernel_size is blocked attention") {
  // One axis: blocks of a panel, each attended by a dense call of its own, to the bit.
  const Case c({1, 1, 1, 256, 256, 32, 16});
  const Got got = run("gna:kernel_size=64,stride=64", c.input());
  CHECK(got.stats.pairs == 256 * 64);
  for (Index block = 0; block < 4; ++block) {
    AttendInput in = c.input();
    for (TensorView* x : {&in.q, &in.k, &in.v}) {
      x->data = x->at({0, 0, block * 64});
      x->shape[2] = 64;
    }
    const Got one = run("dense", in);
    CHECK(std::equal(one.o.begin(), one.o.end(), got.o.begin() + block * 64 * 16));
    CHECK(std::equal(one.lse.begin(), one.lse.end(), got.lse.begin() + block * 64));
  }
  // Two axes: pairs in the same block of 6 × 8.
  const Neighborhood n{{24, 32}, {6, 8}, {6, 8}, {1, 1}, {0, 0}};
  const Case image(sizes(n));
  const Sees blocked = [](Index, Index, Index t, Index j) {
    return t / 32 / 6 == j / 32 / 6 && t % 32 / 8 == j % 32 / 8;
  };
  CHECK_AGREES(run(n.call("gna"), image.input()), naive_attention(image, blocked), image);
}

TEST_CASE("gna with the grid as its window is self attention") {
  const Neighborhood n{{9, 13, 5}, {9, 13, 5}, {4, 13, 1}, {1, 1, 1}, {0, 0, 0}};
  const Case c(sizes(n));
  CHECK_AGREES(run(n.call("gna"), c.input()), naive_attention(c, dense_sees(c, false)), c);
}

TEST_CASE("gna visits the tiles that were counted beforehand") {
  const Neighborhood many[] = {
      {{64, 64}, {16, 16}, {1, 1}, {1, 1}, {0, 0}},
      {{64, 64}, {16, 16}, {16, 16}, {1, 1}, {0, 0}},
      {{64, 64}, {20, 20}, {4, 4}, {1, 1}, {0, 0}},
      {{40, 50}, {7, 9}, {2, 3}, {2, 3}, {0, 1}},
      {{9, 20, 31}, {4, 8, 5}, {4, 2, 1}, {1, 1, 3}, {1, 0, 0}},
      {{3000}, {300}, {50}, {1}, {0}},
      {{3000}, {300}, {1}, {7}, {1}},
  };
  for (const Neighborhood& n : many) {
    const std::string call = n.call("gna");
    CAPTURE(call);
    const Case c({2, 2, 1, n.tokens(), n.tokens(), 8, 8});
    const AttendStats stats = run(call, c.input()).stats;
    const SlidingTiles windows(windows_of(n));
    CHECK(stats.tiles_planned == 4 * windows.visits().visited);
    CHECK(stats.tiles_visited == 4 * windows.visits().visited);
  }
}

TEST_CASE("gna needs no mask where it is perfectly sparse, and a mask changes nothing there") {
  const Neighborhood n{{64, 64}, {16, 16}, {16, 16}, {1, 1}, {0, 0}};
  CHECK(SlidingTiles(windows_of(n)).visits().perfectly_sparse);
  const Case c(sizes(n));
  Plan plan = plan_of(MechanismCall::parse(n.call("gna")), c.input());
  Index masked = 0;
  walk(plan, [&](const RowBlock&, const std::vector<Tile>& tiles) {
    for (const Tile& t : tiles) masked += t.mask.kind != Mask::Kind::full;
  });
  CHECK(masked == 0);
  const Got plain = run(plan);
  plan.emit = [emit = plan.emit](const RowBlock& rows, Tiles& tiles) {
    std::vector<Tile> memory;
    Tiles full(tiles.scratch(), memory);
    emit(rows, full);
    for (const Tile& t : full.list()) {
      const Index stride = ceil_div(t.columns.count, 64);
      const auto words = tiles.take<std::uint64_t>(rows.rows * stride);
      std::fill(words.begin(), words.end(), ~std::uint64_t{0});
      tiles.add(t.rows, t.columns, Mask::bits(words.data(), stride), t.source);
    }
  };
  const Got tested = run(plan);
  CHECK(same_bits(plain.o, tested.o));
  CHECK(same_bits(plain.lse, tested.lse));
}

TEST_CASE("gna: the same bits for any number of threads") {
  const Neighborhood n{{30, 31}, {9, 10}, {4, 3}, {1, 2}, {0, 0}};
  const Case c({2, 4, 2, n.tokens(), n.tokens(), 16, 16});
  Got first;
  for (const int threads : {1, 2, 3}) {
    const UseThreads use(threads);
    const Got got = run(n.call("gna"), c.input());
    if (threads == 1) first = got;
    CHECK(same_bits(got.o, first.o));
    CHECK(same_bits(got.lse, first.lse));
  }
}

TEST_CASE("gna refuses what it cannot mean") {
  const Case c({1, 1, 1, 30, 30, 16, 16});
  CHECK_FAILS(run("gna:kernel_size=3,stride=4", c.input()), UsageError,
              "gna: stride = 4 on axis 0, expected at most kernel_size = 3");
  CHECK_FAILS(run("gna:grid=5x6,kernel_size=3x4,stride=1x5", c.input()), UsageError,
              "gna: stride = 5 on axis 1, expected at most kernel_size = 4");
  CHECK_FAILS(run("gna:kernel_size=3,stride=0", c.input()), UsageError, "gna: stride = 0, expected values >= 1");
  CHECK_FAILS(run("gna:grid=5x6,kernel_size=3,stride=1x1x1", c.input()), UsageError,
              "gna: stride = 1x1x1, expected one value or 2 for grid = 5x6");
  CHECK_FAILS(run("gna:kernel_size=8,dilation=4", c.input()), UsageError,
              "gna: kernel_size · dilation = 8 · 4 on axis 0, expected at most its length 30");
}
