// vmoba against its definition: boxes of a video's grid, one ranking of all pairs of a query and a box.
#include <doctest/doctest.h>

#include <cmath>
#include <random>

#include "heed/base/scratch.h"
#include "heed/kernel/kernels.h"
#include "support/grids.h"
#include "support/ranking.h"

using namespace heed;
using namespace heed::test;

namespace {

struct Video {
  std::vector<Index> grid, chunk;  // 1, 2 or 3 chunk lengths: the mode
  double mass;
  std::string call() const {
    return fmt::format("vmoba:mode={}d,grid={},chunk={},mass={}", chunk.size(), fmt::join(grid, "x"),
                       fmt::join(chunk, "x"), mass);
  }
};

/// The block of each token, in the order of the blocks.
std::vector<Index> blocks_of(const Video& v) {
  std::vector<Index> number;
  for (Index t = 0; t < v.grid[0] * v.grid[1] * v.grid[2]; ++t) {
    const std::vector<Index> x = coordinates(v.grid, t);
    if (v.chunk.size() == 1) {
      number.push_back(t / v.chunk[0]);
    } else if (v.chunk.size() == 2) {
      number.push_back(x[1] / v.chunk[0] * (v.grid[2] / v.chunk[1]) + x[2] / v.chunk[1]);
    } else {
      const Index place = x[0] / v.chunk[0] * (v.grid[1] / v.chunk[1]) + x[1] / v.chunk[1];
      number.push_back(place * (v.grid[2] / v.chunk[2]) + x[2] / v.chunk[2]);
    }
  }
  return number;
}

struct Ranking {
  std::vector<std::vector<char>> in;  // [B · Hq · N][blocks]
  std::vector<char> undecided;        // [B · Hq · N]
};

// Steps 2 to 4 with everything kept and sorted. Scores nearer than `margin` to the last pair that is in are undecided.
Ranking rank(const Case& c, const Video& v, double margin) {
  const auto& s = c.size;
  const std::vector<Index> number = blocks_of(v);
  const Index count = *std::max_element(number.begin(), number.end()) + 1;
  Ranking result;
  for (Index b = 0; b < s.B; ++b)
    for (Index h = 0; h < s.Hq; ++h) {
      std::vector<std::vector<double>> mean(static_cast<size_t>(count), std::vector<double>(static_cast<size_t>(s.D)));
      std::vector<double> tokens(static_cast<size_t>(count));
      for (Index j = 0; j < s.M; ++j) {
        const size_t block = static_cast<size_t>(number[static_cast<size_t>(j)]);
        ++tokens[block];
        for (Index d = 0; d < s.D; ++d) mean[block][static_cast<size_t>(d)] += c.k_at(b, c.kv_head(h), j, d);
      }
      std::vector<Pair> ranked;
      double least = INFINITY, most = -INFINITY, own_sum = 0, sum = 0;
      for (Index t = 0; t < s.N; ++t)
        for (Index block = 0; block < count; ++block) {
          double score = 0;
          for (Index d = 0; d < s.D; ++d)
            score += c.q_at(b, h, t, d) * mean[static_cast<size_t>(block)][static_cast<size_t>(d)] /
                     tokens[static_cast<size_t>(block)];
          least = std::min(least, score), most = std::max(most, score);
          sum += score;
          if (number[static_cast<size_t>(t)] == block) own_sum += score;
          else ranked.push_back({score, block, t});
        }
      sum -= least * static_cast<double>(s.N * count), own_sum -= least * static_cast<double>(s.N);
      sort_pairs(ranked);
      const size_t end = prefix(ranked, least, most, own_sum, sum, v.mass);
      const size_t first = result.in.size();
      for (Index t = 0; t < s.N; ++t) {
        result.in.emplace_back(static_cast<size_t>(count), 0)[static_cast<size_t>(number[static_cast<size_t>(t)])] = 1;
        result.undecided.push_back(0);
      }
      for (size_t i = 0; i < ranked.size(); ++i) {
        const size_t row = first + static_cast<size_t>(ranked[i].token);
        if (i < end) result.in[row][static_cast<size_t>(ranked[i].block)] = 1;
        if (v.mass < 1 && end > 0 && end < ranked.size() && std::fabs(ranked[i].score - ranked[end - 1].score) < margin)
          result.undecided[row] = 1;
      }
      // The first pair that is out, as sums may be rounded otherwise.
      if (end > 0 && end < ranked.size() && margin > 0)
        result.undecided[first + static_cast<size_t>(ranked[end].token)] = 1;
    }
  return result;
}

Naive naive_vmoba(const Case& c, const Video& v, double margin = 1e-4) {
  Ranking ranking = rank(c, v, margin);
  const std::vector<Index> number = blocks_of(v);
  Naive want = naive_attention(c, [&](Index b, Index h, Index t, Index j) {
    return ranking.in[static_cast<size_t>((b * c.size.Hq + h) * c.size.N + t)]
                     [static_cast<size_t>(number[static_cast<size_t>(j)])] != 0;
  });
  want.undecided = std::move(ranking.undecided);
  return want;
}

/// On every instruction set.
void check_vmoba(const Case& c, const Video& v, double margin = 1e-4) {
  const std::string call = v.call();
  CAPTURE(call);
  const Naive want = naive_vmoba(c, v, margin);
  Index undecided = 0;
  for (const char u : want.undecided) undecided += u;
  CHECK(undecided * 5 <= static_cast<Index>(want.undecided.size()) + 10);  // most rows must be judged
  for (const std::string& isa : available_isas()) {
    const UseIsa use(isa);
    const Got got = run(call, c.input());
    CHECK_AGREES(got, want, c);
    if (margin == 0) CHECK(got.stats.pairs == want.pairs);
  }
}

Sizes sizes(Index heads, Index kv_heads, Index n, Index d = 16, Index dv = 16) {
  return {1, heads, kv_heads, n, n, d, dv};
}

/// Every row's blocks, from the plan's tiles: [row][block].
std::vector<std::vector<char>> chosen(const Case& c, const Video& v) {
  const std::vector<Index> number = blocks_of(v);
  const Index count = *std::max_element(number.begin(), number.end()) + 1;
  std::vector<Index> begins(static_cast<size_t>(count), 0);
  for (const Index block : number)
    for (Index later = block + 1; later < count; ++later) ++begins[static_cast<size_t>(later)];
  std::vector<std::vector<char>> in(static_cast<size_t>(c.size.B * c.size.Hq * c.size.N),
                                    std::vector<char>(static_cast<size_t>(count), 0));
  walk(plan_of(MechanismCall::parse(v.call()), c.input()), [&](const RowBlock& rows, const std::vector<Tile>& tiles) {
    for (const Tile& tile : tiles) {
      const auto block =
          static_cast<size_t>(std::find(begins.begin(), begins.end(), tile.columns.first) - begins.begin());
      REQUIRE(block < begins.size());
      CHECK(tile.columns.count == std::count(number.begin(), number.end(), static_cast<Index>(block)));
      for (Index i = 0; i < tile.rows.count; ++i) {
        char& entry =
            in[static_cast<size_t>((rows.b * c.size.Hq + rows.head) * c.size.N + rows.token(tile.rows[i]))][block];
        CHECK(entry == 0);  // a pair stands in one tile
        entry = 1;
      }
    }
  });
  return in;
}

}  // namespace

