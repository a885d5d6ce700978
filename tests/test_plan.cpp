// Plans: every visible pair stands in exactly one tile, what the executor counts, and hand-made
// plans with every kind of set, mask and source.
#include <doctest/doctest.h>

#include <cmath>
#include <random>

#include "heed/kernel/kernels.h"
#include "support/naive.h"

using namespace heed;
using namespace heed::test;

namespace {

/// Checks a set's promises and returns its members.
std::vector<Index> members(const Set& set, Index limit) {
  std::vector<Index> all;
  for (Index i = 0; i < set.count; ++i) all.push_back(set[i]);
  bool inside = true, ascending = true;
  for (size_t i = 0; i < all.size(); ++i) {
    inside = inside && all[i] >= 0 && all[i] < limit;
    ascending = ascending && (i == 0 || all[i - 1] < all[i]);
  }
  CHECK(inside);
  CHECK(ascending);
  return all;
}

/// Walks the plan and counts how often each (head, query, key) is seen; [B, Hq, N, M].
std::vector<std::uint8_t> count_pairs(const Plan& plan) {
  const Problem& p = plan.problem;
  std::vector<std::uint8_t> counts(static_cast<size_t>(p.B * p.Hq * p.N * p.M));
  std::vector<int> visits(static_cast<size_t>(p.B * p.Hq * p.N));
  const Index heads = plan.lanes == Lanes::per_kv_head ? p.group() : 1;
  walk(plan, [&](const RowBlock& rows, const std::vector<Tile>& tiles) {
    CHECK(rows.kv_head == rows.head / p.group());
    for (Index h = rows.head; h < rows.head + heads; ++h)
      for (Index i = 0; i < rows.rows; ++i) ++visits[static_cast<size_t>((rows.b * p.Hq + h) * p.N + rows.token(i))];
    for (const Tile& tile : tiles) {
      const std::vector<Index> ranks = members(tile.rows, rows.rows), columns = members(tile.columns, p.M);
      for (size_t r = 0; r < ranks.size(); ++r)
        for (size_t j = 0; j < columns.size(); ++j)
          if (sees(plan, rows, tile, static_cast<Index>(r), static_cast<Index>(j)))
            for (Index h = rows.head; h < rows.head + heads; ++h)
              ++counts[static_cast<size_t>(((rows.b * p.Hq + h) * p.N + rows.token(ranks[r])) * p.M + columns[j])];
    }
  });
  Index missed = 0;
  for (const int v : visits) missed += v != 1;
  CHECK(missed == 0);
  return counts;
}

void check_plan(const std::string& call, const Case& c, const AttendInput& in, const Sees& naive,
                const std::vector<char>& undecided = {}) {
  CAPTURE(call);
  const Plan plan = plan_of(MechanismCall::parse(call), in);
  const auto& s = c.size;
  const std::vector<std::uint8_t> counts = count_pairs(plan);
  Index wrong = 0, pairs = 0, skipped = 0;
  size_t at = 0;
  for (Index b = 0; b < s.B; ++b)
    for (Index h = 0; h < s.Hq; ++h)
      for (Index t = 0; t < s.N; ++t) {
        const bool skip = !undecided.empty() && undecided[static_cast<size_t>((b * s.Hq + h) * s.N + t)] != 0;
        skipped += skip;
        for (Index j = 0; j < s.M; ++j, ++at) {
          pairs += counts[at];
          if (skip) continue;
          wrong += counts[at] != (naive(b, h, t, j) ? 1 : 0);
        }
      }
  CHECK_MESSAGE(wrong == 0, c.describe(), ": ", wrong, " pairs seen too often or not at all");
  // The executor attends the very pairs that the walk shows.
  const Got got = run(plan);
  CHECK(got.stats.pairs == pairs);
  CHECK(got.stats.pairs_computed >= pairs);
  CHECK(got.stats.tiles_visited <= got.stats.tiles_planned * 4);
  CHECK(skipped * 5 <= s.B * s.Hq * s.N);
  if (skipped == 0) {
    const Naive dense = naive_attention(c, dense_sees(c, plan.problem.causal));
    CHECK(dense_pairs(plan.problem) == dense.pairs);
    const MechanismCall parsed = MechanismCall::parse(call);
    CHECK(attend(parsed, in).density == doctest::Approx(static_cast<double>(pairs) / static_cast<double>(dense.pairs)));
  }
}

std::vector<Sizes> sizes() {
  return {{1, 1, 1, 1, 1, 8, 8},
          {2, 4, 2, 61, 61, 8, 4},
          {1, 4, 1, 90, 301, 8, 8},
          {1, 8, 8, 1, 333, 4, 4},
          {1, 2, 1, 330, 330, 4, 4}};
}

}  // namespace

