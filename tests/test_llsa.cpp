// llsa against its equations: the weighted multiset of fine and coarse tokens, built explicitly.
#include <doctest/doctest.h>

#include <algorithm>
#include <numeric>
#include <random>

#include "heed/kernel/kernels.h"
#include "heed/plan/grid.h"
#include "support/naive.h"

using namespace heed;
using namespace heed::test;

namespace {

struct Llsa {
  Index block = 8, top_k = 3, levels = 2;
  bool enriched = true, reweight = true, dedupe = false;
  std::string call() const {
    return fmt::format("llsa:block={},top_k={},levels={},enriched_levels={},reweight={},dedupe={}", block, top_k,
                       levels, enriched ? levels : 0, reweight, dedupe);
  }
};

using Vector = std::vector<double>;

double dot(const Vector& a, const Vector& b) { return std::inner_product(a.begin(), a.end(), b.begin(), 0.0); }

/// The pyramid of one head and what its runs chose, straight from steps 1 and 2.
struct Head {
  std::vector<std::vector<Vector>> q, k, v;              // [level][run]
  std::vector<std::vector<std::vector<Index>>> chosen;   // [level][run], ascending
  std::vector<std::vector<std::vector<Index>>> compared;  // [level][run]
  std::vector<std::vector<char>> undecided;              // [level][run], ancestors included
};

Head naive_head(const Case& c, const Llsa& o, Index b, Index h, double margin) {
  const auto& s = c.size;
  Head head;
  const auto vectors = [&](Index features, const auto& at) {
    std::vector<std::vector<Vector>> levels;
    Index width = 1;
    for (Index l = 0; l <= o.levels; ++l, width *= o.block) {
      levels.emplace_back();
      for (Index begin = 0; begin < s.N; begin += width) {
        const Index end = std::min(begin + width, s.N);
        Vector& mean = levels.back().emplace_back(static_cast<size_t>(features));
        for (Index t = begin; t < end; ++t)
          for (Index d = 0; d < features; ++d)
            mean[static_cast<size_t>(d)] += at(t, d) / static_cast<double>(end - begin);
      }
    }
    return levels;
  };
  head.q = vectors(s.D, [&](Index t, Index d) { return c.q_at(b, h, t, d); });
  head.k = vectors(s.D, [&](Index t, Index d) { return c.k_at(b, c.kv_head(h), t, d); });
  head.v = vectors(s.Dv, [&](Index t, Index d) { return c.v_at(b, c.kv_head(h), t, d); });

  const size_t top = static_cast<size_t>(o.levels);
  head.chosen.resize(top + 1), head.compared.resize(top + 1), head.undecided.resize(top + 1);
  for (size_t l = top; l >= 1; --l)
    for (size_t a = 0; a < head.q[l].size(); ++a) {
      const size_t parent = a / static_cast<size_t>(o.block);
      std::vector<Index> candidates;
      if (l == top) {
        for (size_t j = 0; j < head.k[l].size(); ++j) candidates.push_back(static_cast<Index>(j));
      } else {
        for (const Index p : head.chosen[l + 1][parent])
          for (Index j = p * o.block; j < std::min<Index>((p + 1) * o.block, static_cast<Index>(head.k[l].size())); ++j)
            candidates.push_back(j);
      }
      head.compared[l].push_back(candidates);
      std::vector<std::pair<double, Index>> scored;  // ascending: best first, lower index among equals
      for (const Index j : candidates) scored.emplace_back(-dot(head.q[l][a], head.k[l][static_cast<size_t>(j)]), j);
      std::sort(scored.begin(), scored.end());
      const auto keep = std::min(static_cast<size_t>(o.top_k), scored.size());
      bool near = l < top && head.undecided[l + 1][parent] != 0;
      if (keep < scored.size()) near = near || scored[keep].first - scored[keep - 1].first < margin;
      head.undecided[l].push_back(near);
      std::vector<Index>& chosen = head.chosen[l].emplace_back();
      for (size_t i = 0; i < keep; ++i) chosen.push_back(scored[i].second);
      std::sort(chosen.begin(), chosen.end());
    }
  return head;
}

bool holds(const std::vector<Index>& list, Index x) { return std::find(list.begin(), list.end(), x) != list.end(); }

Naive naive_llsa(const Case& c, const Llsa& o, double margin = 1e-4) {
  const auto& s = c.size;
  Naive result;
  result.o.assign(static_cast<size_t>(s.B * s.Hq * s.N * s.Dv), 0);
  const double scale = 1 / std::sqrt(static_cast<double>(s.D));
  for (Index b = 0; b < s.B; ++b)
    for (Index h = 0; h < s.Hq; ++h) {
      const Head head = naive_head(c, o, b, h, margin);
      for (Index t = 0; t < s.N; ++t) {
        // Step 3: (level, run, weight).
        struct Item {
          size_t level;
          Index run;
          double weight;
        };
        std::vector<Item> items;
        std::vector<size_t> own{static_cast<size_t>(t)};  // the query's run at each level
        for (Index l = 1; l <= o.levels; ++l) own.push_back(own.back() / static_cast<size_t>(o.block));
        for (const Index j : head.chosen[1][own[1]])
          for (Index token = j * o.block; token < std::min((j + 1) * o.block, s.N); ++token)
            items.push_back({0, token, 1});
        Index width = o.block;
        for (size_t l = 1; o.enriched && l < own.size(); ++l, width *= o.block)
          for (const Index j : head.compared[l][own[l]]) {
            if (o.dedupe && holds(head.chosen[l][own[l]], j)) continue;
            const Index tokens = std::min((j + 1) * width, s.N) - j * width;
            items.push_back({l, j, o.reweight ? static_cast<double>(tokens) : 1.0});
          }
        // Step 4.
        const Vector& q = head.q[0][static_cast<size_t>(t)];
        std::vector<double> score;
        for (const Item& i : items) score.push_back(scale * dot(q, head.k[i.level][static_cast<size_t>(i.run)]));
        const double most = *std::max_element(score.begin(), score.end());
        double sum = 0;
        const size_t row = static_cast<size_t>((b * s.Hq + h) * s.N + t);
        double* out = &result.o[row * static_cast<size_t>(s.Dv)];
        for (size_t i = 0; i < items.size(); ++i) {
          const double p = items[i].weight * std::exp(score[i] - most);
          sum += p;
          const Vector& v = head.v[items[i].level][static_cast<size_t>(items[i].run)];
          for (size_t e = 0; e < v.size(); ++e) out[e] += p * v[e];
        }
        for (Index e = 0; e < s.Dv; ++e) out[e] /= sum;
        result.lse.push_back(most + std::log(sum));
        result.undecided.push_back(head.undecided[1][own[1]]);
        result.pairs += static_cast<Index>(items.size());
      }
    }
  return result;
}

/// On every instruction set.
void check_llsa(const Case& c, const Llsa& o, double margin = 1e-4) {
  const Naive want = naive_llsa(c, o, margin);
  const std::string call = o.call();
  CAPTURE(call);
  const Index undecided = std::accumulate(want.undecided.begin(), want.undecided.end(), Index{0});
  CHECK(undecided * 5 <= static_cast<Index>(want.undecided.size()));
  for (const std::string& isa : available_isas()) {
    const UseIsa use(isa);
    const Got got = run(call, c.input());
    CHECK_AGREES(got, want, c);
    if (undecided == 0) CHECK(got.stats.pairs == want.pairs);
  }
}

Sizes sizes(Index hq, Index hk, Index n, Index d = 32, Index dv = 16) { return {1, hq, hk, n, n, d, dv}; }

/// q = 1.5 (0.6 a + 0.8 b), k = b, v = c, where a, b and c are AR(1) sequences of vectors.
Case smooth(Index n, double rho) {
  Case c({1, 1, 1, n, n, 32, 32});
  std::mt19937_64 random(3);
  std::normal_distribution<double> normal;
  double x[3][32];
  for (auto& sequence : x)
    for (double& e : sequence) e = normal(random);
  for (Index t = 0; t < n; ++t)
    for (Index d = 0; d < 32; ++d) {
      c.q.set(0, 0, t, d, 1.5 * (0.6 * x[0][d] + 0.8 * x[1][d]));
      c.k.set(0, 0, t, d, x[1][d]), c.v.set(0, 0, t, d, x[2][d]);
      for (auto& sequence : x) sequence[d] = rho * sequence[d] + std::sqrt(1 - rho * rho) * normal(random);
    }
  return c;
}

double relative_error(const std::vector<float>& got, const std::vector<float>& want) {
  double error = 0, size = 0;
  for (size_t i = 0; i < got.size(); ++i) {
    error += std::pow(static_cast<double>(got[i]) - static_cast<double>(want[i]), 2);
    size += std::pow(static_cast<double>(want[i]), 2);
  }
  return std::sqrt(error / size);
}

}  // namespace