TEST_CASE("vmoba equals its definition in every mode") {
  for (const DType arithmetic : {DType::f32, DType::bf16})
    for (const double mass : {0.0, 0.15, 0.25, 0.5, 0.9}) {
      check_vmoba(Case(sizes(2, 1, 7 * 31, 33, 16), DType::f32, arithmetic), {{7, 1, 31}, {40}, mass});
      check_vmoba(Case(sizes(4, 4, 4 * 6 * 8, 32, 24), DType::f32, arithmetic), {{4, 6, 8}, {3, 2}, mass});
      check_vmoba(Case(sizes(4, 1, 4 * 6 * 9, 64, 16), DType::f16, arithmetic), {{4, 6, 9}, {2, 3, 3}, mass});
      check_vmoba(Case({2, 2, 2, 5 * 4 * 7, 5 * 4 * 7, 17, 40}, DType::bf16, arithmetic, Layout::tokens),
                  {{5, 4, 7}, {5, 2, 7}, mass});
    }
  check_vmoba(Case(sizes(8, 1, 6 * 10 * 20, 16, 8)), {{6, 10, 20}, {5, 5}, 0.3});  // several row blocks
  check_vmoba(Case(sizes(1, 1, 8 * 12 * 12, 256, 16)), {{8, 12, 12}, {2, 4, 4}, 0.2});
  check_vmoba(Case(sizes(2, 1, 300, 16, 8), DType::f32, DType::f32, Layout::reversed), {{3, 10, 10}, {1}, 0.3});
  check_vmoba(Case(sizes(2, 2, 1)), {{1, 1, 1}, {1}, 0.25});
  check_vmoba(Case(sizes(2, 2, 60)), {{3, 4, 5}, {1000}, 0.25});  // one block
}

