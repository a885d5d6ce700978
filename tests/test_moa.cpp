// moa against its mask: every KV head has its own span of first tokens and a window of blocks.
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <random>

#include "heed/kernel/kernels.h"
#include "support/chunks.h"
#include "support/naive.h"

using namespace heed;
using namespace heed::test;

namespace {

struct Options {
  Index block = 16, sink = 16, min_span = 32, max_new = 0;
  std::vector<float> alpha = {}, beta = {};  // per KV head
  std::string call() const {
    return fmt::format("moa:block={},sink={},min_span={},max_new_tokens={}", block, sink, min_span, max_new);
  }
  std::map<std::string, TensorView, std::less<>> tensors() const {
    const auto heads = static_cast<Index>(alpha.size());
    return {{"alpha", {alpha.data(), DType::f32, {heads}}}, {"beta", {beta.data(), DType::f32, {heads}}}};
  }
};

AttendInput with_rules(const Case& c, const Options& o) {
  AttendInput in = c.input();
  for (const auto& [name, x] : o.tensors()) in.extra[name] = x;
  return in;
}

/// Tokens that head g keeps of a prompt of n.
Index span_of(const Options& o, size_t g, Index n) {
  const auto length = static_cast<double>(n + o.max_new);
  double s = std::floor(static_cast<double>(o.alpha[g]) + static_cast<double>(o.beta[g]) * length + 1e-9);
  s = std::max(std::min(s, length), static_cast<double>(o.min_span));
  return static_cast<Index>(std::ceil(s / static_cast<double>(o.block))) * o.block;
}

/// The mask of a prompt's queries: key block v of query block u is seen when v < sink / block or
/// v >= u + 1 - local / block.
Sees moa_sees(const Case& c, const Options& o, Index n) {
  return [&c, o, n](Index, Index h, Index t, Index j) {
    const Index p = position(c, t), span = span_of(o, static_cast<size_t>(c.kv_head(h)), n);
    const Index sink = std::min(span, o.sink), local = span - sink;
    const Index u = p / o.block, v = j / o.block;
    return j <= p && (v < sink / o.block || v >= u + 1 - local / o.block);
  };
}

Options random_rules(Index heads, std::uint64_t seed) {
  Options o;
  std::mt19937_64 random(seed);
  for (Index h = 0; h < heads; ++h) {
    o.alpha.push_back(static_cast<float>(random() % 100));
    o.beta.push_back(static_cast<float>(random() % 5) / 8);
  }
  o.alpha[0] = -20, o.beta[0] = 0.5F;
  return o;
}

void check_moa(const Case& c, const Options& o) {
  CAPTURE(o.call());
  const Naive want = naive_attention(c, moa_sees(c, o, c.size.M));
  for (const std::string& isa : available_isas()) {
    const UseIsa use(isa);
    const Got got = run(o.call(), with_rules(c, o));
    CHECK_AGREES(got, want, c);
    CHECK(got.stats.pairs == want.pairs);
  }
}

}  // namespace

TEST_CASE("moa equals its mask, with a span of its own for every KV head") {
  for (const DType arithmetic : {DType::f32, DType::bf16})
    for (const std::uint64_t seed : {1, 2, 3}) {
      Options o = random_rules(4, seed);
      check_moa(Case({1, 4, 4, 201, 201, 33, 16}, DType::f32, arithmetic), o);
      check_moa(Case({2, 16, 4, 67, 333, 16, 40}, DType::f32, arithmetic, Layout::scattered), o);
      check_moa(Case({1, 32, 4, 1, 450, 64, 64}, DType::f16, arithmetic), o);
      o.block = 8, o.sink = 24, o.min_span = 40, o.max_new = 77;
      check_moa(Case({1, 8, 4, 300, 700, 24, 8}, DType::bf16, arithmetic, Layout::tokens), o);
      o.block = 20, o.sink = 0;
      check_moa(Case({1, 4, 4, 411, 411, 16, 16}, DType::f32, arithmetic), o);
      check_moa(Case({1, 4, 4, 3, 43, 7, 9}, DType::f32, arithmetic), o);
    }
}

TEST_CASE("moa: one rule for every head is a sink and a window of whole blocks") {
  const Case c({1, 4, 2, 500, 500, 16, 16});
  for (const auto& [alpha, beta] : std::vector<std::pair<double, double>>{{0, 0.25}, {100, 0}, {-30, 0.5}, {0, 0.3}}) {
    Options o;
    o.alpha = {static_cast<float>(alpha), static_cast<float>(alpha)};
    o.beta = {static_cast<float>(beta), static_cast<float>(beta)};
    const Naive want = naive_attention(c, moa_sees(c, o, 500));
    const Got given = run(o.call(), with_rules(c, o));
    CHECK_AGREES(given, want, c);
    const Got same = run(fmt::format("{},alpha={},beta={}", o.call(), alpha, beta), c.input());
    CHECK(same_bits(given.o, same.o));
  }
  // The defaults: half of the length.
  Options o{.block = 64, .sink = 64, .min_span = 128};
  o.alpha = {0, 0}, o.beta = {0.5, 0.5};
  CHECK_AGREES(run("moa", c.input()), naive_attention(c, moa_sees(c, o, 500)), c);
  // One tensor, and the parameter for the other.
  AttendInput in = c.input();
  in.extra["alpha"] = o.tensors()["alpha"];
  CHECK(same_bits(run("moa:beta=0.5", in).o, run("moa", c.input()).o));
}

