// moba against its equations: block means, the top of their scores, softmax over what was chosen.
#include <doctest/doctest.h>

#include "heed/kernel/kernels.h"
#include "support/naive.h"

using namespace heed;
using namespace heed::test;

namespace {

std::string call_of(const MobaOptions& o) {
  return fmt::format("moba:block={},top_k={},tie={},sink={}", o.block, o.top_k, o.higher ? "higher" : "lower", o.sink);
}

/// On every instruction set.
void check_moba(const Case& c, const MobaOptions& options, const Docs& docs = {}) {
  AttendInput in = c.input();
  if (!docs.empty()) in.extra["doc"] = {docs.data(), DType::i32, {c.size.B, c.size.M}};
  const std::string call = call_of(options);
  CAPTURE(call);
  const Naive want = naive_moba(c, options, docs);
  Index undecided = 0;
  for (const char u : want.undecided) undecided += u;
  CHECK(undecided * 5 <= static_cast<Index>(want.undecided.size()));  // most rows must be judged
  for (const std::string& isa : available_isas()) {
    const UseIsa use(isa);
    const Got got = run(call, in);
    CHECK_AGREES(got, want, c);
    if (undecided == 0) CHECK(got.stats.pairs == want.pairs);
  }
}

}  // namespace

TEST_CASE("moba equals its equations") {
  for (const DType arithmetic : {DType::f32, DType::bf16}) {
    for (const Index n : {1, 31, 32, 33, 200})
      for (const Index group : {1, 4})
        for (const Index top_k : {1, 2, 3, 99})
          check_moba(Case({1, 4, 4 / group, n, n, 33, 16}, DType::f32, arithmetic), {.block = 32, .top_k = top_k});
    for (const Index block : {1, 7, 64, 100})
      for (const Index top_k : {2, 5}) {
        check_moba(Case({2, 2, 1, 259, 259, 64, 40}, DType::f32, arithmetic), {.block = block, .top_k = top_k});
        check_moba(Case({1, 2, 1, 70, 411, 16, 16}, DType::f16, arithmetic), {.block = block, .top_k = top_k});
        check_moba(Case({1, 8, 1, 1, 411, 80, 16}, DType::f32, arithmetic), {.block = block, .top_k = top_k});
      }
  }
}

TEST_CASE("moba over several row blocks") {
  check_moba(Case({1, 2, 1, 1500, 1500, 16, 16}), {.block = 64, .top_k = 4});
  check_moba(Case({1, 1, 1, 700, 2300, 16, 8}, DType::bf16, DType::bf16), {.block = 100, .top_k = 6});
  check_moba(Case({1, 4, 2, 700, 700, 24, 16}, DType::f32, DType::f32, Layout::scattered), {.block = 48, .top_k = 3});
}

TEST_CASE("moba with as many blocks as there are is dense") {
  const Case c({1, 4, 2, 300, 333, 32, 32});
  const Naive dense = naive_attention(c, dense_sees(c, true));
  for (const Index top_k : {11, 12, 5000}) {  // 333 keys are 11 blocks of 32
    const Got got = run(fmt::format("moba:block=32,top_k={}", top_k), c.input());
    const std::string differs = difference(got, dense, c, 1e-5);
    CHECK_MESSAGE(differs.empty(), differs);
  }
  CHECK_AGREES(run("moba:block=4000", c.input()), dense, c);
}

TEST_CASE("moba with one block is block-diagonal") {
  const Case c({1, 4, 2, 300, 333, 32, 32});
  const Sees diagonal = [&](Index, Index, Index t, Index j) {
    const Index p = position(c, t);
    return j <= p && j / 48 == p / 48;
  };
  CHECK_AGREES(run("moba:block=48,top_k=1", c.input()), naive_attention(c, diagonal), c);
}

TEST_CASE("moba breaks ties as it is told") {
  // Keys repeat every 32 tokens, so block means are equal to the bit while values are not.
  Case c({1, 2, 1, 230, 230, 16, 8});
  for (Index j = 32; j < 230; ++j)
    for (Index d = 0; d < 16; ++d) c.k.set(0, 0, j, d, c.k.get(0, 0, j - 32, d));
  for (const bool higher : {false, true})
    for (const Index top_k : {2, 3, 5}) check_moba(c, {.block = 32, .top_k = top_k, .higher = higher, .margin = 0});
  // Two kinds of blocks in turn: equal scores beside unequal ones.
  Case two({1, 2, 2, 260, 260, 16, 8});
  for (Index h = 0; h < 2; ++h)
    for (Index j = 64; j < 260; ++j)
      for (Index d = 0; d < 16; ++d) two.k.set(0, h, j, d, two.k.get(0, h, j - 64, d));
  for (const bool higher : {false, true})
    for (const Index top_k : {2, 3, 4, 6})
      check_moba(two, {.block = 32, .top_k = top_k, .higher = higher, .margin = 0});
  // All scores zero.
  Case zero({1, 1, 1, 150, 150, 16, 8});
  for (Index j = 0; j < 150; ++j)
    for (Index d = 0; d < 16; ++d) zero.k.set(0, 0, j, d, 0);
  for (const bool higher : {false, true}) check_moba(zero, {.block = 16, .top_k = 4, .higher = higher, .margin = 0});
}