TEST_CASE("vmoba: equal scores go to the lower block, then to the lower token") {
  // Queries of small integers and keys that repeat: many pairs of exactly equal scores.
  std::mt19937_64 random(3);
  for (const Video& layout : {Video{{4, 6, 8}, {24}, 0}, Video{{4, 6, 8}, {3, 2}, 0}, Video{{4, 6, 8}, {2, 3, 4}, 0}}) {
    const std::vector<Index> number = blocks_of(layout);
    Case c(sizes(2, 1, 192, 16, 8));
    for (Index t = 0; t < 192; ++t)
      for (Index d = 0; d < 16; ++d) {
        for (Index h = 0; h < 2; ++h) c.q.set(0, h, t, d, d == 0 ? static_cast<double>(random() % 3) : 0);
        c.k.set(0, 0, t, d, d == 0 ? static_cast<double>(number[static_cast<size_t>(t)] % 4 - 1) : 0);
      }
    for (const double mass : {0.0, 0.1, 0.3, 0.5, 0.7, 0.95}) {
      Video v = layout;
      v.mass = mass;
      check_vmoba(c, v, 0);
    }
    for (Index t = 0; t < 192; ++t) c.k.set(0, 0, t, 0, 0);  // all scores zero: one pair, or all
    for (const double mass : {0.0, 0.25}) {
      Video v = layout;
      v.mass = mass;
      check_vmoba(c, v, 0);
    }
  }
}

TEST_CASE("vmoba with all of the mass is dense in every mode, and a layout alone changes nothing") {
  const Case c(sizes(4, 2, 4 * 6 * 8, 32, 24));
  const Naive dense = naive_attention(c, dense_sees(c, false));
  for (const Video& v : {Video{{4, 6, 8}, {50}, 1}, Video{{4, 6, 8}, {3, 4}, 1}, Video{{4, 6, 8}, {2, 2, 4}, 1}}) {
    const std::string differs = difference(run(v.call(), c.input()), dense, c, 1e-5);
    CHECK_MESSAGE(differs.empty(), differs);
  }
}

TEST_CASE("vmoba: the own block always, more pairs for more mass, the same pairs for longer queries") {
  const Case c(sizes(2, 1, 4 * 6 * 8, 32, 16));
  Case longer = c;
  for (Index h = 0; h < 2; ++h)
    for (Index t = 0; t < c.size.N; ++t)
      for (Index d = 0; d < 32; ++d) longer.q.set(0, h, t, d, c.q.get(0, h, t, d) * (h == 0 ? 8 : 1));
  for (const std::vector<Index>& chunk :
       {std::vector<Index>{48}, std::vector<Index>{3, 2}, std::vector<Index>{2, 3, 4}}) {
    std::vector<std::vector<char>> before;
    Index pairs_before = 0;
    for (const double mass : {0.0, 0.15, 0.25, 0.5, 0.8, 1.0}) {
      const Video v{{4, 6, 8}, chunk, mass};
      const std::vector<Index> number = blocks_of(v);
      const auto now = chosen(c, v);
      CHECK(now == chosen(longer, v));
      Index pairs = 0;
      for (size_t row = 0; row < now.size(); ++row) {
        CHECK(now[row][static_cast<size_t>(number[row % number.size()])] == 1);
        for (size_t block = 0; block < now[row].size(); ++block) {
          pairs += now[row][block];
          if (!before.empty()) CHECK(now[row][block] >= before[row][block]);
        }
      }
      CHECK((mass < 0.3 ? pairs >= pairs_before : pairs > pairs_before));  // own pairs alone may hold a quarter
      pairs_before = pairs, before = now;
    }
  }
}