TEST_CASE("moa with alpha 0 and beta 1 is dense, in the prompt and after it") {
  const Case c({1, 4, 2, 260, 260, 32, 32});
  const Naive dense = naive_attention(c, dense_sees(c, true));
  const Got got = run("moa:beta=1", c.input());
  const std::string differs = difference(got, dense, c, 1e-5);
  CHECK_MESSAGE(differs.empty(), differs);
  CHECK(got.stats.pairs == dense.pairs);
  for (const Index t : {200, 230, 259}) {
    const Got step = run_part("moa:beta=1,max_new_tokens=60", c, t, t + 1, 200);
    CHECK(step.stats.pairs == 4 * (t + 1));
  }
  // A prompt no longer than the first tokens that all see.
  const Case brief({1, 2, 2, 50, 50, 16, 16});
  CHECK(run("moa:beta=0.1", brief.input()).stats.pairs == 2 * 50 * 51 / 2);
}

TEST_CASE("moa: steps after the prompt equal a ring cache, ragged and past its wrap") {
  // A cache of S_g slots for each KV head: the first tokens stay, the others go round. Slots know nothing of order.
  constexpr Index prompt = 70, n = 260;
  const Case c({2, 6, 3, n, n, 16, 8});
  Options o{.max_new = 30};
  o.alpha = {0, 10, 60}, o.beta = {0.2F, 0.5F, 0.9F};
  std::vector<Index> spans;
  for (size_t g = 0; g < 3; ++g) spans.push_back(span_of(o, g, prompt));
  REQUIRE(spans == std::vector<Index>{32, 64, 112});
  std::vector<std::vector<Index>> slots;  // per KV head, the token in each slot
  for (const Index s : spans) slots.emplace_back(static_cast<size_t>(s), -1);
  for (Index t = 0; t < n; ++t) {
    for (size_t g = 0; g < 3; ++g) {
      const Index ring = spans[g] - o.sink;
      slots[g][static_cast<size_t>(t < o.sink ? t : o.sink + (t - o.sink) % ring)] = t;
    }
    if (t < prompt) continue;
    const Case one({2, 6, 3, 1, t + 1, 16, 8});
    Case now = one;
    for (Index b = 0; b < 2; ++b) {
      for (Index h = 0; h < 6; ++h)
        for (Index d = 0; d < 16; ++d) now.q.set(b, h, 0, d, c.q.get(b, h, t, d));
      for (Index g = 0; g < 3; ++g)
        for (Index j = 0; j <= t; ++j) {
          for (Index d = 0; d < 16; ++d) now.k.set(b, g, j, d, c.k.get(b, g, j, d));
          for (Index d = 0; d < 8; ++d) now.v.set(b, g, j, d, c.v.get(b, g, j, d));
        }
    }
    const Naive want = naive_attention(now, [&](Index, Index h, Index, Index j) {
      const auto& held = slots[static_cast<size_t>(now.kv_head(h))];
      return std::find(held.begin(), held.end(), j) != held.end();
    });
    const Got got = run_part(o.call(), c, t, t + 1, prompt, o.tensors());
    CHECK_AGREES(got, want, now);
    CHECK(got.stats.pairs == want.pairs);
  }
  // Several steps in one call, and a call that holds the end of the prompt as well.
  const Got together = run_part(o.call(), c, 60, 90, prompt, o.tensors());
  for (Index t = 60; t < 90; ++t) {
    const Got step = run_part(o.call(), c, t, t + 1, prompt, o.tensors());
    for (Index lane = 0; lane < 12; ++lane)
      for (Index e = 0; e < 8; ++e)
        CHECK(std::fabs(together.o[static_cast<size_t>((lane * 30 + t - 60) * 8 + e)] -
                        step.o[static_cast<size_t>(lane * 8 + e)]) < 1e-5F);
  }
}

