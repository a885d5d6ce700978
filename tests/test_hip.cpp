// hip against its equations: a beam of halved stretches of keys, then softmax over what it ends with.
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <random>
#include <set>

#include "heed/kernel/kernels.h"
#include "heed/plan/beam.h"
#include "support/naive.h"

using namespace heed;
using namespace heed::test;

namespace {

struct HipOptions {
  Index budget = 32, query_block = 16, query_stride = 2, key_block = 2, key_stride = 1, window = 24, sink = 4;
  std::string representative = "centre";
  std::string call() const {
    return fmt::format(
        "hip:budget={},query_block={},query_stride={},key_block={},key_stride={},window={},sink={},representative={}",
        budget, query_block, query_stride, key_block, key_stride, window, sink, representative);
  }
};

struct HipChoice {
  std::vector<std::vector<Index>> blocks;  // [B, Hq, query blocks]: selected key blocks; {-1}: everything
  std::vector<char> undecided;             // [B, Hq, N]
};

// The sheet's steps, block by block. `near` says that a cut was decided by less than 1e-4.
std::vector<Index> search(const Case& c, const HipOptions& o, Index b, Index h, Index row, Index rows, bool& near) {
  const Index first = o.sink, end = position(c, row + rows - 1) + 1 - o.window, range = end - first;
  near = false;
  if (range <= o.budget) return {-1};
  const Index count = (range + o.key_block - 1) / o.key_block, beam = (o.budget + o.key_block - 1) / o.key_block;
  if (count <= beam) return {-1};
  std::vector<Index> sampled;
  for (Index i = o.query_stride - 1; i < rows; i += o.query_stride) sampled.push_back(row + i);
  if (sampled.empty() || sampled.back() != row + rows - 1) sampled.push_back(row + rows - 1);

  struct Node {
    Index begin, end;
    double score;
  };
  const auto score = [&](Index block) {
    double best = -INFINITY;
    for (Index t = 0; t < o.key_block; t += o.key_stride) {
      const Index j = first + block * o.key_block + t;
      if (j >= end) break;
      for (const Index i : sampled) {
        if (j > position(c, i) - o.window) continue;
        double x = 0;
        for (Index d = 0; d < c.size.D; ++d) x += c.q_at(b, h, i, d) * c.k_at(b, c.kv_head(h), j, d);
        best = std::max(best, x);
      }
    }
    return best;
  };
  std::vector<Node> nodes;
  for (Index j = 0; j < beam; ++j) nodes.push_back({count * j / beam, count * (j + 1) / beam, 0});
  for (;;) {
    bool done = true;
    std::vector<Node> children;
    for (const Node& n : nodes) {
      const Index size = n.end - n.begin, middle = n.begin + size / 2;
      done = done && size == 1;
      if (middle > n.begin) children.push_back({n.begin, middle, 0});
      children.push_back({middle, n.end, 0});
    }
    if (done) break;
    for (Node& n : children) {
      const Index size = n.end - n.begin;
      n.score = score(o.representative == "centre"  ? n.begin + size / 2
                      : o.representative == "first" ? n.begin
                                                    : n.end - 1);
    }
    std::sort(children.begin(), children.end(),
              [](const Node& x, const Node& y) { return x.score != y.score ? x.score > y.score : x.begin < y.begin; });
    const size_t keep = static_cast<size_t>(beam);
    if (children.size() > keep) {
      near = near || children[keep - 1].score - children[keep].score < 1e-4;
      children.resize(keep);
    }
    nodes = children;
  }
  std::vector<Index> found;
  for (const Node& n : nodes) found.push_back(n.begin);
  std::sort(found.begin(), found.end());
  return found;
}

Naive naive_hip(const Case& c, const HipOptions& o, HipChoice* choice_out = nullptr) {
  const auto& s = c.size;
  const Index blocks = (s.N + o.query_block - 1) / o.query_block;
  auto choice = std::make_shared<HipChoice>();
  choice->undecided.assign(static_cast<size_t>(s.B * s.Hq * s.N), 0);
  // Selected keys as flags, per query block.
  auto selected = std::make_shared<std::vector<std::vector<char>>>();
  for (Index b = 0; b < s.B; ++b)
    for (Index h = 0; h < s.Hq; ++h)
      for (Index u = 0; u < blocks; ++u) {
        const Index row = u * o.query_block, rows = std::min(o.query_block, s.N - row);
        bool near;
        choice->blocks.push_back(search(c, o, b, h, row, rows, near));
        auto& flags = selected->emplace_back(static_cast<size_t>(s.M), 0);
        const Index end = position(c, row + rows - 1) + 1 - o.window;
        for (const Index block : choice->blocks.back())
          for (Index j = 0; j < s.M; ++j)
            if (block < 0 ||
                (j >= o.sink + block * o.key_block && j < std::min(end, o.sink + (block + 1) * o.key_block)))
              flags[static_cast<size_t>(j)] = 1;
        if (near)
          for (Index t = row; t < row + rows; ++t) choice->undecided[static_cast<size_t>((b * s.Hq + h) * s.N + t)] = 1;
      }
  const Sees sees = [&c, o, blocks, selected](Index b, Index h, Index t, Index j) {
    const Index p = position(c, t);
    if (j > p) return false;
    return j < o.sink || j > p - o.window ||
           (*selected)[static_cast<size_t>((b * c.size.Hq + h) * blocks + t / o.query_block)][static_cast<size_t>(j)] !=
               0;
  };
  Naive result = naive_attention(c, sees);
  result.undecided = choice->undecided;
  if (choice_out != nullptr) *choice_out = *choice;
  return result;
}

void check_hip(const Case& c, const HipOptions& o) {
  const std::string call = o.call();
  CAPTURE(call);
  const Got got = run(call, c.input());
  const Naive want = naive_hip(c, o);
  CHECK_AGREES(got, want, c);
  Index undecided = 0;
  for (const char u : want.undecided) undecided += u;
  if (undecided == 0) CHECK(got.stats.pairs == want.pairs);
  CHECK(undecided * 4 <= static_cast<Index>(want.undecided.size()));
}

// One query over given scores: D = 1, q = 1.
Case scored_keys(const std::vector<double>& scores) {
  const Index n = static_cast<Index>(scores.size());
  Case c({1, 1, 1, 1, n + 1, 1, 1});
  c.q.set(0, 0, 0, 0, 1);
  for (Index j = 0; j < n; ++j) c.k.set(0, 0, j, 0, scores[static_cast<size_t>(j)]);
  return c;
}

// The keys that hip selects for that query.
std::vector<Index> selected(const Case& c, Index budget, Index key_block) {
  AttendInput in = c.input();
  const Plan plan = plan_of(
      MechanismCall::parse(fmt::format("hip:budget={},query_block=1,key_block={},window=1,sink=0", budget, key_block)),
      in);
  std::vector<Index> keys;
  walk(plan, [&](const RowBlock& rows, const std::vector<Tile>& tiles) {
    for (const Tile& tile : tiles)
      for (Index r = 0; r < tile.columns.count; ++r)
        if (sees(plan, rows, tile, 0, r) && tile.columns[r] < c.size.M - 1) keys.push_back(tile.columns[r]);
  });
  return keys;
}

std::vector<Index> best(const std::vector<double>& scores, size_t count) {
  std::vector<Index> order(scores.size());
  for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<Index>(i);
  std::stable_sort(order.begin(), order.end(),
                   [&](Index i, Index j) { return scores[static_cast<size_t>(i)] > scores[static_cast<size_t>(j)]; });
  order.resize(count);
  std::sort(order.begin(), order.end());
  return order;
}

double shared(const std::vector<Index>& found, const std::vector<Index>& wanted) {
  std::vector<Index> both;
  std::set_intersection(found.begin(), found.end(), wanted.begin(), wanted.end(), std::back_inserter(both));
  return static_cast<double>(both.size()) / static_cast<double>(wanted.size());
}

}  // namespace

