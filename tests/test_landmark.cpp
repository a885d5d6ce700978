// landmark against its equations: one softmax over own tokens and earlier landmarks, one inside each block.
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <random>

#include "heed/kernel/kernels.h"
#include "support/naive.h"

using namespace heed;
using namespace heed::test;

namespace {

using Marks = std::vector<std::uint8_t>;  // [M], 1: a landmark

Marks every(Index M, Index block) {
  Marks marks(static_cast<size_t>(M));
  for (Index j = block; j < M; j += block + 1) marks[static_cast<size_t>(j)] = 1;
  return marks;
}

/// Blocks of least … most tokens.
Marks at_random(Index M, Index least, Index most, std::uint64_t seed) {
  std::mt19937_64 random(seed);
  Marks marks(static_cast<size_t>(M));
  for (Index j = 0; j < M; ++j) {
    j += least + static_cast<Index>(random() % static_cast<std::uint64_t>(most - least + 1));
    if (j < M) marks[static_cast<size_t>(j)] = 1;
  }
  return marks;
}

/// top_k = 0: all earlier blocks.
Naive naive_landmark(const Case& c, const Marks& marks, Index top_k = 0) {
  const auto& s = c.size;
  const double scale = 1 / std::sqrt(static_cast<double>(s.D));
  Naive result;
  for (Index b = 0; b < s.B; ++b)
    for (Index h = 0; h < s.Hq; ++h) {
      const Index g = c.kv_head(h);
      std::vector<double> keys(static_cast<size_t>(s.M * s.D)), values(static_cast<size_t>(s.M * s.Dv));
      std::vector<double> query(static_cast<size_t>(s.D));
      for (Index j = 0; j < s.M; ++j) {
        for (Index d = 0; d < s.D; ++d) keys[static_cast<size_t>(j * s.D + d)] = c.k_at(b, g, j, d);
        for (Index e = 0; e < s.Dv; ++e) values[static_cast<size_t>(j * s.Dv + e)] = c.v_at(b, g, j, e);
      }
      for (Index t = 0; t < s.N; ++t) {
        const Index p = position(c, t);
        for (Index d = 0; d < s.D; ++d) query[static_cast<size_t>(d)] = c.q_at(b, h, t, d);
        const auto score = [&](Index j) {
          return scale * std::inner_product(query.begin(), query.end(), keys.begin() + j * s.D, 0.0);
        };
        Index own = p;  // first token of the query's block
        while (own > 0 && marks[static_cast<size_t>(own - 1)] == 0) --own;
        std::vector<std::pair<double, Index>> blocks;  // landmark score, landmark
        for (Index j = 0; j < own; ++j)
          if (marks[static_cast<size_t>(j)] != 0) blocks.emplace_back(score(j), j);
        char undecided = 0;
        if (top_k > 0 && static_cast<Index>(blocks.size()) > top_k) {
          const auto k = static_cast<size_t>(top_k);
          std::stable_sort(blocks.begin(), blocks.end(),
                           [](const auto& x, const auto& y) { return x.first > y.first; });
          undecided = blocks[k - 1].first - blocks[k].first < 1e-4 ? 1 : 0;
          blocks.resize(k);
        }
        // The weight of every token, relative to exp(0); landmarks' values are never used.
        std::vector<std::pair<Index, double>> weights;
        double sum = 0;
        for (Index j = own; j <= p; ++j)
          if (marks[static_cast<size_t>(j)] == 0) weights.emplace_back(j, std::exp(score(j)));
        for (const auto& [j, w] : weights) sum += w;
        for (const auto& [z, landmark] : blocks) {
          sum += std::exp(z);
          double inside = 0;
          const size_t first = weights.size();
          for (Index j = landmark - 1; j >= 0 && marks[static_cast<size_t>(j)] == 0; --j) {
            weights.emplace_back(j, std::exp(score(j)));
            inside += weights.back().second;
          }
          for (size_t i = first; i < weights.size(); ++i) weights[i].second *= std::exp(z) / inside;
        }
        std::vector<double> o(static_cast<size_t>(s.Dv));
        for (const auto& [j, w] : weights)
          for (Index e = 0; e < s.Dv; ++e)
            o[static_cast<size_t>(e)] += w / sum * values[static_cast<size_t>(j * s.Dv + e)];
        result.o.insert(result.o.end(), o.begin(), o.end());
        result.lse.push_back(std::log(sum));
        result.undecided.push_back(undecided);
        result.pairs += static_cast<Index>(weights.size());
      }
    }
  return result;
}

AttendInput with(const Case& c, const Marks& marks) {
  AttendInput in = c.input();
  in.extra["is_landmark"] = {marks.data(), DType::u8, {c.size.M}};
  return in;
}

/// On every instruction set.
void check_landmark(const Case& c, const std::string& call, const AttendInput& in, const Naive& want) {
  CAPTURE(call);
  const auto undecided = std::count(want.undecided.begin(), want.undecided.end(), 1);
  CHECK(undecided * 5 <= static_cast<Index>(want.undecided.size()));  // most rows must be judged
  for (const std::string& isa : available_isas()) {
    const UseIsa use(isa);
    const Got got = run(call, in);
    CHECK_AGREES(got, want, c);
    CHECK(got.stats.pairs == want.pairs);
  }
}

void check_block(const Case& c, Index block) {
  check_landmark(c, fmt::format("landmark:block={}", block), c.input(), naive_landmark(c, every(c.size.M, block)));
}

}  // namespace