TEST_CASE("llsa equals the multiset of its equations") {
  for (const DType arithmetic : {DType::f32, DType::bf16}) {
    for (const Index levels : {1, 2, 3})
      for (const Index top_k : {1, 3, 6}) {
        check_llsa(Case(sizes(2, 2, 530), DType::f32, arithmetic), {.block = 8, .top_k = top_k, .levels = levels});
        check_llsa(Case(sizes(4, 1, 301, 17, 40), DType::f16, arithmetic),
                   {.block = 5, .top_k = top_k, .levels = levels});
      }
    check_llsa(Case(sizes(1, 1, 1), DType::f32, arithmetic), {.block = 16, .top_k = 8, .levels = 1});
    check_llsa(Case(sizes(2, 1, 17, 256, 8), DType::f32, arithmetic), {.block = 16, .top_k = 1, .levels = 2});
    check_llsa(Case(sizes(8, 1, 260, 16, 24), DType::bf16, arithmetic), {.block = 2, .top_k = 4, .levels = 5});
    check_llsa(Case({2, 4, 2, 200, 200, 24, 16}, DType::f32, arithmetic, Layout::scattered), {.block = 12, .top_k = 4});
    check_llsa(Case(sizes(2, 1, 700, 24, 16), DType::f32, arithmetic, Layout::reversed), {.block = 24, .top_k = 5});
    check_llsa(Case(sizes(1, 1, 900, 64, 64), DType::f32, arithmetic), {.block = 70, .top_k = 3});  // more than a panel
    check_llsa(Case(sizes(1, 1, 1500, 64, 64), DType::f32, arithmetic), {.block = 16, .top_k = 8});
  }
}

