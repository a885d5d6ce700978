// proxy-attn against its equations: mean heads rank blocks, last queries set budgets, softmax over what was chosen.
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <random>
#include <set>

#include "heed/kernel/kernels.h"
#include "support/naive.h"

using namespace heed;
using namespace heed::test;

namespace {

struct ProxyOptions {
  Index proxy_heads = 1;
  double mass = 0.6;
  Index query_stride = 4, min_budget = 0, block = 16;
  std::string call() const {
    return fmt::format("proxy-attn:proxy_heads={},mass={},query_stride={},min_budget={},block={}", proxy_heads, mass,
                       query_stride, min_budget, block);
  }
};

struct ProxyChoice {
  std::vector<std::set<Index>> blocks;  // [B, Hq, n]
  std::vector<Index> budgets;           // [B, Hq]: c
  std::vector<char> undecided;          // [B, Hq, N]
  Index n = 0;
};

using At = std::function<double(Index t, Index d)>;

// Causal softmax of one query: p over keys 0 … t.
std::vector<double> softmax(Index t, Index d, const At& q, const At& k) {
  std::vector<double> p(static_cast<size_t>(t + 1));
  double top = -INFINITY, sum = 0;
  for (Index j = 0; j <= t; ++j) {
    double x = 0;
    for (Index f = 0; f < d; ++f) x += q(t, f) * k(j, f);
    p[static_cast<size_t>(j)] = x / std::sqrt(static_cast<double>(d));
    top = std::max(top, p[static_cast<size_t>(j)]);
  }
  for (double& x : p) sum += x = std::exp(x - top);
  for (double& x : p) x /= sum;
  return p;
}

ProxyChoice choose(const Case& c, const ProxyOptions& o) {
  const auto& s = c.size;
  const Index n = (s.N + o.block - 1) / o.block, heads = s.Hq / o.proxy_heads, kv_heads = s.Hk / o.proxy_heads;
  ProxyChoice result;
  result.n = n;
  result.blocks.resize(static_cast<size_t>(s.B * s.Hq * n));
  result.undecided.assign(static_cast<size_t>(s.B * s.Hq * s.N), 0);
  for (Index b = 0; b < s.B; ++b)
    for (Index g = 0; g < o.proxy_heads; ++g) {
      // Steps 1 and 2.
      std::vector<double> mean_q(static_cast<size_t>(s.N * s.D)), mean_k(mean_q);
      for (Index t = 0; t < s.N; ++t)
        for (Index d = 0; d < s.D; ++d) {
          for (Index h = g * heads; h < (g + 1) * heads; ++h)
            mean_q[static_cast<size_t>(t * s.D + d)] += c.q_at(b, h, t, d) / static_cast<double>(heads);
          for (Index h = g * kv_heads; h < (g + 1) * kv_heads; ++h)
            mean_k[static_cast<size_t>(t * s.D + d)] += c.k_at(b, h, t, d) / static_cast<double>(kv_heads);
        }
      std::vector<std::vector<double>> r(static_cast<size_t>(n), std::vector<double>(static_cast<size_t>(n), 0));
      for (Index t = 0; t < s.N; ++t) {
        if (t % o.block % o.query_stride != 0) continue;
        const std::vector<double> p = softmax(
            t, s.D, [&](Index i, Index d) { return mean_q[static_cast<size_t>(i * s.D + d)]; },
            [&](Index j, Index d) { return mean_k[static_cast<size_t>(j * s.D + d)]; });
        for (Index j = 0; j <= t; ++j) {
          double& x = r[static_cast<size_t>(t / o.block)][static_cast<size_t>(j / o.block)];
          x = std::max(x, p[static_cast<size_t>(j)]);
        }
      }
      for (Index h = g * heads; h < (g + 1) * heads; ++h) {
        // Step 3.
        std::vector<double> mass(static_cast<size_t>(n), 0);
        for (Index t = std::max<Index>(0, s.N - o.block); t < s.N; ++t) {
          const std::vector<double> p = softmax(
              t, s.D, [&](Index i, Index d) { return c.q_at(b, h, i, d); },
              [&](Index j, Index d) { return c.k_at(b, c.kv_head(h), j, d); });
          for (Index j = 0; j <= t; ++j) mass[static_cast<size_t>(j / o.block)] += p[static_cast<size_t>(j)];
        }
        std::sort(mass.begin(), mass.end(), std::greater<>());
        double total = 0, sum = 0;
        for (const double x : mass) total += x;
        Index count = 0;
        bool near = false;
        while (count < n && (sum / total < o.mass || o.mass >= 1)) {
          sum += mass[static_cast<size_t>(count++)];
          near = near || (o.mass < 1 && std::fabs(sum / total - o.mass) < 1e-5);
        }
        result.budgets.push_back(count);
        // Step 4.
        for (Index a = 0; a < n; ++a) {
          Index keep = (count * (a + 1) + n - 1) / n;
          keep = std::min(std::max(keep, (o.min_budget + o.block - 1) / o.block), a + 1);
          std::vector<Index> order;
          for (Index x = 0; x <= a; ++x) order.push_back(x);
          const std::vector<double>& row = r[static_cast<size_t>(a)];
          std::stable_sort(order.begin(), order.end(),
                           [&](Index x, Index y) { return row[static_cast<size_t>(x)] > row[static_cast<size_t>(y)]; });
          auto& chosen = result.blocks[static_cast<size_t>((b * s.Hq + h) * n + a)];
          chosen.insert(order.begin(), order.begin() + keep);
          chosen.insert(a);
          bool flips = near;
          if (keep <= a) {
            const double least = row[static_cast<size_t>(order[static_cast<size_t>(keep - 1)])];
            const double next = row[static_cast<size_t>(order[static_cast<size_t>(keep)])];
            flips = flips || (least - next < 1e-4 * least && least != next);
          }
          for (Index t = a * o.block; flips && t < std::min(s.N, (a + 1) * o.block); ++t)
            result.undecided[static_cast<size_t>((b * s.Hq + h) * s.N + t)] = 1;
        }
      }
    }
  return result;
}

Naive naive_proxy(const Case& c, const ProxyOptions& o, const ProxyChoice& choice) {
  Naive result = naive_attention(c, [&](Index b, Index h, Index t, Index j) {
    const auto& chosen = choice.blocks[static_cast<size_t>((b * c.size.Hq + h) * choice.n + t / o.block)];
    return j <= t && chosen.count(j / o.block) != 0;
  });
  result.undecided = choice.undecided;
  return result;
}

void check_proxy(const Case& c, const ProxyOptions& o, bool exact_ties = false) {
  const std::string call = o.call();
  CAPTURE(call);
  const ProxyChoice choice = choose(c, o);
  const Naive want = naive_proxy(c, o, choice);
  const Index undecided = exact_ties ? 0 : std::count(want.undecided.begin(), want.undecided.end(), 1);
  CHECK(undecided * 5 <= static_cast<Index>(want.undecided.size()));
  for (const std::string& isa : available_isas()) {
    const UseIsa use(isa);
    const Got got = run(call, c.input());
    CHECK_AGREES(got, want, c);
    if (undecided == 0) CHECK(got.stats.pairs == want.pairs);
  }
}

// The blocks that heed's plan gives to the query blocks of every head: [B · Hq · n].
std::vector<std::set<Index>> planned(const Case& c, const ProxyOptions& o) {
  const AttendInput in = c.input();
  const Plan plan = plan_of(MechanismCall::parse(o.call()), in);
  std::vector<std::set<Index>> blocks;
  walk(plan, [&](const RowBlock&, const std::vector<Tile>& tiles) {
    std::set<Index>& list = blocks.emplace_back();
    for (const Tile& tile : tiles)
      for (Index r = 0; r < tile.columns.count; ++r) list.insert(tile.columns[r] / o.block);
  });
  return blocks;
}

double normal(std::mt19937_64& random) {
  static std::normal_distribution<double> distribution;
  return distribution(random);
}

// A head h whose queries find `hot` tokens along one direction, the sharper the larger t_h.
Case hot_tokens(Index n, Index hq, Index hk, Index hot, double mean_t, double spread) {
  Case c({1, hq, hk, n, n, 64, 16});
  std::mt19937_64 random(9);
  std::vector<double> u(64);
  double length = 0;
  for (double& x : u) x = normal(random), length += x * x;
  for (double& x : u) x /= std::sqrt(length);
  std::set<Index> tokens;
  while (static_cast<Index>(tokens.size()) < hot) tokens.insert(static_cast<Index>(random() % static_cast<size_t>(n)));
  for (Index h = 0; h < hk; ++h)
    for (Index j = 0; j < n; ++j)
      for (Index d = 0; d < 64; ++d)
        c.k.set(0, h, j, d, normal(random) + (tokens.count(j) != 0 ? 9 * u[static_cast<size_t>(d)] : 0));
  for (Index h = 0; h < hq; ++h)
    for (Index t = 0; t < n; ++t)
      for (Index d = 0; d < 64; ++d) {
        const double t_h = mean_t + spread * (2.0 * static_cast<double>(h) / static_cast<double>(hq - 1) - 1);
        c.q.set(0, h, t, d, 0.8 * normal(random) + t_h * u[static_cast<size_t>(d)]);
      }
  return c;
}

}  // namespace