TEST_CASE("every visible pair stands in exactly one tile") {
  for (const Sizes& s : sizes()) {
    const Case c(s, DType::f32, DType::f32, Layout::packed, 11);
    for (const bool causal : {false, true}) check_plan("dense", c, c.input(causal), dense_sees(c, causal));
    for (const auto& [sink, window] :
         std::vector<std::pair<Index, Index>>{{0, 1}, {4, 50}, {100, 3}, {70, 70}, {4, 512}})
      check_plan(fmt::format("streaming:sink={},window={}", sink, window), c, c.input(),
                 streaming_sees(c, sink, window));
    for (const auto& [block, window, sink] :
         std::vector<std::array<Index, 3>>{{1, 1, 0}, {7, 1, 1}, {16, 3, 1}, {64, 2, 0}, {300, 1, 1}})
      check_plan(fmt::format("power:block={},window_blocks={},sink_blocks={}", block, window, sink), c, c.input(),
                 power_sees(c, block, window, sink));
    for (const auto& [block, top_k, sink] :
         std::vector<std::array<Index, 3>>{{1, 4, 0}, {7, 3, 0}, {16, 2, 20}, {64, 1, 3}, {50, 9, 1}}) {
      const MobaChoice moba = moba_sees(c, {.block = block, .top_k = top_k, .sink = sink});
      check_plan(fmt::format("moba:block={},top_k={},sink={}", block, top_k, sink), c, c.input(), moba.sees,
                 moba.undecided);
    }
  }
}

TEST_CASE("with documents every pair still stands in one tile") {
  const Case c({2, 2, 1, 200, 260, 8, 8});
  Docs docs = documents({33, 1, 150, 76});
  const Docs second = documents({259, 1});
  docs.insert(docs.end(), second.begin(), second.end());
  AttendInput in = c.input(true);
  in.extra["doc"] = {docs.data(), DType::i32, {2, 260}};
  check_plan("dense", c, in, [&](Index b, Index, Index t, Index j) {
    return j <= position(c, t) && same_document(c, docs, b, position(c, t), j);
  });
  check_plan("streaming:sink=3,window=10", c, in, streaming_sees(c, 3, 10, docs));
  for (const Index sink : {0, 9}) {
    const MobaChoice moba = moba_sees(c, {.block = 16, .top_k = 3, .sink = sink}, docs);
    check_plan(fmt::format("moba:block=16,top_k=3,sink={}", sink), c, in, moba.sees, moba.undecided);
  }
}

TEST_CASE("row blocks begin at whole multiples of their length in positions") {
  for (const Index n : {1, 10, 64, 65, 200})
    for (const Index m : {200, 201, 263, 1000})
      for (const Index rows : {1, 7, 64, 256}) {
        const Case c({1, 1, 1, n, m, 4, 4});
        const AttendInput in = c.input();
        Plan plan = plan_of(MechanismCall::parse("dense"), in);
        plan.cut_rows_every(rows);
        REQUIRE(plan.cuts.size() >= 2);
        CHECK(plan.cuts.front() == 0);
        CHECK(plan.cuts.back() == n);
        CHECK(plan.rows_per_head() == n);
        bool aligned = true;
        for (size_t i = 1; i < plan.cuts.size(); ++i) {
          aligned = aligned && plan.cuts[i] > plan.cuts[i - 1] && plan.cuts[i] - plan.cuts[i - 1] <= rows;
          if (i + 1 < plan.cuts.size()) aligned = aligned && (m - n + plan.cuts[i]) % rows == 0;
        }
        CHECK(aligned);
      }
}

TEST_CASE("few queries over many keys: no tile is lost when the work is cut along the keys") {
  for (const std::string& isa : available_isas()) {
    const UseIsa use(isa);
    for (const Index m : {2048, 2300, 4096, 9000})
      for (const Index n : {1, 3, 60}) {
        if (n == 60 && m != 2300) continue;
        const Case c({1, 2, 1, n, m, 16, 8}, DType::f32, DType::f32, Layout::packed, 21);
        const auto check = [&](const std::string& call, const Naive& want) {
          CAPTURE(call);
          const Got got = run(call, c.input(true));
          CHECK_AGREES(got, want, c);
          CHECK(got.stats.pairs == want.pairs);
        };
        check("dense", naive_attention(c, dense_sees(c, true)));
        check("streaming:sink=4,window=8000", naive_attention(c, streaming_sees(c, 4, 8000)));
        check(fmt::format("streaming:sink=300,window={}", m - 301),
              naive_attention(c, streaming_sees(c, 300, m - 301)));
        check("power:block=4,window_blocks=2", naive_attention(c, power_sees(c, 4, 2, 1)));
        check("power:block=33,window_blocks=40", naive_attention(c, power_sees(c, 33, 40, 1)));
        check("moba:block=32,top_k=60", naive_moba(c, {.block = 32, .top_k = 60, .margin = 1e-6}));
      }
  }
}