TEST_CASE("llsa's parts: enrichment, weights, duplicates") {
  const Case c(sizes(4, 2, 410));
  for (const Index levels : {1, 2, 3})
    for (const bool enriched : {false, true})
      for (const bool reweight : {false, true})
        for (const bool dedupe : {false, true})
          check_llsa(
              c,
              {.block = 7, .top_k = 4, .levels = levels, .enriched = enriched, .reweight = reweight, .dedupe = dedupe});
  check_llsa(Case(sizes(1, 1, 1300)), {.block = 16, .top_k = 8, .dedupe = true});
  check_llsa(Case(sizes(1, 1, 1300)), {.block = 16, .top_k = 8, .levels = 1, .dedupe = true});
}

TEST_CASE("llsa: defaults are 16, 8 and one level, or two from 16384 tokens on") {
  const Case c(sizes(1, 1, 700, 16, 8));
  CHECK_AGREES(run("llsa", c.input()), naive_llsa(c, {.block = 16, .top_k = 8, .levels = 1}), c);
  for (const Index n : {16383, 16384}) {
    const Case large(sizes(1, 1, n, 8, 8));
    const Got got = run("llsa", large.input()),
              one = run(fmt::format("llsa:levels={}", n < 16384 ? 1 : 2), large.input());
    CHECK(same_bits(got.o, one.o));
    // 8 blocks of 16, their 128 uncles where there are two levels, and every coarsest token; 16383 = 1023.9 · 16.
    if (n == 16384) CHECK(got.stats.pairs == n * (128 + 128 + 64));
    else CHECK(got.stats.pairs <= n * (128 + 1024));
  }
}