TEST_CASE("hip equals its equations") {
  for (const std::string& isa : available_isas()) {
    const UseIsa use(isa);
    for (const DType arithmetic : {DType::f32, DType::bf16}) {
      for (const Index n : {1, 15, 63, 64, 65, 230})
        check_hip(Case({1, 4, 1, n, n, 33, 16}, DType::f32, arithmetic), {});
      check_hip(Case({2, 2, 1, 259, 259, 64, 40}, DType::f32, arithmetic), {.budget = 50, .query_stride = 3});
      check_hip(Case({1, 2, 2, 70, 411, 16, 16}, DType::f16, arithmetic), {.budget = 33, .key_block = 4});
      check_hip(Case({1, 8, 2, 1, 411, 80, 16}, DType::f32, arithmetic), {.budget = 40, .key_block = 3, .sink = 0});
      check_hip(Case({1, 1, 1, 150, 700, 128, 24}, DType::bf16, arithmetic),
                {.budget = 64, .query_stride = 1, .key_block = 1});
    }
  }
}

TEST_CASE("hip: representatives, strides and ragged ends") {
  for (const std::string representative : {"centre", "first", "last"})
    for (const Index key_block : {1, 2, 5})
      for (const Index key_stride : {1, 2}) {
        const HipOptions o{.budget = 41,
                           .query_block = 20,
                           .query_stride = 7,
                           .key_block = key_block,
                           .key_stride = key_stride,
                           .window = 20,
                           .sink = 3,
                           .representative = representative};
        check_hip(Case({1, 2, 1, 303, 333, 24, 16}, DType::f32, DType::f32, Layout::scattered), o);
      }
  check_hip(Case({1, 2, 1, 300, 300, 16, 16}), {.query_stride = 99});             // only the last row
  check_hip(Case({1, 1, 1, 700, 700, 16, 16}),
            {.budget = 128, .query_block = 130, .query_stride = 1, .window = 131});  // many sampled
  check_hip(Case({1, 1, 1, 400, 400, 16, 16}), {.budget = 256, .key_block = 200, .sink = 0});
  // Defaults, over lengths at which little and much is searched.
  check_hip(Case({1, 1, 1, 100, 2000, 64, 16}),
            {.budget = 512, .query_block = 64, .query_stride = 2, .key_block = 2, .window = 256, .sink = 16});
}

