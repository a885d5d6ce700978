// s2 against its mask: a window of blocks, and every V-th block before it at a phase of the KV head's own.
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>

#include "heed/kernel/kernels.h"
#include "heed/plan/strided_blocks.h"
#include "support/chunks.h"
#include "support/naive.h"

using namespace heed;
using namespace heed::test;

namespace {

struct Options {
  Index block = 16, local = 2, stride = 3, dense = 0, offset = 0;
  bool same_phase = false, allow_partial = true;
  std::string call() const {
    return fmt::format(
        "s2:block={},local_blocks={},stride_blocks={},dense_heads={},offset={},same_phase={},allow_partial={}", block,
        local, stride, dense, offset, same_phase, allow_partial);
  }
};

bool block_seen(const Case& c, const Options& o, Index g, Index i, Index j) {
  const Index step = o.same_phase ? 0 : std::max<Index>(1, o.stride / c.size.Hq);
  return j <= i && (g >= c.size.Hk - o.dense || i - j < o.local || (j + g * step + o.offset) % o.stride == 0);
}

Sees s2_sees(const Case& c, const Options& o) {
  return [&c, o](Index, Index h, Index t, Index j) {
    const Index p = position(c, t);
    return j <= p && block_seen(c, o, c.kv_head(h), p / o.block, j / o.block);
  };
}

void check_s2(const Case& c, const Options& o) {
  const std::string call = o.call();
  CAPTURE(call);
  const Naive want = naive_attention(c, s2_sees(c, o));
  for (const std::string& isa : available_isas()) {
    const UseIsa use(isa);
    const Got got = run(call, c.input());
    CHECK_AGREES(got, want, c);
    CHECK(got.stats.pairs == want.pairs);
  }
}

}  // namespace

TEST_CASE("s2 equals its mask") {
  for (const DType arithmetic : {DType::f32, DType::bf16})
    for (const Options& o :
         {Options{}, Options{.local = 1, .stride = 4, .offset = 3}, Options{.stride = 2, .dense = 1},
          Options{.block = 32, .local = 1, .stride = 5, .same_phase = true},
          Options{.block = 1, .local = 7, .stride = 9}, Options{.local = 3, .stride = 16, .offset = 5},
          Options{.block = 64, .local = 1, .stride = 2}}) {
      check_s2(Case({1, 4, 4, 201, 201, 33, 16}, DType::f32, arithmetic), o);
      check_s2(Case({2, 8, 2, 67, 333, 16, 40}, DType::f32, arithmetic, Layout::scattered), o);
      check_s2(Case({1, 8, 1, 1, 450, 64, 64}, DType::f16, arithmetic), o);
      check_s2(Case({1, 2, 2, 3, 3, 7, 9}, DType::bf16, arithmetic), o);
    }
  check_s2(Case({1, 4, 2, 1300, 1300, 8, 8}), {.block = 64, .local = 4, .stride = 4});
  check_s2(Case({1, 4, 4, 300, 1100, 256, 24}, DType::bf16, DType::bf16, Layout::tokens),
           {.block = 16, .local = 4, .stride = 4});
}

TEST_CASE("s2 with stride 1, or a window of all blocks, is dense") {
  const Case c({1, 4, 2, 210, 260, 32, 32});
  const Naive dense = naive_attention(c, dense_sees(c, true));
  for (const std::string call : {"s2:block=16,stride_blocks=1", "s2:block=16,stride_blocks=1,local_blocks=0",
                                 "s2:block=32,local_blocks=9,stride_blocks=7", "s2:block=32,local_blocks=4000",
                                 "s2:block=512", "s2:block=16,stride_blocks=5,dense_heads=2"}) {
    const Got got = run(call, c.input());
    const std::string differs = difference(got, dense, c, 1e-5);
    CHECK_MESSAGE(differs.empty(), call, differs);
    CHECK(got.stats.pairs == dense.pairs);
  }
}