TEST_CASE("llsa with all blocks: dense when groups are constant, or when nothing is counted twice") {
  for (const Index levels : {1, 2, 3}) {
    const Case c(sizes(4, 2, 403));
    const Naive dense = naive_attention(c, dense_sees(c, false));
    const Llsa all{.block = 6, .top_k = 1000, .levels = levels, .dedupe = true};
    CHECK_AGREES(run(all.call(), c.input()), dense, c);
    Index width = 1;
    for (Index l = 0; l < levels; ++l) width *= 6;
    Case flat = c;
    for (Index h = 0; h < 2; ++h)
      for (Index t = 0; t < 403; ++t)
        for (Index d = 0; d < 32; ++d) {
          flat.k.set(0, h, t, d, c.k.get(0, h, t / width * width, d));
          if (d < 16) flat.v.set(0, h, t, d, c.v.get(0, h, t / width * width, d));
        }
    Naive even = naive_attention(flat, dense_sees(flat, false));
    for (double& lse : even.lse) lse += std::log(static_cast<double>(levels + 1));  // each group counts that often
    CHECK_AGREES(run(Llsa{.block = 6, .top_k = 1000, .levels = levels}.call(), flat.input()), even, flat);
    // The paper's form is not dense with all blocks where groups are not constant.
    CHECK(relative_error(run(Llsa{.block = 6, .top_k = 1000, .levels = levels}.call(), c.input()).o,
                         run("dense", c.input()).o) > 0.01);
  }
}

TEST_CASE("llsa with dedupe represents every token exactly once, whatever was chosen") {
  Case c(sizes(2, 1, 777));
  for (Index j = 0; j < 777; ++j)
    for (Index d = 0; d < 32; ++d) c.k.set(0, 0, j, d, d == 0 ? 1 : 0);  // all scores of a query are equal
  for (const Index levels : {1, 2, 3}) {
    const Got got = run(Llsa{.block = 9, .top_k = 2, .levels = levels, .dedupe = true}.call(), c.input());
    for (Index t = 0; t < 777; ++t)
      CHECK(got.lse[static_cast<size_t>(t)] ==
            doctest::Approx(std::log(777.0) + c.q_at(0, 0, t, 0) / std::sqrt(32.0)).epsilon(1e-5));
  }
}

TEST_CASE("llsa without enrichment and with one level is plain block top-k attention") {
  const Case c(sizes(2, 2, 333));
  const Llsa o{.block = 16, .top_k = 5, .levels = 1, .enriched = false};
  std::vector<Head> heads;
  for (Index h = 0; h < 2; ++h) heads.push_back(naive_head(c, o, 0, h, 1e-4));
  Naive plain = naive_attention(c, [&](Index, Index h, Index t, Index j) {
    return holds(heads[static_cast<size_t>(h)].chosen[1][static_cast<size_t>(t / 16)], j / 16);
  });
  for (Index h = 0; h < 2; ++h)
    for (Index t = 0; t < 333; ++t)
      plain.undecided.push_back(heads[static_cast<size_t>(h)].undecided[1][static_cast<size_t>(t / 16)]);
  CHECK_AGREES(run(o.call(), c.input()), plain, c);
}