TEST_CASE("few queries over many keys: no output depends on a later token") {
  for (const std::string& isa : available_isas()) {
    const UseIsa use(isa);
    for (const Index n : {4, 100}) {
      const Sizes s{1, 2, 1, n, 2600, 16, 8};
      const Case c(s, DType::f32, DType::f32, Layout::packed, 31);
      for (const std::string call :
           {"dense", "streaming:sink=70,window=2300", "power:block=10,window_blocks=3", "moba:block=32,top_k=12"}) {
        const Got before = run(call, c.input(true));
        for (const Index t : {Index{0}, n / 2, n - 2}) {
          Case changed = c;
          for (Index h = 0; h < 2; ++h)
            for (Index later = t + 1; later < s.N; ++later)
              for (Index d = 0; d < 16; ++d) changed.q.set(0, h, later, d, -c.q.get(0, h, later, d));
          const Got after = run(call, changed.input(true));
          Index differing = 0;
          for (Index h = 0; h < 2; ++h)
            for (Index i = 0; i <= t; ++i) {
              const size_t row = static_cast<size_t>(h * s.N + i);
              differing +=
                  std::memcmp(&before.o[row * 8], &after.o[row * 8], 32) != 0 || before.lse[row] != after.lse[row];
            }
          CHECK_MESSAGE(differing == 0, c.describe(), ": ", call, ", ", differing, " rows at or before ", t,
                        " changed");
        }
      }
    }
  }
}

TEST_CASE("a hand-made plan: lists, pages, bits, bands and a visible interval together") {
  for (const std::string& isa : available_isas()) {
    const UseIsa use(isa);
    for (const DType arithmetic : {DType::f32, DType::bf16})
      for (const Lanes lanes : {Lanes::per_kv_head, Lanes::per_query_head})
        for (const Sizes& s :
             {Sizes{2, 4, 2, 150, 600, 24, 16}, Sizes{1, 4, 1, 9, 600, 24, 16}, Sizes{1, 2, 2, 600, 600, 8, 8}}) {
          const Case c(s, DType::f32, arithmetic);
          Plan plan = plan_of(MechanismCall::parse("dense"), c.input(false));
          plan.lanes = lanes;
          plan.cut_rows_every(100);
          const Index m = s.M;
          // Columns [0, 77): bits. [77, 300): odd ones as a list, for every third row. [301, 581):
          // every other page of 7, banded. [581, 600): all, for the last half of the block's rows.
          const auto bit = [](Index t, Index j) { return (t * 7 + j * 5) % 3 == 1; };
          plan.emit = [&](const RowBlock& rows, Tiles& tiles) {
            const auto words = tiles.take<std::uint64_t>(rows.rows * 2);
            for (Index i = 0; i < rows.rows; ++i) {
              words[static_cast<size_t>(2 * i)] = words[static_cast<size_t>(2 * i + 1)] = 0;
              for (Index j = 0; j < 77; ++j)
                if (bit(rows.token(i), j)) words[static_cast<size_t>(2 * i + j / 64)] |= std::uint64_t{1} << (j % 64);
            }
            tiles.add(Set::range(0, rows.rows), Set::range(0, 77), Mask::bits(words.data(), 2));
            std::vector<std::int32_t> thirds, odd;
            for (Index i = 0; i < rows.rows; ++i)
              if (rows.token(i) % 3 == 0) thirds.push_back(static_cast<std::int32_t>(i));
            for (std::int32_t j = 77; j < 300; j += 2) odd.push_back(j);
            const auto keep = [&](const std::vector<std::int32_t>& x) {
              const auto copy = tiles.take<std::int32_t>(static_cast<Index>(x.size()));
              std::copy(x.begin(), x.end(), copy.begin());
              return copy;
            };
            tiles.add(Set::list(keep(thirds)), Set::list(keep(odd)), Mask::full());
            std::vector<std::int32_t> pages;
            for (std::int32_t i = 0; i < 40; i += 2) pages.push_back(i);
            // The last page is cut: 4 of its 7 columns.
            tiles.add(Set::range(0, rows.rows), Set{301, 137, keep(pages).data(), 7}, Mask::band(-200, -20));
            tiles.add(Set::range(rows.rows / 2, rows.rows), Set::range(581, 600), Mask::full());
          };
          plan.visible_first.assign(static_cast<size_t>(s.B * m), 20);
          plan.visible_end.assign(static_cast<size_t>(s.B * m), 590);
          for (Index p = 0; p < m; p += 4) plan.visible_end[static_cast<size_t>(p)] = 100;
          const auto half_of = [&](Index t) {
            size_t i = 0;
            while (plan.cuts[i + 1] <= t) ++i;
            return plan.cuts[i] + (plan.cuts[i + 1] - plan.cuts[i]) / 2;
          };
          const Sees naive = [&](Index b, Index, Index t, Index j) {
            const Index p = position(c, t);
            if (j < 20 || j >= plan.visible_end[static_cast<size_t>(b * m + p)]) return false;
            if (j < 77) return bit(t, j);
            if (j < 300) return t % 3 == 0 && j % 2 == 1;
            if (j < 581) return j > 300 && (j - 301) / 7 % 2 == 0 && j < 571 && j >= p - 200 && j <= p - 20;
            return t >= half_of(t);
          };
          const Naive want = naive_attention(c, naive);
          const Got got = run(plan);
          CHECK_AGREES(got, want, c);
          CHECK(got.stats.pairs == want.pairs);
          Index wrong = 0, at = 0;
          const auto counts = count_pairs(plan);
          for (Index b = 0; b < s.B; ++b)
            for (Index h = 0; h < s.Hq; ++h)
              for (Index t = 0; t < s.N; ++t)
                for (Index j = 0; j < m; ++j, ++at)
                  wrong += counts[static_cast<size_t>(at)] != (naive(b, h, t, j) ? 1 : 0);
          CHECK(wrong == 0);
        }
  }
}