TEST_CASE("s2 emits few tiles") {
  // Owned blocks are one tile for all four blocks of a row block; of its window and the owned block nearest to it, at
  // most what each block of queries sees.
  const Options o{.block = 64, .local = 3, .stride = 4};
  const Case c({1, 4, 4, 2048, 2048, 8, 8});
  Index most = 0, runs = 0;
  for (Index g = 0; g < 4; ++g)
    for (Index i = 0; i < 32; ++i) {
      for (Index j = 0; j <= i; ++j)
        runs += block_seen(c, o, g, i, j) && (j == 0 || !block_seen(c, o, g, i, j - 1)) ? 1 : 0;
      if (i % 4 == 3) most += i / 4 + 8;
    }
  const Got got = run(o.call(), c.input());
  CHECK(got.stats.tiles_planned <= most);
  CHECK(got.stats.tiles_planned * 2 < runs);
  CHECK(got.stats.tiles_visited == got.stats.tiles_planned);
  CHECK(got.stats.pairs_computed < got.stats.pairs * 12 / 10);
}

TEST_CASE("s2: one-token calls give the rows of the prefill, from a cache that forgot what it may") {
  // Every query across many borders of blocks and windows. Forgotten blocks hold rubbish.
  for (const Options& o : {Options{.block = 8, .local = 2, .stride = 3},
                           Options{.block = 8, .local = 1, .stride = 4, .dense = 1, .offset = 2}}) {
    const Sizes s{1, 4, 2, 130, 130, 16, 16};
    const Case c(s);
    const Naive want = naive_attention(c, s2_sees(c, o));
    const StridedBlocks shards{
        .heads = 2, .local = o.local, .stride = o.stride, .step = 1, .offset = o.offset, .dense = o.dense};
    Case cache = c;
    Index forgotten = 0;
    for (Index t = 0; t < s.N; ++t) {
      for (Index g = 0; g < 2; ++g)
        for (Index j = 0; j < t; ++j)
          if (shards.may_forget(g, t / o.block, j / o.block)) {
            ++forgotten;
            for (Index d = 0; d < 16; ++d) cache.k.set(0, g, j, d, 30), cache.v.set(0, g, j, d, 1e4);
          }
      const Got got = run_part(o.call(), cache, t, t + 1, s.N);
      const Case one({1, 4, 2, 1, t + 1, 16, 16});
      Naive row;
      for (Index h = 0; h < 4; ++h) {
        const auto i = static_cast<std::ptrdiff_t>(h * s.N + t);
        row.o.insert(row.o.end(), want.o.begin() + i * 16, want.o.begin() + (i + 1) * 16);
        row.lse.push_back(want.lse[static_cast<size_t>(i)]);
      }
      CHECK_AGREES(got, row, one);
    }
    CHECK(forgotten > 1000);
  }
}

TEST_CASE("s2: chunks of a prompt give the bits of the whole") {
  const Case c({1, 4, 2, 700, 700, 16, 16});
  const std::string call = Options{.block = 32, .local = 2, .stride = 2}.call();
  const Got whole = run(call, c.input());
  for (const Index chunk : {100, 257, 300, 512})
    for (Index first = 0; first < 700; first += chunk) {
      const Index end = std::min<Index>(700, first + chunk);
      // Few rows are cut along the columns, which changes the order of sums.
      if (end - first <= 256) {
        const Got part = run_part(call, c, first, end, 700);
        double worst = 0;
        for (Index h = 0; h < 4; ++h)
          for (Index i = 0; i < (end - first) * 16; ++i)
            worst = std::max(worst,
                             static_cast<double>(std::fabs(part.o[static_cast<size_t>(h * (end - first) * 16 + i)] -
                                                           whole.o[static_cast<size_t>((h * 700 + first) * 16 + i)])));
        CHECK(worst < 1e-5);
      } else {
        CHECK(rows_that_differ(whole, run_part(call, c, first, end, 700), c, first, end) == 0);
      }
    }
}

TEST_CASE("s2: no output depends on a later token") {
  const Sizes s{1, 4, 2, 280, 300, 16, 16};
  const Case c(s);
  const std::string call = Options{.stride = 2}.call();
  const Got before = run(call, c.input());
  for (const Index t : {0, 12, 50, 130, 255, 270}) {
    Case changed = c;
    for (Index h = 0; h < 4; ++h)
      for (Index later = t + 1; later < s.N; ++later) changed.q.set(0, h, later, 2, -7);
    for (Index g = 0; g < 2; ++g)
      for (Index j = position(c, t) + 1; j < s.M; ++j)
        for (Index d = 0; d < 16; ++d) changed.k.set(0, g, j, d, 20), changed.v.set(0, g, j, d, 500);
    const Got after = run(call, changed.input());
    Index differing = 0;
    for (Index h = 0; h < 4; ++h)
      for (Index i = 0; i <= t; ++i) {
        const auto row = static_cast<size_t>(h * s.N + i);
        differing += std::memcmp(&before.o[row * 16], &after.o[row * 16], 64) != 0 || before.lse[row] != after.lse[row];
      }
    CHECK_MESSAGE(differing == 0, differing, " rows at or before ", t, " changed");
  }
}