TEST_CASE("llsa: search from coarse to fine finds what a flat search does when it keeps all coarse runs") {
  const Case c(sizes(2, 1, 600));  // blocks of 8: 75, 10 and 2 runs
  for (const Index top_k : {10, 20}) {
    const Got flat = run(Llsa{.block = 8, .top_k = top_k, .levels = 1, .enriched = false}.call(), c.input());
    const Got deep = run(Llsa{.block = 8, .top_k = top_k, .levels = 2, .enriched = false}.call(), c.input());
    CHECK(same_bits(flat.o, deep.o));
    const Got deeper = run(Llsa{.block = 8, .top_k = top_k, .levels = 3, .enriched = false}.call(), c.input());
    CHECK(same_bits(flat.o, deeper.o));
  }
  const Got flat = run(Llsa{.block = 8, .top_k = 3, .levels = 1, .enriched = false}.call(), c.input());
  const Got deep = run(Llsa{.block = 8, .top_k = 3, .levels = 2, .enriched = false}.call(), c.input());
  CHECK_FALSE(same_bits(flat.o, deep.o));
}

TEST_CASE("llsa: the lower of equal runs wins at every level") {
  Case c(sizes(1, 1, 500, 16, 8));
  for (Index j = 0; j < 500; ++j)
    for (Index d = 0; d < 16; ++d) c.k.set(0, 0, j, d, 0);
  for (const Index levels : {1, 2}) check_llsa(c, {.block = 8, .top_k = 3, .levels = levels}, 0);
  for (Index j = 0; j < 500; ++j)  // two kinds of blocks in turn
    for (Index d = 0; d < 16; ++d) c.k.set(0, 0, j, d, j / 8 % 2), c.q.set(0, 0, j, d, 1);
  for (const Index levels : {1, 2}) check_llsa(c, {.block = 8, .top_k = 3, .levels = levels}, 0);
}

TEST_CASE("llsa untrained on smooth data: the sheet's errors, and weights make up for few blocks") {
  // The sheet: rho = .9: top-k 1.09, enriched .93, reweighted .26, deduped .19, top-k with 32 blocks .53;
  // rho = .99: .37, .33, .13, .011, .17; two levels: .38, .35, .09, .045. One sample, so a third is allowed.
  const auto expect = [](const Case& c, const Got& dense, const Llsa& o, double error) {
    const std::string call = o.call();
    CAPTURE(call);
    const double got = relative_error(run(call, c.input()).o, dense.o);
    CHECK(got == doctest::Approx(error).epsilon(0.33));
    return got;
  };
  for (const double rho : {0.9, 0.99}) {
    CAPTURE(rho);
    const bool very = rho > 0.95;
    const Case c = smooth(4096, rho);
    const Got dense = run("dense", c.input());
    const Llsa o{.block = 16, .top_k = 8, .levels = 1};
    Llsa plain = o, even = o, once = o, many = o;
    plain.enriched = false, even.reweight = false, once.dedupe = true, many.enriched = false, many.top_k = 32;
    expect(c, dense, plain, very ? 0.37 : 1.09);
    expect(c, dense, even, very ? 0.33 : 0.93);
    const double weighted = expect(c, dense, o, very ? 0.13 : 0.26);
    expect(c, dense, once, very ? 0.011 : 0.19);
    CHECK(weighted < expect(c, dense, many, very ? 0.17 : 0.53));
    if (!very) continue;
    plain.levels = even.levels = once.levels = 2;
    expect(c, dense, plain, 0.38);
    expect(c, dense, even, 0.35);
    expect(c, dense, {.block = 16, .top_k = 8, .levels = 2}, 0.09);
    expect(c, dense, once, 0.045);
  }
}

TEST_CASE("llsa computes N log N: twice the tokens cost little over twice") {
  // The default's two levels leave N / 256 coarsest tokens for everyone, which three levels avoid from 64K tokens on.
  // From 32K tokens on the third level has as many runs as top_k keeps.
  Index before = 0;
  for (const Index n : {32768, 65536, 131072}) {
    const Case c(sizes(1, 1, n, 8, 8));
    const Got got = run("llsa:levels=3", c.input());
    CAPTURE(n);
    CHECK(got.stats.pairs == n * (8 * 16 + 8 * 16 + std::min<Index>(8, n / 4096) * 16 + n / 4096));
    if (before > 0) CHECK(static_cast<double>(got.stats.pairs_computed) < 2.3 * static_cast<double>(before));
    before = got.stats.pairs_computed;
  }
}