TEST_CASE("log-weights and positions belong to a source's columns") {
  for (const std::string& isa : available_isas()) {
    const UseIsa use(isa);
    const Case c({1, 2, 1, 50, 200, 16, 16});
    Plan plan = plan_of(MechanismCall::parse("dense"), c.input(false));
    std::vector<float> weight(200);
    std::vector<std::int32_t> place(200);
    for (size_t j = 0; j < 200; ++j)
      weight[j] = std::log(1.0f + static_cast<float>(j % 7)), place[j] = static_cast<std::int32_t>(2 * j - j % 2);
    plan.sources[0].views[0].log_weight = weight.data();
    plan.sources[0].views[0].position = place.data();
    plan.rule.alibi = {0.02f, 0.1f};
    for (const bool listed : {false, true}) {
      std::vector<std::int32_t> all;
      for (std::int32_t j = 10; j < 190; ++j) all.push_back(j);
      plan.emit = [&](const RowBlock& rows, Tiles& tiles) {
        tiles.add(Set::range(0, rows.rows), listed ? Set::list(all) : Set::range(10, 190), Mask::band(-150, 0));
      };
      const Sees naive = [&](Index, Index, Index t, Index j) {
        const Index p = position(c, t), x = place[static_cast<size_t>(j)];
        return j >= 10 && j < 190 && x >= p - 150 && x <= p;
      };
      NaiveOptions options;
      options.change = [&](Index, Index h, Index t, Index j, double x) {
        return x + weight[static_cast<size_t>(j)] +
               (h == 0 ? 0.02f : 0.1f) * static_cast<double>(place[static_cast<size_t>(j)] - position(c, t));
      };
      CHECK_AGREES(run(plan), naive_attention(c, naive, options), c);
    }
  }
}