TEST_CASE("hip with a budget of all keys is dense") {
  const Case c({1, 4, 2, 300, 333, 32, 32});
  const Naive dense = naive_attention(c, dense_sees(c, true));
  for (const Index budget : {333, 5000, 256}) {  // 333 - 64 - 16 = 253 are searched
    const Got got = run(fmt::format("hip:budget={},window=64", budget), c.input());
    const std::string differs = difference(got, dense, c, 1e-5);
    CHECK_MESSAGE(differs.empty(), differs);
    CHECK(got.stats.pairs == dense.pairs);
  }
}

TEST_CASE("hip over at most twice the budget finds the exact best keys") {
  std::mt19937_64 random(5);
  std::normal_distribution<double> normal;
  for (const Index n : {65, 100, 127, 128}) {
    std::vector<double> scores;
    for (Index j = 0; j < n; ++j) scores.push_back(static_cast<float>(normal(random)));
    CHECK(selected(scored_keys(scores), 64, 1) == best(scores, 64));
  }
}

TEST_CASE("the beam ends with the right number of distinct blocks and scores no more than it may") {
  for (const Representative representative : {Representative::centre, Representative::first, Representative::last})
    for (const Index blocks : {1, 2, 7, 64, 65, 100, 1023, 1024, 1025})
      for (const Index beam : {1, 3, 16, 64}) {
        CAPTURE(blocks);
        CAPTURE(beam);
        Index scored = 0;
        std::mt19937_64 random(7);
        std::vector<float> value;
        for (Index i = 0; i < blocks; ++i) value.push_back(static_cast<float>(random() % 50));  // many ties
        Scratch scratch;
        const auto found =
            beam_search(blocks, beam, representative, scratch, [&](std::span<const std::int32_t> some, float* scores) {
              for (size_t i = 0; i < some.size(); ++i) {
                REQUIRE((some[i] >= 0 && some[i] < blocks));
                scores[i] = value[static_cast<size_t>(some[i])];
              }
              scored += static_cast<Index>(some.size());
            });
        CHECK(static_cast<Index>(found.size()) == std::min(beam, blocks));
        CHECK(std::is_sorted(found.begin(), found.end()));
        CHECK(std::set<std::int32_t>(found.begin(), found.end()).size() == found.size());
        CHECK(found.front() >= 0);
        CHECK(found.back() < blocks);
        const double rounds =
            std::ceil(std::log2(std::max(1.0, static_cast<double>(blocks) / static_cast<double>(beam))));
        CHECK(scored <= 2 * beam * static_cast<Index>(rounds));
      }
}