TEST_CASE("llsa: the same bits for any number of threads") {
  for (const std::string call : {"llsa:block=8,levels=3", "llsa:levels=1", "llsa:levels=2,top_k=2,dedupe=true"})
    for (const Index n : {200, 1500}) {
      const Case c({2, 4, 2, n, n, 16, 16});
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

TEST_CASE("Morton order: every token once, sixteen in a row are a patch of 4x4, there and back is the same") {
  for (const Extents& length :
       {Extents{1, 16, 16}, {1, 1, 1}, {1, 64, 64}, {1, 5, 9}, {3, 7, 2}, {8, 8, 8}, {1, 1, 40}}) {
    const std::vector<std::int32_t> order = morton_order(length);
    REQUIRE(static_cast<Index>(order.size()) == volume(length));
    std::vector<std::int32_t> back(order.size(), -1);
    for (size_t rank = 0; rank < order.size(); ++rank)
      back[static_cast<size_t>(order[rank])] = static_cast<std::int32_t>(rank);
    for (size_t token = 0; token < back.size(); ++token) {
      REQUIRE(back[token] >= 0);
      CHECK(order[static_cast<size_t>(back[token])] == static_cast<std::int32_t>(token));
    }
  }
  const std::vector<std::int32_t> order = morton_order({1, 32, 32});
  for (size_t patch = 0; patch < order.size(); patch += 16) {
    const Index y = order[patch] / 32, x = order[patch] % 32;
    CHECK((y % 4 == 0 && x % 4 == 0));
    for (size_t i = patch; i < patch + 16; ++i) CHECK((order[i] / 32 / 4 == y / 4 && order[i] % 32 / 4 == x / 4));
  }
  CHECK(morton_order({1, 2, 2}) == std::vector<std::int32_t>{0, 1, 2, 3});
  CHECK(morton_order({1, 2, 4}) == std::vector<std::int32_t>{0, 1, 4, 5, 2, 3, 6, 7});
}

TEST_CASE("llsa refuses what it cannot mean") {
  const Case c(sizes(1, 1, 100));
  CHECK_FAILS(run("llsa:block=1", c.input()), UsageError, "llsa: block = 1, expected >= 2");
  CHECK_FAILS(run("llsa:top_k=0", c.input()), UsageError, "llsa: top_k = 0, expected >= 1");
  CHECK_FAILS(run("llsa:levels=0", c.input()), UsageError, "llsa: levels = 0, expected >= 1");
  CHECK_FAILS(run("llsa:levels=3", c.input()), UsageError,
              "llsa: levels = 3, expected at most 2 for 100 tokens in blocks of 16");
  CHECK_FAILS(run("llsa:levels=1000000000", c.input()), UsageError,
              "llsa: levels = 1000000000, expected at most 2 for 100 tokens in blocks of 16");
  CHECK_FAILS(run("llsa:block=1000000000000,levels=2", c.input()), UsageError,
              "llsa: levels = 2, expected at most 1 for 100 tokens in blocks of 1000000000000");
  CHECK_FAILS(run("llsa:levels=2,enriched_levels=1", c.input()), UsageError,
              "llsa: enriched_levels = 1, expected 0 or levels = 2");
  CHECK_FAILS(run("llsa", c.input(true)), UsageError,
              "llsa: causal = true, expected false: it is not causal by definition");
  CHECK_FAILS(run("llsa", Case({1, 1, 1, 99, 100, 16, 16}).input()), Error,
              "llsa: 99 queries and 100 keys, expected as many of one as of the other");
}