TEST_CASE("proxy-attn equals its equations") {
  for (const DType arithmetic : {DType::f32, DType::bf16}) {
    for (const Index n : {1, 15, 16, 17, 150}) check_proxy(Case({1, 4, 1, n, n, 33, 16}, DType::f32, arithmetic), {});
    check_proxy(Case({2, 4, 2, 203, 203, 64, 40}, DType::f32, arithmetic, Layout::scattered, 2, 1.5),
                {.mass = 0.4, .query_stride = 3});
    check_proxy(Case({1, 8, 4, 130, 130, 80, 16}, DType::f16, arithmetic, Layout::tokens, 3, 1.5),
                {.proxy_heads = 2, .mass = 0.5, .min_budget = 33});
    check_proxy(Case({1, 2, 2, 190, 190, 16, 24}, DType::bf16, arithmetic, Layout::packed, 4, 2),
                {.proxy_heads = 2, .mass = 0.7, .query_stride = 1, .block = 10});
  }
  check_proxy(Case({1, 1, 1, 300, 300, 256, 16}, DType::f32, DType::f32, Layout::reversed, 6, 0.5),
              {.mass = 0.3, .query_stride = 50, .block = 32});  // one query a block
  check_proxy(Case({1, 3, 1, 700, 700, 24, 16}), {.mass = 0.2, .query_stride = 8, .block = 64});
}