TEST_CASE("hip finds most of the best keys where neighbours score alike") {
  // Autoregressive scores, four queries each. The sheet's own simulation: 0.91 at rho = 0.97, 0.83 at 0.9.
  std::mt19937_64 random(11);
  std::normal_distribution<double> normal;
  for (const auto& [rho, least] : {std::pair{0.97, 0.85}, std::pair{0.9, 0.75}}) {
    double recall = 0;
    for (int trial = 0; trial < 4; ++trial) {
      std::vector<double> scores;
      double x = normal(random);
      for (Index j = 0; j < 4096; ++j) {
        scores.push_back(static_cast<float>(3 * x));
        x = rho * x + std::sqrt(1 - rho * rho) * normal(random);
      }
      recall += shared(selected(scored_keys(scores), 512, 2), best(scores, 512)) / 4;
    }
    CAPTURE(rho);
    CHECK(recall >= least);
    CHECK(recall < 1);
  }
}

TEST_CASE("hip's documented weakness: an isolated key is often missed, a wide one is not") {
  std::mt19937_64 random(13);
  std::normal_distribution<double> normal;
  constexpr int trials = 200;
  for (const Index width : {1, 32}) {
    int hits = 0;
    for (int trial = 0; trial < trials; ++trial) {
      std::vector<double> scores;
      for (Index j = 0; j < 4096; ++j) scores.push_back(normal(random));
      const Index needle = static_cast<Index>(random() % static_cast<std::uint64_t>(4096 - width));
      for (Index j = needle; j < needle + width; ++j) scores[static_cast<size_t>(j)] += 20;
      const std::vector<Index> found = selected(scored_keys(scores), 512, 2);
      hits +=
          std::any_of(found.begin(), found.end(), [&](Index j) { return j >= needle && j < needle + width; }) ? 1 : 0;
    }
    const double rate = static_cast<double>(hits) / trials;
    CAPTURE(width);
    CAPTURE(rate);
    if (width == 1) CHECK((rate > 0.3 && rate < 0.6));
    if (width == 32) CHECK(rate > 0.9);
  }
}

TEST_CASE("hip counts no key twice") {
  const Case c({1, 2, 1, 200, 260, 16, 16});
  const AttendInput in = c.input();
  const Plan plan = plan_of(MechanismCall::parse(HipOptions{.window = 17}.call()), in);
  Index pairs = 0, twice = 0;
  walk(plan, [&](const RowBlock& rows, const std::vector<Tile>& tiles) {
    for (Index i = 0; i < rows.rows; ++i) {
      std::vector<int> seen(260, 0);
      for (const Tile& tile : tiles)
        for (Index r = 0; r < tile.columns.count; ++r)
          seen[static_cast<size_t>(tile.columns[r])] += sees(plan, rows, tile, i, r) ? 1 : 0;
      for (const int s : seen) pairs += s, twice += s > 1 ? 1 : 0;
    }
  });
  CHECK(twice == 0);
  CHECK(pairs == run(plan).stats.pairs);
}