TEST_CASE("s2: the same bits for any number of threads") {
  for (const std::string& isa : available_isas()) {
    const UseIsa use(isa);
    for (const Sizes& s : {Sizes{2, 4, 4, 600, 600, 16, 16}, Sizes{1, 4, 4, 1, 900, 32, 32}}) {
      const Case c(s);
      Got first;
      for (const int n : {1, 2, 3}) {
        const UseThreads threads(n);
        const Got got = run("s2:block=16", c.input());
        if (n == 1) first = got;
        CHECK(same_bits(got.o, first.o));
        CHECK(same_bits(got.lse, first.lse));
      }
    }
  }
}

TEST_CASE("s2 finds a key at any depth where all heads at one phase miss it") {
  // A pass key anywhere in 64 blocks: q and the key's k agree, all other keys are far from q. Some head must bring the
  // key's value home. The untrained half of the paper's retrieval: what no head sees nobody finds.
  constexpr Index block = 16, blocks = 64, n = block * blocks;
  Index found = 0, found_same_phase = 0;
  for (Index at = 0; at < blocks; ++at) {
    Case c({1, 4, 4, 1, n, 8, 1});
    for (Index h = 0; h < 4; ++h) {
      for (Index d = 0; d < 8; ++d) c.q.set(0, h, 0, d, d == 0 ? 20 : 0);
      for (Index j = 0; j < n; ++j) {
        const bool key = j == at * block + 5;
        c.k.set(0, h, j, 0, key ? 2 : -1);
        c.v.set(0, h, j, 0, key ? 1 : 0);
      }
    }
    const auto finds = [&](const std::string& call) {
      const Got got = run(call, c.input());
      return *std::max_element(got.o.begin(), got.o.end()) > 0.9F ? 1 : 0;
    };
    found += finds("s2:block=16,local_blocks=4,stride_blocks=4");
    found_same_phase += finds("s2:block=16,local_blocks=4,stride_blocks=4,same_phase=true,allow_partial=true");
  }
  CHECK(found == blocks);
  CHECK(found_same_phase == 4 + 15);  // the window, and of the 60 blocks before it every fourth
}

TEST_CASE("s2 refuses what it cannot mean, and heads that leave gaps between them") {
  const Case c({1, 4, 2, 200, 200, 16, 16});
  CHECK_FAILS(run("s2:block=48", c.input()), UsageError, "s2: block = 48, expected a power of two");
  CHECK_FAILS(run("s2:block=0", c.input()), UsageError, "s2: block = 0, expected >= 1");
  CHECK_FAILS(run("s2:local_blocks=0", c.input()), UsageError,
              "s2: local_blocks = 0, expected >= 1 with stride_blocks = 4");
  CHECK_FAILS(run("s2:stride_blocks=0", c.input()), UsageError, "s2: stride_blocks = 0, expected >= 1");
  CHECK_FAILS(run("s2:offset=4", c.input()), UsageError, "s2: offset = 4, expected less than stride_blocks = 4");
  CHECK_FAILS(run("s2:dense_heads=3", c.input()), UsageError, "s2: dense_heads = 3, expected at most the 2 KV heads");
  CHECK_FAILS(
      run("s2:block=16", c.input()), UsageError,
      "s2: stride_blocks = 4, expected one that 2 KV heads cover: they see 75.8 % of 13 blocks between them, which "
      "allow_partial=true permits");
  CHECK_NOTHROW(run("s2:block=16,allow_partial=true", c.input()));
  CHECK_NOTHROW(run("s2:block=16,stride_blocks=2", c.input()));
  CHECK_THROWS_AS(run("s2:block=16,stride_blocks=2,same_phase=true", c.input()), UsageError);
  CHECK_NOTHROW(run("s2:block=16,dense_heads=1", c.input()));  // one dense head covers everything
  CHECK_NOTHROW(run("s2:block=64", c.input()));  // a window of all blocks
  // A chunk of a longer prompt is judged by the prompt.
  CHECK_THROWS_AS(run_part("s2:block=16", c, 0, 40, 200), UsageError);
  CHECK_NOTHROW(run_part("s2:block=16", c, 0, 40, 40));
}