TEST_CASE("proxy-attn: of equal blocks the lower is taken") {
  Case c({1, 2, 1, 160, 160, 16, 16});
  for (Index j = 0; j < 160; ++j)
    for (Index d = 0; d < 16; ++d) c.k.set(0, 0, j, d, 0);  // all weights of a row are equal
  check_proxy(c, {.mass = 0.4, .query_stride = 1}, true);
  const auto blocks = planned(c, {.mass = 0.4, .query_stride = 1});
  CHECK(blocks[9] == std::set<Index>{0, 1, 2, 3, 9});
}

TEST_CASE("proxy-attn with all the mass, or all the budget, is dense") {
  for (const std::string& isa : available_isas()) {
    const UseIsa use(isa);
    const Case c({1, 4, 2, 333, 333, 32, 32});
    const Naive dense = naive_attention(c, dense_sees(c, true));
    for (const ProxyOptions& o : {ProxyOptions{.mass = 1, .min_budget = 333}, ProxyOptions{.mass = 1},
                                  ProxyOptions{.mass = 0.1, .min_budget = 5000}}) {
      const Got got = run(o.call(), c.input());
      const std::string differs = difference(got, dense, c, 1e-5);
      CHECK_MESSAGE(differs.empty(), differs);
      CHECK(got.stats.pairs == dense.pairs);
    }
    CHECK_AGREES(run("proxy-attn", c.input()), dense, c);  // the default budget is longer
  }
}

TEST_CASE("proxy-attn: equal heads have the same masks with one proxy as with one each") {
  Case c({1, 4, 4, 240, 240, 32, 16}, DType::f32, DType::f32, Layout::packed, 1, 1.5);
  for (Index h = 1; h < 4; ++h)
    for (Index t = 0; t < 240; ++t)
      for (Index d = 0; d < 32; ++d) c.q.set(0, h, t, d, c.q.get(0, 0, t, d)), c.k.set(0, h, t, d, c.k.get(0, 0, t, d));
  const auto one = planned(c, {.proxy_heads = 1}), each = planned(c, {.proxy_heads = 4});
  CHECK(one == each);
  CHECK(one[14].size() < 15);
}

TEST_CASE("proxy-attn: heads of a group have nested masks, and more mass never removes a block") {
  const Case c = hot_tokens(512, 8, 2, 12, 6, 4);
  std::vector<std::set<Index>> before;
  for (const double mass : {0.3, 0.6, 0.9, 0.99, 1.0}) {
    const ProxyOptions o{.mass = mass, .block = 32};
    const auto blocks = planned(c, o);
    for (Index h = 0; h < 8; ++h)
      for (Index other = 0; other < 8; ++other)
        for (size_t a = 0; a < 16; ++a) {
          const auto &x = blocks[static_cast<size_t>(h) * 16 + a], &y = blocks[static_cast<size_t>(other) * 16 + a];
          if (x.size() <= y.size()) CHECK(std::includes(y.begin(), y.end(), x.begin(), x.end()));
        }
    for (size_t i = 0; i < before.size(); ++i)
      CHECK(std::includes(blocks[i].begin(), blocks[i].end(), before[i].begin(), before[i].end()));
    before = blocks;
  }
}