TEST_CASE("moa: chunks of a prompt give what the whole gives") {
  const Case c({1, 4, 2, 700, 700, 16, 16});
  Options o{.max_new = 100};
  o.alpha = {-50, 16}, o.beta = {0.3F, 0.6F};
  const Naive want = naive_attention(c, moa_sees(c, o, 700));
  const Got whole = run_part(o.call(), c, 0, 700, 700, o.tensors());
  CHECK_AGREES(whole, want, c);
  for (const Index chunk : {1, 100, 257, 300, 512})
    for (Index first = chunk == 1 ? 600 : 0; first < 700; first += chunk) {
      const Index end = std::min<Index>(700, first + chunk);
      const Got part = run_part(o.call(), c, first, end, 700, o.tensors());
      double worst = 0;
      for (Index h = 0; h < 4; ++h)
        for (Index i = 0; i < (end - first) * 16; ++i)
          worst =
              std::max(worst, static_cast<double>(std::fabs(part.o[static_cast<size_t>(h * (end - first) * 16 + i)] -
                                                            whole.o[static_cast<size_t>((h * 700 + first) * 16 + i)])));
      CHECK(worst < 1e-5);
      // Few rows are cut along the columns, which changes the order of sums; more are the same bits.
      if (end - first > 256) CHECK(rows_that_differ(whole, part, c, first, end) == 0);
    }
}

TEST_CASE("moa: no output depends on a later token") {
  const Sizes s{1, 4, 2, 280, 300, 16, 16};
  const Case c(s);
  Options o;
  o.alpha = {0, 40}, o.beta = {0.3F, 0.1F};
  const Got before = run(o.call(), with_rules(c, o));
  for (const Index t : {0, 12, 50, 130, 255, 270}) {
    Case changed = c;
    for (Index h = 0; h < 4; ++h)
      for (Index later = t + 1; later < s.N; ++later) changed.q.set(0, h, later, 2, -7);
    for (Index g = 0; g < 2; ++g)
      for (Index j = position(c, t) + 1; j < s.M; ++j)
        for (Index d = 0; d < 16; ++d) changed.k.set(0, g, j, d, 20), changed.v.set(0, g, j, d, 500);
    const Got after = run(o.call(), with_rules(changed, o));
    Index differing = 0;
    for (Index h = 0; h < 4; ++h)
      for (Index i = 0; i <= t; ++i) {
        const auto row = static_cast<size_t>(h * s.N + i);
        differing += std::memcmp(&before.o[row * 16], &after.o[row * 16], 64) != 0 || before.lse[row] != after.lse[row];
      }
    CHECK_MESSAGE(differing == 0, differing, " rows at or before ", t, " changed");
  }
}

TEST_CASE("moa: the same bits for any number of threads, and few tiles") {
  for (const std::string& isa : available_isas()) {
    const UseIsa use(isa);
    for (const Sizes& s : {Sizes{2, 4, 2, 600, 600, 16, 16}, Sizes{1, 4, 2, 1, 900, 32, 32}}) {
      const Case c(s);
      Got first;
      for (const int n : {1, 2, 3}) {
        const UseThreads threads(n);
        const Got got = run("moa:beta=0.3", c.input());
        if (n == 1) first = got;
        CHECK(same_bits(got.o, first.o));
        CHECK(same_bits(got.lse, first.lse));
      }
    }
  }
  // 16 blocks of 64, S = 320: the first block and a window of four. Row blocks of four blocks: a triangle; a triangle,
  // and before it 1, 2, 2 and 1 runs; the shared first block, three ends of windows and a triangle, twice.
  CHECK(run("moa:beta=0.3", Case({1, 2, 2, 1024, 1024, 8, 8}).input()).stats.tiles_planned == 2 * (1 + 7 + 5 + 5));
}

TEST_CASE("moa refuses what it cannot mean") {
  const Case c({1, 4, 2, 300, 300, 16, 16});
  CHECK_FAILS(run("moa:sink=60", c.input()), UsageError, "moa: sink = 60, expected a multiple of block = 64");
  CHECK_FAILS(run("moa:block=0", c.input()), UsageError, "moa: block = 0, expected >= 1");
  CHECK_FAILS(run("moa:beta=1.5", c.input()), UsageError, "moa: beta = 1.5, expected 0 … 1");
  CHECK_FAILS(run("moa:max_new_tokens=-1", c.input()), UsageError, "moa: max_new_tokens = -1, expected >= 0");
  Options o;
  o.alpha = {0, -200}, o.beta = {0.5F, 0.5F};
  CHECK_FAILS(run(o.call(), with_rules(c, o)), Error,
              "moa: span of KV head 1 = -50 (-200 + 0.5 · 300 tokens), expected >= 1");
  CHECK_FAILS(run(o.call() + ",beta=0.5", with_rules(c, o)), UsageError,
              "moa: beta = 0.5, expected not to be given beside the tensor beta");
  CHECK_FAILS(run("moa:beta=0", c.input()), Error, "moa: span of KV head 0 = 0 (0 + 0 · 300 tokens), expected >= 1");
  CHECK_FAILS(run("moa:min_span=64,beta=0.1", c.input()), Error,
              "moa: span of KV head 0 = 64, expected more than sink = 64");
  const std::vector<float> three{0, 0, 0};
  AttendInput in = c.input();
  in.extra["alpha"] = {three.data(), DType::f32, {3}};
  CHECK_FAILS(run("moa", in), Error, "alpha: shape = [3], expected [Hk]");
}