TEST_CASE("vmoba keeps a little less of the pairs than of the mass, and covers more of the softmax in boxes") {
  // A synthetic video: keys of four cosines in space and time each, of at most one period along an axis; queries that
  // look for what is like them, of very different norms. Blocks of 128 tokens each way, density 0.13. The order 1d <
  // 2d < 3d belongs to such smooth videos: with two or more periods along an axis, 1d (half a frame) covers as much as
  // the others or more.
  const std::vector<Index> grid{8, 16, 16};
  Case c(sizes(1, 1, 2048, 32, 32));
  std::mt19937_64 random(29);
  std::normal_distribution<double> normal;
  const auto uniform = [&] { return static_cast<double>(random() >> 11) * 0x1p-53; };
  for (Sample* x : {&c.k, &c.v})
    for (Index d = 0; d < 32; ++d) {
      double phase[4];
      std::vector<double> wave[4];
      for (size_t i = 0; i < 4; ++i) {
        phase[i] = 2 * 3.14159265 * uniform();
        for (int a = 0; a < 3; ++a) wave[i].push_back(static_cast<double>(random() % 2));
      }
      for (Index t = 0; t < 2048; ++t) {
        const std::vector<Index> at = coordinates(grid, t);
        double sum = 0;
        for (size_t i = 0; i < 4; ++i) {
          double angle = phase[i];
          for (size_t a = 0; a < 3; ++a)
            angle += 2 * 3.14159265 * wave[i][a] * static_cast<double>(at[a]) / static_cast<double>(grid[a]);
          sum += std::cos(angle);
        }
        x->set(0, 0, t, d, sum);
      }
    }
  for (Index t = 0; t < 2048; ++t) {
    const double norm = 2 * std::exp(0.8 * normal(random));
    for (Index d = 0; d < 32; ++d) c.q.set(0, 0, t, d, norm * (0.8 * c.k.get(0, 0, t, d) + 0.6 * normal(random)));
  }
  const Naive dense = naive_attention(c, dense_sees(c, false));
  const double all = 2048.0 * 2048.0;
  double before = 0;
  for (const std::vector<Index>& chunk :
       {std::vector<Index>{128}, std::vector<Index>{4, 4}, std::vector<Index>{2, 8, 8}}) {
    const Got quarter = run(Video{grid, chunk, 0.25}.call(), c.input());
    const double share = static_cast<double>(quarter.stats.pairs) / all;
    INFO(chunk.size(), "d: density ", share, " at mass 0.25");
    CHECK(share < 0.25);
    CHECK(share > 0.15);
    // The mass at which the density is 0.13.
    double low = 0, high = 0.25;
    Got got;
    for (int step = 0; step < 12; ++step) {
      const double middle = (low + high) / 2;
      got = run(Video{grid, chunk, middle}.call(), c.input());
      (static_cast<double>(got.stats.pairs) / all < 0.13 ? low : high) = middle;
    }
    double covered = 0;  // exp(lse) is what a row's softmax holds
    for (size_t row = 0; row < 2048; ++row) covered += std::exp(got.lse[row] - dense.lse[row]) / 2048;
    INFO(chunk.size(), "d: covers ", covered, " at density ", static_cast<double>(got.stats.pairs) / all);
    CHECK(std::fabs(static_cast<double>(got.stats.pairs) / all - 0.13) < 3e-3);
    CHECK(covered > before);
    before = covered;
  }
}