TEST_CASE("proxy-attn: a one-hot head takes the least, a uniform one its share of all blocks") {
  Case c({1, 2, 2, 1024, 1024, 16, 16});
  for (Index t = 0; t < 1024; ++t)
    for (Index d = 0; d < 16; ++d) {
      c.k.set(0, 1, t, d, 0);  // head 1 sees every key alike
      c.k.set(0, 0, t, d, d == 0 && t == 5 ? 50 : 0), c.q.set(0, 0, t, d, d == 0 ? 50 : 0);
    }
  const auto blocks = planned(c, {.proxy_heads = 2, .mass = 0.75, .min_budget = 64, .block = 32});
  CHECK(blocks[31].size() == 2 + 1);  // 64 tokens and the diagonal
  CHECK(blocks[31].count(0) == 1);
  CHECK(std::abs(static_cast<Index>(blocks[63].size()) - 24) <= 1);  // 0.75 · 32; the diagonal on top
}

TEST_CASE("proxy-attn finds hot tokens that a mean key hides: the sheet's synthetic experiment") {
  // N = 4096, 8 heads on 2, 24 hot tokens, blocks of 64. Mass of the last query block that lies in the 20 (13) best
  // blocks by the proxy, by the mean of block keys, and by the heads themselves.
  const Case c = hot_tokens(4096, 8, 2, 24, 8.2, 4.2);
  const Index n = 64;
  const auto coverage = [&](const std::vector<double>& score, Index h, Index keep) {
    std::vector<double> mass(static_cast<size_t>(n), 0);
    for (Index t = 4095; t >= 4032; t -= 9) {
      const std::vector<double> p = softmax(
          t, 64, [&](Index i, Index d) { return c.q.get(0, h, i, d); },
          [&](Index j, Index d) { return c.k.get(0, c.kv_head(h), j, d); });
      for (size_t j = 0; j < p.size(); ++j) mass[j / 64] += p[j] / 8;
    }
    std::vector<Index> order(static_cast<size_t>(n));
    for (Index b = 0; b < n; ++b) order[static_cast<size_t>(b)] = b;
    const std::vector<double>& by = score.empty() ? mass : score;
    std::stable_sort(order.begin(), order.end(),
                     [&](Index x, Index y) { return by[static_cast<size_t>(x)] > by[static_cast<size_t>(y)]; });
    double sum = 0;
    for (Index i = 0; i < keep; ++i) sum += mass[static_cast<size_t>(order[static_cast<size_t>(i)])];
    return sum;
  };
  // heed's ranking as its plan shows it: 20 of 64 blocks for every head when `min_budget` alone decides.
  for (const auto& [keep, least_gain, of_oracle] : {std::tuple{Index{20}, 0.12, 0.93}, {Index{13}, 0.1, 0.9}}) {
    const auto blocks = planned(c, {.mass = 1e-6, .min_budget = keep * 64, .block = 64});
    double proxy = 0, oracle = 0, pooled = 0;
    for (Index h = 0; h < 8; ++h) {
      std::vector<double> score(static_cast<size_t>(n), 0), mean(static_cast<size_t>(n), 0);
      for (const Index b : blocks[static_cast<size_t>(h * n + 63)]) score[static_cast<size_t>(b)] = 1;
      for (Index b = 0; b < n; ++b)
        for (Index d = 0; d < 64; ++d) {
          double q = 0, k = 0;
          for (Index i = 0; i < 64; ++i)
            q += c.q.get(0, h, 4032 + i, d) / 64, k += c.k.get(0, c.kv_head(h), b * 64 + i, d) / 64;
          mean[static_cast<size_t>(b)] += q * k;
        }
      proxy += coverage(score, h, keep) / 8, oracle += coverage({}, h, keep) / 8, pooled += coverage(mean, h, keep) / 8;
    }
    CAPTURE(keep);
    CAPTURE(proxy);
    CAPTURE(oracle);
    CAPTURE(pooled);
    CHECK(proxy >= of_oracle * oracle);
    CHECK(proxy - pooled >= least_gain);
  }
  // Budgets at 0.95: 59 of 64 blocks for t = 4, 15 for t = 12.4, by the sheet.
  const auto blocks = planned(c, {.mass = 0.95, .block = 64});
  CHECK(std::abs(static_cast<Index>(blocks[63].size()) - 59) <= 4);
  CHECK(std::abs(static_cast<Index>(blocks[7 * 64 + 63].size()) - 16) <= 5);
}