TEST_CASE("hip: later blocks of queries change nothing, nor do later keys of other blocks") {
  const HipOptions o;
  const Case c({1, 2, 1, 280, 300, 16, 16});
  const Got before = run(o.call(), c.input());
  for (const Index block : {0, 3, 9, 14}) {
    const Index end = (block + 1) * o.query_block;  // first row of the next block
    Case changed = c;
    for (Index h = 0; h < 2; ++h)
      for (Index t = end; t < 280; ++t) changed.q.set(0, h, t, 2, -7);
    for (Index j = position(c, end); j < 300; ++j)
      for (Index d = 0; d < 16; ++d) changed.k.set(0, 0, j, d, 20), changed.v.set(0, 0, j, d, 500);
    const Got after = run(o.call(), changed.input());
    Index differing = 0;
    for (Index h = 0; h < 2; ++h)
      for (Index t = 0; t < end; ++t) {
        const size_t row = static_cast<size_t>(h * 280 + t);
        differing +=
            std::memcmp(&before.o[row * 16], &after.o[row * 16], 64) != 0 || before.lse[row] != after.lse[row] ? 1 : 0;
      }
    CHECK(differing == 0);
  }
  // Values never steer the search, so with them the rows of one block are causal as well.
  for (const Index t : {3, 50, 130, 270}) {
    Case changed = c;
    for (Index j = position(c, t) + 1; j < 300; ++j)
      for (Index d = 0; d < 16; ++d) changed.v.set(0, 0, j, d, 500);
    const Got after = run(o.call(), changed.input());
    for (Index h = 0; h < 2; ++h)
      CHECK(std::memcmp(&before.o[static_cast<size_t>(h * 280 * 16)], &after.o[static_cast<size_t>(h * 280 * 16)],
                        static_cast<size_t>(t + 1) * 64) == 0);
  }
}

TEST_CASE("hip in pieces of whole query blocks gives what it gives at once") {
  const HipOptions o;
  const Case c({1, 2, 1, 400, 400, 16, 16});
  const Got whole = run(o.call(), c.input());
  for (const Index begin : {0, 16, 160, 320}) {
    const Index end = std::min<Index>(400, begin + 160);
    AttendInput in = c.input();
    in.q = {static_cast<const float*>(in.q.data) + begin * in.q.stride[2],
            DType::f32,
            {1, 2, end - begin, 16},
            in.q.stride};
    in.k.shape[2] = in.v.shape[2] = end;
    const Got piece = run(o.call(), in);
    double worst = 0;
    for (Index h = 0; h < 2; ++h)
      for (Index i = 0; i < (end - begin) * 16; ++i)
        worst =
            std::max(worst, static_cast<double>(std::fabs(piece.o[static_cast<size_t>(h * (end - begin) * 16 + i)] -
                                                          whole.o[static_cast<size_t>((h * 400 + begin) * 16 + i)])));
    CHECK(worst < 1e-5);
  }
}

TEST_CASE("hip: the same bits for any number of threads") {
  for (const std::string& isa : available_isas()) {
    const UseIsa use(isa);
    for (const Sizes& s :
         {Sizes{2, 4, 2, 600, 600, 16, 16}, Sizes{1, 4, 1, 1, 5000, 32, 32}, Sizes{1, 2, 1, 40, 4000, 16, 16}}) {
      const Case c(s);
      Got first;
      for (const int n : {1, 2, 3}) {
        const UseThreads threads(n);
        const Got got = run("hip:budget=128,window=64", c.input());
        if (n == 1) first = got;
        CHECK(same_bits(got.o, first.o));
        CHECK(same_bits(got.lse, first.lse));
      }
    }
  }
}

TEST_CASE("hip refuses what it cannot mean") {
  const Case c({1, 1, 1, 8, 8, 16, 16});
  CHECK_FAILS(run("hip:budget=0", c.input()), UsageError, "hip: budget = 0, expected >= 1");
  CHECK_FAILS(run("hip:budget=4,key_block=5", c.input()), UsageError,
              "hip: key_block = 5, expected at most budget = 4");
  CHECK_FAILS(run("hip:window=63", c.input()), UsageError, "hip: window = 63, expected at least query_block = 64");
  CHECK_FAILS(run("hip:sink=-1", c.input()), UsageError, "hip: sink = -1, expected >= 0");
  CHECK_FAILS(run("hip:representative=random", c.input()), UsageError,
              "hip: representative = random, expected one of centre, first, last");
  CHECK_FAILS(run("hip", Case({1, 3, 2, 8, 8, 16, 16}).input()), Error,
              "q: 3 heads, expected a multiple of the 2 heads of k");
}
