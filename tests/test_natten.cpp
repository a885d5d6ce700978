// natten against its definition: the nearest tokens on every axis of a grid.
#include <doctest/doctest.h>

#include <random>

#include "heed/kernel/kernels.h"
#include "support/grids.h"

using namespace heed;
using namespace heed::test;

namespace {

/// On every instruction set.
void check_natten(Neighborhood n, const Case& c) {
  n.stride.assign(n.grid.size(), 1);
  const std::string call = n.call("natten");
  CAPTURE(call);
  const Naive want = naive_attention(c, neighborhood_sees(n));
  for (const std::string& isa : available_isas()) {
    const UseIsa use(isa);
    const Got got = run(call, c.input());
    CHECK_AGREES(got, want, c);
    CHECK(got.stats.pairs == want.pairs);
  }
}

}  // namespace

TEST_CASE("natten equals its definition on random grids") {
  std::mt19937 random(7);
  const auto between = [&](Index low, Index high) { return std::uniform_int_distribution<Index>(low, high)(random); };
  for (int round = 0; round < 45; ++round) {
    const size_t axes = 1 + static_cast<size_t>(round % 3);
    Neighborhood n;
    for (size_t a = 0; a < axes; ++a) {
      const Index length = axes == 1 ? between(2, 400) : axes == 2 ? between(2, 23) : between(2, 8);
      const Index d = between(0, 2) != 0 ? 1 : between(1, length / 2);
      // Often the largest window that fits.
      const Index k = between(0, 3) == 0 ? length / d : between(2, length / d);
      n.grid.push_back(length), n.kernel.push_back(k), n.dilation.push_back(d), n.causal.push_back(between(0, 2) == 0);
    }
    const Sizes s{1 + round % 2,           4, round % 2 == 0 ? 4 : 1, n.tokens(), n.tokens(), round % 7 == 0 ? 128 : 17,
                  round % 3 == 0 ? 24 : 17};
    const DType element = round % 3 == 0 ? DType::f32 : round % 3 == 1 ? DType::bf16 : DType::f16;
    check_natten(n, Case(s, element, round % 4 == 1 ? DType::bf16 : DType::f32,
                         round % 5 == 0 ? Layout::tokens : Layout::packed, static_cast<std::uint64_t>(round)));
  }
}

TEST_CASE("natten: one number stands for every axis, and --causal for every flag") {
  const Case c({1, 2, 1, 210, 210, 16, 16});
  const Neighborhood n{{5, 6, 7}, {3, 3, 3}, {1, 1, 1}, {1, 1, 1}, {1, 1, 1}};
  const Naive want = naive_attention(c, neighborhood_sees(n));
  CHECK_AGREES(run("natten:grid=5x6x7,kernel_size=3,is_causal=1", c.input()), want, c);
  CHECK_AGREES(run("natten:grid=5x6x7,kernel_size=3", c.input(true)), want, c);
  // Without a grid: one axis. All of it, causal, is causal attention.
  CHECK_AGREES(run("natten:kernel_size=210", c.input(true)), naive_attention(c, dense_sees(c, true)), c);
  CHECK_AGREES(run("natten:kernel_size=210", c.input()), naive_attention(c, dense_sees(c, false)), c);
}

TEST_CASE("natten: a window that is not causal has as many keys everywhere, its own among them") {
  for (const std::string grid : {"210", "14x15", "5x6x7"}) {
    const Case c({1, 1, 1, 210, 210, 8, 210});
    Case one_hot = c;  // values are unit vectors: the output holds the weights
    for (Index j = 0; j < 210; ++j)
      for (Index e = 0; e < 210; ++e) one_hot.v.set(0, 0, j, e, j == e ? 1 : 0);
    for (Index k = 2; k <= 5; ++k) {
      const Got got = run(fmt::format("natten:grid={},kernel_size={}", grid, k), one_hot.input());
      const Index keys = grid == "210" ? k : grid == "14x15" ? k * k : k * k * k;
      for (Index t = 0; t < 210; ++t) {
        Index seen = 0;
        for (Index j = 0; j < 210; ++j) seen += got.o[static_cast<size_t>(t * 210 + j)] > 0;
        CHECK(seen == keys);
        CHECK(got.o[static_cast<size_t>(t * 210 + t)] > 0);
      }
    }
  }
}

TEST_CASE("natten: shifting the input shifts outputs far from the border") {
  const Index height = 18, width = 21, k = 5;
  const Case c({1, 1, 1, height * width, height * width, 16, 16});
  Case shifted = c;  // by one token along the second axis
  for (Index y = 0; y < height; ++y)
    for (Index x = 1; x < width; ++x)
      for (Index d = 0; d < 16; ++d) {
        shifted.q.set(0, 0, y * width + x, d, c.q.get(0, 0, y * width + x - 1, d));
        shifted.k.set(0, 0, y * width + x, d, c.k.get(0, 0, y * width + x - 1, d));
        shifted.v.set(0, 0, y * width + x, d, c.v.get(0, 0, y * width + x - 1, d));
      }
  const Got a = run("natten:grid=18x21,kernel_size=5", c.input()),
            b = run("natten:grid=18x21,kernel_size=5", shifted.input());
  for (Index y = 0; y < height; ++y)
    for (Index x = k / 2; x + k / 2 + 1 < width; ++x)
      for (Index d = 0; d < 16; ++d)
        CHECK(b.o[static_cast<size_t>((y * width + x + 1) * 16 + d)] ==
              doctest::Approx(a.o[static_cast<size_t>((y * width + x) * 16 + d)]).epsilon(1e-4));
}