TEST_CASE("rows may stand in any order and a query in several rows") {
  for (const std::string& isa : available_isas()) {
    const UseIsa use(isa);
    const Case c({2, 4, 2, 60, 90, 16, 16});
    const Naive whole = naive_attention(c, dense_sees(c, true));
    Plan plan = plan_of(MechanismCall::parse("dense"), c.input(true));
    plan.lanes = Lanes::per_query_head;
    plan.emit = [&](const RowBlock& rows, Tiles& tiles) {
      tiles.add(Set::range(0, rows.rows), Set::range(0, 90), Mask::causal());
    };
    // A permutation, another one for each head: the output is in the order of tokens.
    for (Index lane = 0; lane < 8; ++lane) {
      plan.row_tokens.emplace_back();
      for (Index i = 0; i < 60; ++i) plan.row_tokens.back().push_back(static_cast<std::int32_t>((7 * i + lane) % 60));
    }
    plan.cuts = {0, 30, 31, 60};
    CHECK_AGREES(run(plan), whole, c);
    // 100 rows, so that tokens stand in several: the output is in the order of rows.
    for (size_t lane = 0; lane < 8; ++lane)
      for (Index i = 60; i < 100; ++i) plan.row_tokens[lane].push_back(static_cast<std::int32_t>(i * i % 60));
    plan.cuts.push_back(100);
    plan.output_by_token = false;
    REQUIRE(plan.rows_per_head() == 100);
    const Got got = run(plan);
    double worst = 0;
    for (size_t lane = 0; lane < 8; ++lane)
      for (size_t i = 0; i < 100; ++i) {
        const size_t row = lane * 100 + i, from = lane * 60 + static_cast<size_t>(plan.row_tokens[lane][i]);
        worst = std::max(worst, std::fabs(got.lse[row] - whole.lse[from]));
        for (size_t e = 0; e < 16; ++e) {
          const double off = std::fabs(got.o[row * 16 + e] - whole.o[from * 16 + e]);
          worst = std::max(worst, std::isnan(off) ? 1e9 : off);
        }
      }
    CHECK(worst < 2e-5);
  }
}

TEST_CASE("a cache that grew in pieces holds what it was given at once") {
  for (const std::string& isa : available_isas()) {
    const UseIsa use(isa);
    for (const DType arithmetic : {DType::f32, DType::bf16}) {
      const Case c({1, 2, 2, 1, 211, 33, 20}, DType::f32, arithmetic, Layout::scattered);
      KeyValues cache(2, 33, 20, 300, arithmetic);
      const auto part = [](const Sample& x, Index from, Index to) {
        const TensorView v = x.view();
        return TensorView(v.at({0, 0, from, 0}), v.dtype, {2, to - from, v.shape[3]},
                          {v.stride[1], v.stride[2], v.stride[3]});
      };
      const auto grow = [&](Index from, Index to) { cache.append(part(c.k, from, to), part(c.v, from, to)); };
      grow(0, 1), grow(1, 63), grow(63, 66), grow(66, 66), grow(66, 150), grow(150, 211);
      const auto check = [&] {
        Index wrong = 0;
        std::vector<float> key(33), value(20);
        for (Index h = 0; h < 2; ++h)
          for (Index j = 0; j < cache.size(); ++j) {
            cache.read_key(h, j, key.data());
            cache.read_value(h, j, value.data());
            for (Index d = 0; d < 33; ++d) wrong += key[static_cast<size_t>(d)] != c.k_at(0, h, j, d);
            for (Index e = 0; e < 20; ++e) wrong += value[static_cast<size_t>(e)] != c.v_at(0, h, j, e);
          }
        CHECK(wrong == 0);
        const KeyRows rows = cache.key_rows();
        for (Index h = 0; h < 2; ++h)
          for (Index j = 0; j < cache.size(); ++j)
            for (Index d = 0; d < cache.layout().dp; ++d) {
              const double want = d < 33 ? c.k_at(0, h, j, d) : 0;
              if (cache.layout().product == DType::f32)
                wrong += reinterpret_cast<const float*>(rows.row(h, j))[d] != want;
              else wrong += to_f32(reinterpret_cast<const bf16*>(rows.row(h, j))[d]) != want;
            }
        CHECK(wrong == 0);
        for (const Index block : {1, 10, 64, 100}) {
          const BlockMeans& means = cache.block_means(block);
          CHECK(means.complete == cache.size() / block);
          const PanelLayout layout{.dtype = DType::f32, .d = 33, .dv = 0, .dp = 33, .dvp = 0};
          double worst = 0;
          for (Index h = 0; h < 2; ++h)
            for (Index b = 0; b < means.complete; ++b)
              for (Index d = 0; d < 33; ++d) {
                double want = 0;
                for (Index j = b * block; j < (b + 1) * block; ++j)
                  want += c.k_at(0, h, j, d) / static_cast<double>(block);
                const Index at = h * means.capacity * 33 + layout.key_offset(b, d);
                worst = std::max(worst, std::fabs(static_cast<double>(means.panels[static_cast<size_t>(at)]) - want));
              }
          CHECK(worst < 1e-6);
        }
      };
      CHECK(cache.size() == 211);
      check();
      cache.truncate(130);
      CHECK(cache.size() == 130);
      check();
      grow(130, 190);  // over what was forgotten
      check();
      CHECK_THROWS_AS(grow(0, 200), Error);
      CHECK(cache.size() == 190);
      check();
    }
  }
}