TEST_CASE("landmark equals its equations") {
  for (const DType arithmetic : {DType::f32, DType::bf16}) {
    for (const Index n : {1, 2, 50, 51, 52, 200})
      check_block(Case({1, 2, 2, n, n, 33, 16}, DType::f32, arithmetic), 50);
    for (const Index block : {1, 7, 63, 100, 192}) {
      check_block(Case({1, 4, 1, 300, 300, 16, 24}, DType::f32, arithmetic), block);
      check_block(Case({2, 2, 1, 70, 411, 64, 40}, DType::f16, arithmetic, Layout::scattered), block);
      check_block(Case({1, 8, 1, 1, 411, 80, 16}, DType::bf16, arithmetic), block);
    }
  }
  check_block(Case({1, 1, 1, 60, 260, 256, 8}, DType::f32, DType::f32, Layout::reversed), 15);
}

TEST_CASE("landmark over several row blocks and splits") {
  check_block(Case({1, 2, 1, 1100, 1100, 16, 16}), 50);
  check_block(Case({1, 2, 2, 300, 2300, 16, 8}, DType::f32, DType::f32, Layout::tokens), 50);
  check_block(Case({1, 4, 2, 5, 5000, 16, 8}), 31);  // decode, cut along the columns
}

TEST_CASE("landmark with landmarks anywhere") {
  std::uint64_t seed = 1;
  for (const auto& [least, most] : {std::pair<Index, Index>{1, 3}, {1, 90}, {40, 60}, {150, 192}})
    for (const DType arithmetic : {DType::f32, DType::bf16}) {
      const Case c({1, 2, 1, 500, 640, 32, 16}, DType::f32, arithmetic, Layout::packed, ++seed);
      const Marks marks = at_random(c.size.M, least, most, seed);
      check_landmark(c, "landmark", with(c, marks), naive_landmark(c, marks));
    }
}

TEST_CASE("landmark: large scores neither overflow nor vanish") {
  const Case c({1, 1, 1, 300, 300, 64, 16}, DType::f32, DType::f32, Layout::packed, 3, 6.0);
  // f64 scores reach some 300, so weights span 10^130 either way, which only the reference's doubles hold.
  check_block(c, 20);
}

TEST_CASE("landmark: rows sum to one and landmarks' values are not used") {
  Case c({1, 2, 1, 333, 333, 32, 16});
  const Marks marks = every(333, 50);
  for (Index j = 0; j < 333; ++j)
    for (Index e = 0; e < 16; ++e) c.v.set(0, 0, j, e, marks[static_cast<size_t>(j)] != 0 ? 1e6 : 1);
  for (const float o : run("landmark", c.input()).o) CHECK(std::fabs(o - 1) <= 1e-6);
  for (Index j = 0; j < 333; ++j)
    for (Index e = 0; e < 16; ++e) c.v.set(0, 0, j, e, marks[static_cast<size_t>(j)]);
  for (const char* call : {"landmark", "landmark:top_k=2"})
    for (const float o : run(call, c.input()).o) CHECK(o == 0);
}