TEST_CASE("proxy-attn is causal by blocks of queries, given the budgets; values are causal by tokens") {
  // Budgets look at the last queries by definition, so they are pinned here.
  const ProxyOptions o{.mass = 1e-6, .min_budget = 48};
  const Case c({1, 4, 2, 200, 200, 16, 16});
  const Got before = run(o.call(), c.input());
  const auto differing = [&](const Got& after, Index end) {
    Index count = 0;
    for (Index h = 0; h < 4; ++h)
      for (Index t = 0; t < end; ++t) {
        const size_t row = static_cast<size_t>(h * 200 + t);
        count +=
            std::memcmp(&before.o[row * 16], &after.o[row * 16], 64) != 0 || before.lse[row] != after.lse[row] ? 1 : 0;
      }
    return count;
  };
  for (const Index end : {16, 96, 176}) {
    Case changed = c;
    for (Index t = end; t < 200; ++t)
      for (Index d = 0; d < 16; ++d) {
        for (Index h = 0; h < 4; ++h) changed.q.set(0, h, t, d, -3);
        for (Index h = 0; h < 2; ++h) changed.k.set(0, h, t, d, 4), changed.v.set(0, h, t, d, 500);
      }
    CHECK(differing(run(o.call(), changed.input()), end) == 0);
    CHECK(differing(run(o.call(), changed.input()), 200) > 0);
  }
  for (const Index t : {3, 100, 185}) {
    Case changed = c;
    for (Index j = t + 1; j < 200; ++j)
      for (Index h = 0; h < 2; ++h) changed.v.set(0, h, j, 3, 500);
    CHECK(differing(run(o.call(), changed.input()), t + 1) == 0);
  }
}

TEST_CASE("proxy-attn: the same bits for any number of threads, and the pairs that its plan promises") {
  for (const std::string& isa : available_isas()) {
    const UseIsa use(isa);
    const Case c({2, 4, 2, 600, 600, 16, 16});
    const ProxyOptions o{.mass = 0.5, .block = 32};
    Got first;
    for (const int n : {1, 2, 3}) {
      const UseThreads threads(n);
      const Got got = run(o.call(), c.input());
      if (n == 1) first = got;
      CHECK(same_bits(got.o, first.o));
      CHECK(same_bits(got.lse, first.lse));
    }
    Index pairs = 0;
    const auto blocks = planned(c, o);
    for (size_t i = 0; i < blocks.size(); ++i)
      for (const Index b : blocks[i]) {
        const Index a = static_cast<Index>(i) % 19, rows = std::min<Index>(32, 600 - a * 32);
        pairs += b == a ? rows * (rows + 1) / 2 : rows * 32;
      }
    CHECK(first.stats.pairs == pairs);
    CHECK(first.stats.tiles_visited == first.stats.tiles_planned);
  }
}

TEST_CASE("proxy-attn refuses what it cannot mean") {
  const Case c({1, 4, 4, 8, 8, 16, 16});
  const auto refuse = [&](const std::string& params, const std::string& line) {
    CHECK_FAILS(run("proxy-attn:" + params, c.input()), UsageError, "proxy-attn: " + line);
  };
  refuse("proxy_heads=3", "proxy_heads = 3, expected a divisor of the 4 heads of k");
  refuse("proxy_heads=8", "proxy_heads = 8, expected a divisor of the 4 heads of k");
  refuse("proxy_heads=0", "proxy_heads = 0, expected >= 1");
  refuse("query_stride=0", "query_stride = 0, expected >= 1");
  refuse("mass=0", "mass = 0, expected above 0 and at most 1");
  refuse("mass=1.5", "mass = 1.5, expected above 0 and at most 1");
  refuse("min_budget=-1", "min_budget = -1, expected >= 0");
  refuse("block=0", "block = 0, expected >= 1");
  CHECK_FAILS(run("proxy-attn", Case({1, 1, 1, 8, 9, 16, 16}).input()), Error,
              "proxy-attn: 8 queries and 9 keys, expected as many of one as of the other");
  CHECK_FAILS(run("proxy-attn", Case({1, 1, 1, 1, 9, 16, 16}).input()), Error,
              "proxy-attn: 1 queries and 9 keys, expected as many of one as of the other");
}