TEST_CASE("vmoba's tiles: one for each row block and block that is wanted, and no scores kept") {
  const Case c(sizes(1, 1, 4096, 16, 16));
  const UseThreads one(1);
  const Plan plan = plan_of(MechanismCall::parse("vmoba:mode=3d,grid=16x16x16,chunk=2x2x2,mass=0.1"), c.input());
  Index tiles_planned = 0;
  walk(plan,
       [&](const RowBlock&, const std::vector<Tile>& tiles) { tiles_planned += static_cast<Index>(tiles.size()); });
  CHECK(tiles_planned > 4 * 256);
  reset_scratch_peak();
  const Got got = run(plan);
  CHECK(got.stats.tiles_planned == tiles_planned);
  CHECK(got.stats.tiles_visited == tiles_planned);
  CHECK(got.stats.scratch_bytes < 4096 * 512 * 4 / 4);  // 512 blocks
}

TEST_CASE("vmoba: the same bits for any number of threads") {
  for (const std::string call : {"vmoba:mode=1d,chunk=70", "vmoba:mode=2d,grid=6x10x20,chunk=5x4"}) {
    const Case c({2, 4, 2, 1200, 1200, 16, 16});
    Got first;
    for (const int threads : {1, 2, 3}) {
      const UseThreads use(threads);
      const Got got = run(call, c.input());
      if (threads == 1) first = got;
      CHECK(same_bits(got.o, first.o));
      CHECK(same_bits(got.lse, first.lse));
    }
  }
}

TEST_CASE("vmoba refuses what it cannot mean") {
  const Case c(sizes(1, 1, 4 * 6 * 8));
  const auto refuses = [&](const std::string& params, const std::string& line) {
    CHECK_FAILS(run("vmoba:" + params, c.input()), UsageError, "vmoba: " + line);
  };
  refuses("mode=2d,grid=4x6x8,chunk=4x2", "chunk = 4x2, expected lengths that divide those of grid = 4x6x8");
  refuses("mode=3d,grid=4x6x8,chunk=3x2x2", "chunk = 3x2x2, expected lengths that divide those of grid = 4x6x8");
  refuses("mode=3d,grid=4x6x8,chunk=2x3", "chunk = 2x3, expected TxHxW or one number for all with mode = 3d");
  refuses("mode=2d,grid=4x6x8,chunk=2x2x2", "chunk = 2x2x2, expected HxW or one number for all with mode = 2d");
  refuses("mode=1d,chunk=4x4", "chunk = 4x4, expected one number of tokens with mode = 1d");
  refuses("mode=2d,chunk=2x2", "grid is missing, expected TxHxW with mode = 2d");
  refuses("mode=2d,grid=24x8,chunk=2x2", "grid = 24x8, expected TxHxW with mode = 2d");
  refuses("mode=2d,grid=4x6x7,chunk=2x2", "grid = 4x6x7, expected lengths whose product is N = 192");
  refuses("chunk=64,grid=4x6x7", "grid = 4x6x7, expected lengths whose product is N = 192");
  refuses("chunk=64,mass=1.5", "mass = 1.5, expected 0 … 1");
  refuses("chunk=64,mass=-0.1", "mass = -0.1, expected 0 … 1");
  refuses("chunk=0", "chunk = 0, expected values >= 1");
  refuses("mode=4d,chunk=8", "mode = 4d, expected one of 1d, 2d, 3d");
  refuses("mode=1d", "chunk is missing, expected a block: tokens (1d), HxW of all frames (2d), or TxHxW (3d)");
  CHECK_FAILS(run("vmoba:chunk=8", c.input(true)), UsageError,
              "vmoba: causal = true, expected false: it is not causal by definition");
  const Case uneven({1, 1, 1, 8, 16, 16, 16});
  CHECK_FAILS(run("vmoba:chunk=8", uneven.input()), Error,
              "vmoba: 8 queries and 16 keys, expected as many of one as of the other");
}