TEST_CASE("landmark is dense causal attention where no block ends") {
  const Case c({1, 4, 2, 300, 333, 32, 32});
  const Naive dense = naive_attention(c, dense_sees(c, true));
  for (const char* call : {"landmark:block=333", "landmark:block=1000000", "landmark:block=333,top_k=3"})
    CHECK_AGREES(run(call, c.input()), dense, c);
}

TEST_CASE("landmark is dense over normal tokens where a landmark's score is the lse of its block's") {
  for (const std::uint64_t seed : {1u, 2u, 3u}) {
    Case c({1, 1, 1, 1, 411, 32, 16}, DType::f32, DType::f32, Layout::packed, seed);
    const Marks marks = every(411, 50);
    const double scale = 1 / std::sqrt(32.0);
    c.q.set(0, 0, 0, 0, 2);  // the feature that makes landmarks' scores what they should be
    const auto score = [&](Index j, Index from) {
      double x = 0;
      for (Index d = from; d < 32; ++d) x += c.q_at(0, 0, 0, d) * c.k_at(0, 0, j, d);
      return x * scale;
    };
    double sum = 0;
    for (Index j = 0; j < 411; ++j) {
      if (marks[static_cast<size_t>(j)] == 0) {
        sum += std::exp(score(j, 0));
      } else {
        c.k.set(0, 0, j, 0, (std::log(sum) - score(j, 1)) / scale / 2);
        sum = 0;
      }
    }
    const Naive want =
        naive_attention(c, [&](Index, Index, Index, Index j) { return marks[static_cast<size_t>(j)] == 0; });
    CHECK_AGREES(run("landmark", c.input()), want, c);
  }
}

TEST_CASE("landmark's retrieval equals its equations") {
  for (const DType arithmetic : {DType::f32, DType::bf16})
    for (const Index top_k : {1, 2, 4, 7}) {
      const std::string call = fmt::format("landmark:block=15,top_k={}", top_k);
      for (const Sizes& s :
           {Sizes{1, 4, 2, 300, 300, 32, 16}, Sizes{2, 2, 1, 70, 411, 16, 24}, Sizes{1, 8, 1, 1, 411, 64, 16}}) {
        const Case c(s, DType::f32, arithmetic);
        check_landmark(c, call, c.input(), naive_landmark(c, every(s.M, 15), top_k));
      }
    }
  const Case c({1, 1, 1, 1300, 1300, 16, 16});
  check_landmark(c, "landmark:top_k=2", c.input(), naive_landmark(c, every(1300, 50), 2));
}

TEST_CASE("landmark's retrieval of every block is the form of training") {
  const Case c({1, 4, 2, 411, 411, 32, 16});
  const Naive want = naive_landmark(c, every(411, 31));
  for (const char* call : {"landmark:block=31,top_k=12", "landmark:block=31,top_k=100000"})
    CHECK_AGREES(run(call, c.input()), want, c);
}

TEST_CASE("landmark: queries in pieces see what they see at once") {
  const Case whole({1, 2, 1, 700, 700, 16, 16});
  for (const char* call : {"landmark", "landmark:top_k=3"}) {
    const Got at_once = run(call, whole.input());
    for (const auto& [begin, end] : {std::pair<Index, Index>{0, 250}, {250, 251}, {251, 500}, {500, 700}}) {
      AttendInput part = whole.input();
      const auto cut = [](TensorView& x, Index from, Index to) { x.data = x.at({0, 0, from}), x.shape[2] = to - from; };
      cut(part.q, begin, end), cut(part.k, 0, end), cut(part.v, 0, end);
      const Got got = run(call, part);
      for (Index h = 0; h < 2; ++h)
        for (Index t = begin; t < end; ++t)
          for (Index e = 0; e < 16; ++e)
            CHECK(got.o[static_cast<size_t>((h * (end - begin) + t - begin) * 16 + e)] ==
                  doctest::Approx(at_once.o[static_cast<size_t>((h * 700 + t) * 16 + e)]).epsilon(1e-5));
    }
  }
}