TEST_CASE("moba's blocks restart at each document") {
  const Case c({2, 2, 1, 260, 300, 24, 16});
  Docs docs = documents({1, 99, 16, 130, 54});
  const Docs second = documents({300});
  docs.insert(docs.end(), second.begin(), second.end());
  for (const Index block : {16, 50})
    for (const Index top_k : {1, 2, 3, 99})
      for (const Index sink : {0, 5}) check_moba(c, {.block = block, .top_k = top_k, .sink = sink}, docs);
}

TEST_CASE("moba's sink is seen by every query") {
  const Case c({1, 4, 2, 250, 300, 24, 16});
  for (const Index sink : {1, 4, 32, 40, 1000})
    for (const Index top_k : {1, 3}) check_moba(c, {.block = 32, .top_k = top_k, .sink = sink});
}

TEST_CASE("moba: one query at a time gives the rows of the whole") {
  const Case c({1, 2, 1, 150, 150, 32, 16});
  const Naive want = naive_moba(c, {.block = 16, .top_k = 3});
  for (const Index t : {0, 1, 15, 16, 63, 64, 100, 149}) {
    Case one({1, 2, 1, 1, t + 1, 32, 16});
    for (Index d = 0; d < 32; ++d)
      for (Index h = 0; h < 2; ++h) one.q.set(0, h, 0, d, c.q.get(0, h, t, d));
    for (Index j = 0; j <= t; ++j) {
      for (Index d = 0; d < 32; ++d) one.k.set(0, 0, j, d, c.k.get(0, 0, j, d));
      for (Index d = 0; d < 16; ++d) one.v.set(0, 0, j, d, c.v.get(0, 0, j, d));
    }
    Naive row;
    row.o.resize(32);
    row.lse.resize(2);
    row.undecided.resize(2);
    for (size_t h = 0; h < 2; ++h) {
      const size_t i = h * 150 + static_cast<size_t>(t);
      for (size_t d = 0; d < 16; ++d) row.o[h * 16 + d] = want.o[i * 16 + d];
      row.lse[h] = want.lse[i];
      row.undecided[h] = want.undecided[i];
    }
    CHECK_AGREES(run("moba:block=16,top_k=3", one.input()), row, one);
  }
}

TEST_CASE("moba: no output depends on a later token, block means included") {
  for (const std::string& isa : available_isas()) {
    const UseIsa use(isa);
    for (const DType arithmetic : {DType::f32, DType::bf16}) {
      const Sizes s{1, 2, 1, 280, 300, 16, 16};
      const Case c(s, DType::f32, arithmetic);
      for (const std::string call : {"moba:block=32,top_k=3", "moba:block=20,top_k=2,sink=3,tie=higher"}) {
        const Got before = run(call, c.input());
        for (const Index t : {0, 11, 12, 50, 130, 255, 270}) {
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
          CHECK_MESSAGE(differing == 0, c.describe(), ": ", call, ", ", differing, " rows at or before ", t,
                        " changed");
        }
      }
    }
  }
}

TEST_CASE("moba: the same bits for any number of threads") {
  for (const std::string& isa : available_isas()) {
    const UseIsa use(isa);
    for (const Sizes& s : {Sizes{2, 4, 2, 600, 600, 16, 16}, Sizes{1, 4, 1, 1, 900, 32, 32}}) {
      const Case c(s);
      Got first;
      for (const int n : {1, 2, 3}) {
        const UseThreads threads(n);
        const Got got = run("moba:block=32,top_k=4,sink=2", c.input());
        if (n == 1) first = got;
        CHECK(same_bits(got.o, first.o));
        CHECK(same_bits(got.lse, first.lse));
      }
    }
  }
}

TEST_CASE("moba refuses what it cannot mean") {
  const Case c({1, 1, 1, 8, 8, 16, 16});
  CHECK_FAILS(run("moba:top_k=0", c.input()), UsageError, "moba: top_k = 0, expected >= 1");
  CHECK_FAILS(run("moba:block=0", c.input()), UsageError, "moba: block = 0, expected >= 1");
  CHECK_FAILS(run("moba:sink=-1", c.input()), UsageError, "moba: sink = -1, expected >= 0");
  CHECK_THROWS_AS(run("moba:tie=middle", c.input()), UsageError);
}