TEST_CASE("natten with extra keys is one softmax over both") {
  const Neighborhood n{{13, 17}, {5, 4}, {1, 1}, {1, 2}, {0, 1}};
  for (const DType arithmetic : {DType::f32, DType::bf16})
    for (const Index extra : {1, 7, 300}) {
      const Case c({2, 4, 2, 221, 221, 24, 16}, DType::f32, arithmetic);
      Case more({2, 4, 2, 221, extra, 24, 16}, DType::f32, arithmetic, Layout::scattered, 9);
      more.q = c.q;
      const Naive want = naive_with_extra(c, neighborhood_sees(n), more);
      AttendInput in = c.input();
      in.extra["k_extra"] = more.k.view();
      in.extra["v_extra"] = more.v.view();
      for (const std::string& isa : available_isas()) {
        const UseIsa use(isa);
        for (const std::string name : {"natten", "gna"}) {
          const Got got = run(n.call(name), in);
          CHECK_AGREES(got, want, c);
          CHECK(got.stats.pairs == want.pairs);
        }
      }
    }
}

TEST_CASE("natten: no output depends on a later token of a causal axis") {
  const Sizes s{1, 2, 1, 240, 240, 16, 16};
  const Case c(s);
  const std::string call = "natten:grid=12x20,kernel_size=5x7,is_causal=1x0";
  const Got before = run(call, c.input());
  for (const Index row : {0, 3, 7, 10}) {
    Case changed = c;
    for (Index j = (row + 1) * 20; j < 240; ++j)
      for (Index d = 0; d < 16; ++d) changed.k.set(0, 0, j, d, 20), changed.v.set(0, 0, j, d, 500);
    const Got after = run(call, changed.input());
    for (Index h = 0; h < 2; ++h)
      CHECK(std::equal(before.o.begin() + h * 240 * 16, before.o.begin() + (h * 240 + (row + 1) * 20) * 16,
                       after.o.begin() + h * 240 * 16));
  }
}

TEST_CASE("natten: the same bits for any number of threads") {
  const Case c({2, 4, 2, 693, 693, 16, 16});
  Got first;
  for (const int threads : {1, 2, 3}) {
    const UseThreads use(threads);
    const Got got = run("natten:grid=7x9x11,kernel_size=3x4x5,dilation=2x1x2", c.input());
    if (threads == 1) first = got;
    CHECK(same_bits(got.o, first.o));
    CHECK(same_bits(got.lse, first.lse));
  }
}

TEST_CASE("natten refuses what it cannot mean") {
  const Case c({1, 2, 1, 30, 30, 16, 8});
  CHECK_FAILS(run("natten", c.input()), UsageError,
              "natten: kernel_size is missing, expected keys in a window, per axis");
  CHECK_FAILS(run("natten:kernel_size=1", c.input()), UsageError, "natten: kernel_size = 1, expected values >= 2");
  CHECK_FAILS(run("natten:kernel_size=31", c.input()), UsageError,
              "natten: kernel_size · dilation = 31 · 1 on axis 0, expected at most its length 30");
  CHECK_FAILS(run("natten:grid=5x6,kernel_size=3,dilation=1x3", c.input()), UsageError,
              "natten: kernel_size · dilation = 3 · 3 on axis 1, expected at most its length 6");
  CHECK_FAILS(run("natten:grid=5x6,kernel_size=3x3x3", c.input()), UsageError,
              "natten: kernel_size = 3x3x3, expected one value or 2 for grid = 5x6");
  CHECK_FAILS(run("natten:kernel_size=3x3", c.input()), UsageError,
              "natten: kernel_size = 3x3, expected one value for grid = 30");
  CHECK_FAILS(run("natten:grid=5x7,kernel_size=3", c.input()), UsageError,
              "natten: grid = 5x7, expected lengths whose product is N = 30");
  CHECK_FAILS(run("natten:grid=4611686018427387904x4,kernel_size=3", c.input()), UsageError,
              "natten: grid = 4611686018427387904x4, expected lengths whose product is N = 30");
  CHECK_FAILS(run("natten:grid=1x1x5x6,kernel_size=3", c.input()), UsageError,
              "natten: grid = 1x1x5x6, expected 1 … 3 axes");
  CHECK_FAILS(run("natten:kernel_size=3,is_causal=2", c.input()), UsageError,
              "natten: is_causal = 2, expected values 0 … 1");
  CHECK_FAILS(run("natten:kernel_size=3,dilation=0", c.input()), UsageError,
              "natten: dilation = 0, expected values >= 1");
  const Case unequal({1, 1, 1, 20, 30, 16, 8});
  CHECK_FAILS(run("natten:kernel_size=3", unequal.input()), Error,
              "natten: 20 queries and 30 keys, expected as many of one as of the other");
  const Case extra({1, 2, 1, 30, 4, 16, 8}), longer({1, 2, 1, 30, 5, 16, 8});
  AttendInput in = c.input();
  in.extra["k_extra"] = extra.k.view();
  CHECK_FAILS(run("natten:kernel_size=3", in), Error, "natten: tensor v_extra is missing, expected it beside k_extra");
  in.extra["v_extra"] = longer.v.view();
  CHECK_FAILS(run("natten:kernel_size=3", in), Error,
              "v_extra: shape = [1, 1, 5, 8], expected the 4 tokens of k_extra");
  const Case heads({1, 3, 2, 30, 30, 16, 8});
  CHECK_FAILS(run("natten:kernel_size=3", heads.input()), Error, "q: 3 heads, expected a multiple of the 2 heads of k");
}