TEST_CASE("landmark is causal, bit for bit") {
  for (const std::string& isa : available_isas()) {
    const UseIsa use(isa);
    for (const char* call : {"landmark:block=20", "landmark:block=20,top_k=3"})
      for (const Sizes& s : {Sizes{1, 2, 1, 400, 400, 16, 16}, Sizes{1, 2, 1, 130, 300, 16, 16}}) {
        const Case c(s);
        const Got before = run(call, c.input());
        for (const Index t : {0, 19, 20, 21, 100, 129}) {
          Case changed = c;
          for (Index h = 0; h < 2; ++h)
            for (Index later = t + 1; later < s.N; ++later) changed.q.set(0, h, later, 2, -7);
          for (Index j = position(c, t) + 1; j < s.M; ++j)
            for (Index d = 0; d < 16; ++d) changed.k.set(0, 0, j, d, 20), changed.v.set(0, 0, j, d, 500);
          const Got after = run(call, changed.input());
          for (Index h = 0; h < 2; ++h) {
            const auto first = h * s.N * 16, end = first + (t + 1) * 16;
            CHECK(std::equal(before.o.begin() + first, before.o.begin() + end, after.o.begin() + first));
            CHECK(std::equal(before.lse.begin() + h * s.N, before.lse.begin() + h * s.N + t + 1,
                             after.lse.begin() + h * s.N));
          }
        }
      }
  }
}

TEST_CASE("landmark: the same bits for any number of threads") {
  for (const Sizes& s : {Sizes{2, 4, 2, 600, 600, 16, 16}, Sizes{1, 4, 1, 3, 5000, 32, 32}}) {
    const Case c(s);
    for (const char* call : {"landmark", "landmark:top_k=3"}) {
      Got first;
      for (const int n : {1, 2, 3}) {
        const UseThreads threads(n);
        const Got got = run(call, c.input());
        if (n == 1) first = got;
        CHECK(same_bits(got.o, first.o));
        CHECK(same_bits(got.lse, first.lse));
        CHECK(got.stats.tiles_visited == got.stats.tiles_planned);
      }
    }
  }
}

TEST_CASE("landmark's plan: blocks behind all rows in one tile, others for the rows behind them") {
  // 512 rows, two row blocks. The first begins in block 0 and meets blocks 0 … 5, the last five of them gated ones;
  // the second begins in block 5 and meets 5 … 10.
  const Case c({1, 1, 1, 512, 512, 16, 16});
  const Got got = run("landmark", c.input());
  CHECK(got.stats.tiles_planned == (6 + 5) + (1 + 6 + 5));
  CHECK(got.stats.tiles_visited == got.stats.tiles_planned);
}

TEST_CASE("landmark refuses what it cannot mean") {
  const Case c({1, 1, 1, 500, 500, 16, 16});
  CHECK_FAILS(run("landmark:block=0", c.input()), UsageError, "landmark: block = 0, expected >= 1");
  CHECK_FAILS(run("landmark:top_k=-1", c.input()), UsageError, "landmark: top_k = -1, expected >= 0");
  CHECK_FAILS(run("landmark:block=193", c.input()), UsageError,
              "landmark: block = 193, expected at most 192 where a block ends before the last of 500 keys");
  const Case last({1, 1, 1, 5, 300, 16, 16});
  CHECK_AGREES(run("landmark:block=299", last.input()), naive_landmark(last, every(300, 299)), last);
  Marks marks(500);
  marks[0] = 1;
  CHECK_FAILS(run("landmark", with(c, marks)), Error,
              "is_landmark: a landmark at 0, expected a token of its block before it");
  marks[0] = 0, marks[30] = marks[31] = 1;
  CHECK_FAILS(run("landmark", with(c, marks)), Error,
              "is_landmark: a landmark at 31, expected a token of its block before it");
  marks[31] = 0, marks[224] = 1;
  CHECK_FAILS(run("landmark", with(c, marks)), Error,
              "is_landmark: 193 tokens before the landmark at 224, expected at most 192");
  const Case wide({1, 1, 1, 9, 8, 16, 16});
  CHECK_FAILS(run("landmark", wide.input()), Error, "q: 9 queries, expected at most the 8 keys when causal");
}
