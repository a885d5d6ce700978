// seer-attention against its equations: pooled queries and keys through a gate, or block maxima of the attention
// itself, choose blocks; decoding steps choose them by bounds.
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <random>

#include "heed/kernel/kernels.h"
#include "support/naive.h"

using namespace heed;
using namespace heed::test;

namespace {

struct SeerOptions {
  Index block = 16;
  double threshold = 0, density = 0;  // 0: not given
  bool last_block_dense = true;
  double rope_base = 0;
  bool oracle = false;
  std::string call() const {
    std::string text = fmt::format("seer-attention:block={},threshold={},last_block_dense={},rope_base={},oracle={}",
                                   block, threshold, last_block_dense, rope_base, oracle);
    return density > 0 ? text + fmt::format(",density={}", density) : text;
  }
};

// The gate's tensors. G = 0: wk [Hq, 3D, D] alone.
struct Weights {
  Index heads = 0, width = 0, d = 0;
  std::vector<float> wk, wq;
  std::shared_ptr<Case> before_rope;  // holds gate_q and gate_k as q and k, or none

  Weights(const Sizes& s, Index g, std::uint64_t seed = 7)
      : heads(g == 0 ? s.Hq : s.Hk), width(g == 0 ? s.D : g), d(s.D) {
    std::mt19937_64 random(seed);
    std::normal_distribution<float> normal;
    wk.resize(static_cast<size_t>(heads * 3 * d * width));
    if (g > 0) wq.resize(static_cast<size_t>(s.Hq * d * g));
    const float amplitude = 2 / std::sqrt(static_cast<float>(d));
    for (auto* w : {&wk, &wq})
      for (float& x : *w) x = amplitude * normal(random);
  }
  AttendInput input(const Case& c) const {
    AttendInput in = c.input();
    in.extra["wk"] = {wk.data(), DType::f32, {heads, 3 * d, width}};
    if (!wq.empty()) in.extra["wq"] = {wq.data(), DType::f32, {c.size.Hq, d, width}};
    if (before_rope) in.extra["gate_q"] = before_rope->q.view(), in.extra["gate_k"] = before_rope->k.view();
    return in;
  }
};

std::vector<double> turned(std::vector<double> x, Index position, double base) {
  if (base == 0) return x;
  const size_t half = x.size() / 2;
  for (size_t i = 0; i < half; ++i) {
    const double angle =
        static_cast<double>(position) / std::pow(base, static_cast<double>(i) / static_cast<double>(half));
    const double a = x[i], b = x[i + half];
    x[i] = a * std::cos(angle) - b * std::sin(angle), x[i + half] = b * std::cos(angle) + a * std::sin(angle);
  }
  return x;
}

// Logits of query block a against key block b by the gate.
double gate_logit(const Case& c, const Weights& w, const SeerOptions& o, Index b, Index h, Index qa, Index kb) {
  const Case& from = w.before_rope ? *w.before_rope : c;
  const auto mean = [&](Index block, const std::function<double(Index)>& at) {
    double sum = 0;
    const Index end = std::min(c.size.N, (block + 1) * o.block);
    for (Index t = block * o.block; t < end; ++t) sum += at(t);
    return sum / static_cast<double>(end - block * o.block);
  };
  std::vector<double> q, k, qg(static_cast<size_t>(w.width), 0), kg(qg);
  for (Index d = 0; d < w.d; ++d) q.push_back(mean(qa, [&](Index t) { return from.q_at(b, h, t, d); }));
  for (const int pool : {0, 1, 2})
    for (Index d = 0; d < w.d; ++d) {
      double most = -INFINITY, least = INFINITY;
      for (Index t = kb * o.block; t < std::min(c.size.N, (kb + 1) * o.block); ++t) {
        most = std::max(most, from.k_at(b, c.kv_head(h), t, d)),
        least = std::min(least, from.k_at(b, c.kv_head(h), t, d));
      }
      const double average = mean(kb, [&](Index t) { return from.k_at(b, c.kv_head(h), t, d); });
      k.push_back(pool == 0 ? most : pool == 1 ? least : average);
    }
  const Index head = w.wq.empty() ? h : c.kv_head(h);
  for (Index g = 0; g < w.width; ++g) {
    for (Index i = 0; i < 3 * w.d; ++i)
      kg[static_cast<size_t>(g)] += k[static_cast<size_t>(i)] *
                                    static_cast<double>(w.wk[static_cast<size_t>((head * 3 * w.d + i) * w.width + g)]);
    for (Index i = 0; i < w.d && !w.wq.empty(); ++i)
      qg[static_cast<size_t>(g)] +=
          q[static_cast<size_t>(i)] * static_cast<double>(w.wq[static_cast<size_t>((h * w.d + i) * w.width + g)]);
  }
  if (w.wq.empty()) qg = q;
  qg = turned(qg, qa * o.block, o.rope_base), kg = turned(kg, kb * o.block, o.rope_base);
  double x = 0;
  for (size_t g = 0; g < qg.size(); ++g) x += qg[g] * kg[g];
  return x / std::sqrt(static_cast<double>(w.width));
}

// Row a of the map that chooses: the gate's softmax, or T divided by its sum.
std::vector<double> map_row(const Case& c, const Weights* w, const SeerOptions& o, Index b, Index h, Index a) {
  std::vector<double> row;
  if (w != nullptr) {
    for (Index kb = 0; kb <= a; ++kb) row.push_back(std::exp(gate_logit(c, *w, o, b, h, a, kb)));
  } else {
    row.assign(static_cast<size_t>(a + 1), 0);
    for (Index t = a * o.block; t < std::min(c.size.N, (a + 1) * o.block); ++t) {
      std::vector<double> p;
      double sum = 0;
      for (Index j = 0; j <= t; ++j) {
        double x = 0;
        for (Index d = 0; d < c.size.D; ++d) x += c.q_at(b, h, t, d) * c.k_at(b, c.kv_head(h), j, d);
        p.push_back(std::exp(x / std::sqrt(static_cast<double>(c.size.D)))), sum += p.back();
      }
      for (size_t j = 0; j < p.size(); ++j) {
        double& most = row[j / static_cast<size_t>(o.block)];
        most = std::max(most, p[j] / sum);
      }
    }
  }
  double sum = 0;
  for (const double x : row) sum += x;
  for (double& x : row) x /= sum;
  return row;
}

// Gets wk alone or with wq, both wide and narrow; no weights: the oracle.
void check_seer(const Case& c, const Weights* w, SeerOptions o) {
  o.oracle = w == nullptr;
  const std::string call = o.call();
  CAPTURE(call);
  const auto& s = c.size;
  const Index n = (s.N + o.block - 1) / o.block;
  std::vector<std::vector<char>> chosen;  // [B · Hq · n][blocks]
  std::vector<char> undecided(static_cast<size_t>(s.B * s.Hq * s.N), 0);
  for (Index b = 0; b < s.B; ++b)
    for (Index h = 0; h < s.Hq; ++h)
      for (Index a = 0; a < n; ++a) {
        std::vector<double> row = map_row(c, w, o, b, h, a);
        std::vector<char>& list = chosen.emplace_back(static_cast<size_t>(n), 0);
        bool near = false;
        if (o.density > 0) {
          const double r = 1 - std::sqrt(1 - o.density);
          const Index k = std::max<Index>(1, static_cast<Index>(std::floor(r * static_cast<double>(n) + 1e-9)));
          std::vector<double> sorted = row;
          std::sort(sorted.begin(), sorted.end(), std::greater<>());
          if (k <= a) {
            const double least = sorted[static_cast<size_t>(k - 1)], next = sorted[static_cast<size_t>(k)];
            near = least - next < 1e-4 * least;
            for (Index x = 0; x <= a; ++x) list[static_cast<size_t>(x)] = row[static_cast<size_t>(x)] >= least;
          } else {
            std::fill_n(list.begin(), a + 1, 1);
          }
        } else {
          for (Index x = 0; x <= a; ++x) {
            list[static_cast<size_t>(x)] = row[static_cast<size_t>(x)] > o.threshold;
            near = near || std::fabs(row[static_cast<size_t>(x)] - o.threshold) < 1e-4 * o.threshold;
          }
        }
        list[static_cast<size_t>(a)] = 1;
        if (o.last_block_dense && a >= n - 2) std::fill_n(list.begin(), a + 1, 1);
        else
          for (Index t = a * o.block; near && t < std::min(s.N, (a + 1) * o.block); ++t)
            undecided[static_cast<size_t>((b * s.Hq + h) * s.N + t)] = 1;
      }
  Naive want = naive_attention(c, [&](Index b, Index h, Index t, Index j) {
    return j <= t &&
           chosen[static_cast<size_t>((b * s.Hq + h) * n + t / o.block)][static_cast<size_t>(j / o.block)] != 0;
  });
  want.undecided = undecided;
  const Index unjudged = std::count(undecided.begin(), undecided.end(), 1);
  CHECK(unjudged * 5 <= static_cast<Index>(undecided.size()));
  for (const std::string& isa : available_isas()) {
    const UseIsa use(isa);
    const Got got = run(call, w != nullptr ? w->input(c) : c.input());
    CHECK_AGREES(got, want, c);
    if (unjudged == 0) CHECK(got.stats.pairs == want.pairs);
  }
}

}  // namespace

TEST_CASE("seer-attention equals its equations") {
  for (const DType arithmetic : {DType::f32, DType::bf16}) {
    for (const Index n : {1, 15, 16, 17, 150}) {
      const Case c({1, 4, 1, n, n, 32, 16}, DType::f32, arithmetic);
      const Weights own(c.size, 0), pair(c.size, 24);
      check_seer(c, &own, {.threshold = 0.1});
      check_seer(c, &pair, {.density = 0.4});
    }
    const Case c({2, 4, 2, 203, 203, 64, 40}, DType::f32, arithmetic, Layout::scattered, 2);
    for (const Index g : {0, 24, 128}) {
      const Weights w(c.size, g);
      check_seer(c, &w, {.threshold = 0.05, .last_block_dense = false, .rope_base = 10000});
      check_seer(c, &w, {.block = 20, .density = 0.3, .rope_base = 500});
    }
  }
  const Case wide({1, 8, 1, 260, 260, 128, 16}, DType::bf16, DType::bf16, Layout::tokens);
  const Weights w(wide.size, 0);
  check_seer(wide, &w, {.block = 64, .density = 0.5, .last_block_dense = false, .rope_base = 10000});
  const Case odd({1, 2, 2, 130, 130, 33, 24}, DType::f16, DType::f32, Layout::reversed);
  const Weights o(odd.size, 7);
  check_seer(odd, &o, {.threshold = 0.08});
}

TEST_CASE("seer-attention's gate sees what stands before RoPE where it is given") {
  const Case c({1, 4, 2, 150, 150, 32, 16});
  for (const Index g : {0, 16}) {
    Weights w(c.size, g);
    w.before_rope = std::make_shared<Case>(c.size, DType::bf16, DType::f32, Layout::scattered, 77);
    check_seer(c, &w, {.density = 0.5, .last_block_dense = false, .rope_base = 10000});
  }
}

TEST_CASE("seer-attention's oracle chooses by the attention's own block maxima") {
  for (const DType arithmetic : {DType::f32, DType::bf16}) {
    for (const Index n : {1, 16, 97, 300}) {
      const Case c({1, 4, 2, n, n, 24, 16}, DType::f32, arithmetic, Layout::packed, 5, 2);
      check_seer(c, nullptr, {.threshold = 0.05});
      check_seer(c, nullptr, {.density = 0.3, .last_block_dense = false});
    }
    check_seer(Case({2, 2, 1, 330, 330, 64, 16}, DType::f16, arithmetic), nullptr, {.block = 64, .density = 0.6});
  }
}

TEST_CASE("seer-attention with no threshold, or the whole density, is dense") {
  const Case c({1, 4, 2, 333, 333, 32, 32});
  const Weights w(c.size, 0);
  const Naive dense = naive_attention(c, dense_sees(c, true));
  for (const SeerOptions& o :
       {SeerOptions{}, SeerOptions{.threshold = 0.9, .density = 1}, SeerOptions{.block = 5000, .threshold = 0.9}}) {
    const Got got = run(o.call(), w.input(c));
    const std::string differs = difference(got, dense, c, 1e-5);
    CHECK_MESSAGE(differs.empty(), differs);
    CHECK(got.stats.pairs == dense.pairs);
  }
}

TEST_CASE("seer-attention: a row that selects nothing sees its own block") {
  const Case c({1, 2, 1, 160, 160, 16, 16});
  const Weights w(c.size, 0);
  check_seer(c, &w, {.threshold = 1, .last_block_dense = false});
}

TEST_CASE("seer-attention: density means what it says at N = 8192") {
  const Case c({1, 1, 1, 8192, 8192, 16, 16});
  const Weights w(c.size, 0);
  for (const double density : {0.1, 0.2, 0.5}) {
    const auto in = w.input(c);
    const Plan plan =
        plan_of(MechanismCall::parse(fmt::format("seer-attention:density={},last_block_dense=false", density)), in);
    Index pairs = 0;
    walk(plan, [&](const RowBlock& rows, const std::vector<Tile>& tiles) {
      for (const Tile& tile : tiles) pairs += rows.rows * tile.columns.count;
    });
    // In blocks, as the sheet counts: the k best of a + 1; our diagonal adds one where it was not among them.
    const double blocks = static_cast<double>(pairs) / 64 / 64, all = 128 * 129 / 2;
    CAPTURE(density);
    CHECK(blocks / all > density - 1.0 / 128);
    CHECK(blocks / all < density + 2.0 / 128);
  }
}

TEST_CASE("seer-attention is causal by blocks of queries; values are causal by tokens") {
  const Case c({1, 4, 2, 200, 200, 16, 16});
  const Weights w(c.size, 8);
  for (const bool oracle : {false, true}) {
    // Where the last two blocks are dense, and how many a row keeps, depends on N alone.
    const std::string call = SeerOptions{.density = 0.3, .rope_base = 100, .oracle = oracle}.call();
    const Got before = run(call, w.input(c));
    const auto differing = [&](const Got& after, Index end) {
      Index count = 0;
      for (Index h = 0; h < 4; ++h)
        for (Index t = 0; t < end; ++t) {
          const size_t row = static_cast<size_t>(h * 200 + t);
          count += std::memcmp(&before.o[row * 16], &after.o[row * 16], 64) != 0 || before.lse[row] != after.lse[row]
                       ? 1
                       : 0;
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
      CHECK(differing(run(call, w.input(changed)), end) == 0);
      CHECK(differing(run(call, w.input(changed)), 200) > 0);
    }
    for (const Index t : {3, 100, 185}) {
      Case changed = c;
      for (Index j = t + 1; j < 200; ++j)
        for (Index h = 0; h < 2; ++h) changed.v.set(0, h, j, 3, 500);
      CHECK(differing(run(call, w.input(changed)), t + 1) == 0);
    }
  }
}

TEST_CASE("seer-attention: the same bits for any number of threads, gate, oracle and decoding") {
  for (const std::string& isa : available_isas()) {
    const UseIsa use(isa);
    const Case c({2, 4, 2, 600, 600, 16, 16}), few({1, 4, 2, 200, 200, 16, 16}), step({1, 4, 2, 1, 5000, 16, 16});
    const Weights w(c.size, 8);
    Got first[4];
    for (const int n : {1, 2, 3}) {
      const UseThreads threads(n);
      const Got got[] = {run("seer-attention:block=32,density=0.3", w.input(c)),
                         run("seer-attention:block=32,density=0.3,oracle=true", c.input()),
                         run("seer-attention:block=16,threshold=0.1,rope_base=100", Weights(few.size, 8).input(few)),
                         run("seer-attention:block=32,decode_budget=256", step.input())};
      for (size_t i = 0; i < 4; ++i) {
        if (n == 1) first[i] = got[i];
        CHECK(same_bits(got[i].o, first[i].o));
        CHECK(same_bits(got[i].lse, first[i].lse));
        CHECK(got[i].stats.tiles_visited == got[i].stats.tiles_planned);
      }
    }
  }
}

TEST_CASE("seer-attention refuses what it cannot mean") {
  // Any block length is supported, so the sheet's set of lengths has no error.
  const Case c({1, 4, 2, 40, 40, 16, 16});
  const Weights w(c.size, 0), pair(c.size, 7);
  const auto refuse = [&](const std::string& params, const AttendInput& in, const std::string& line) {
    CHECK_FAILS(run("seer-attention:" + params, in), UsageError, "seer-attention: " + line);
  };
  refuse("block=0", w.input(c), "block = 0, expected >= 1");
  refuse("threshold=-1", w.input(c), "threshold = -1, expected 0 … 1");
  refuse("density=0", w.input(c), "density = 0, expected above 0 and at most 1");
  refuse("density=1.1", w.input(c), "density = 1.1, expected above 0 and at most 1");
  refuse("rope_base=100", pair.input(c), "rope_base = 100, expected 0 where the gate's width 7 is odd");
  refuse("decode_budget=63", w.input(c), "decode_budget = 63, expected 0 (dense) or at least block = 64");

  const std::string missing =
      "seer-attention: tensor wk is missing, expected a trained gate (on a model: a calibration) or oracle = true";
  CHECK_FAILS(run("seer-attention", c.input()), Error, missing);
  CHECK_FAILS(run("seer-attention:density=0.5", c.input()), Error, missing);
  AttendInput in = pair.input(c);
  in.extra.erase("wk");
  CHECK_FAILS(run("seer-attention:density=0.5", in), Error, missing);
  in = pair.input(c);
  in.extra.erase("wq");
  CHECK_FAILS(run("seer-attention", in), Error,
              "wk: shape = [2, 48, 7], expected [4, 48, 16]: [Hq, 3D, D] where there is no wq");
  in = w.input(c);
  in.extra["wq"] = pair.input(c).extra["wq"];
  CHECK_FAILS(run("seer-attention", in), Error,
              "wk: shape = [4, 48, 16], expected [2, 48, 7]: [Hk, 3D, G], G as wq has it");
  in = pair.input(c);
  in.extra["wq"].shape[1] = 15;
  CHECK_FAILS(run("seer-attention", in), Error, "wq: shape = [4, 15, 7], expected [Hq, D, *]");
  in = w.input(c);
  in.extra["wk"].shape[0] = 3;
  CHECK_FAILS(run("seer-attention", in), Error, "wk: shape = [3, 48, 16], expected [Hq|Hk, *, *]");

  CHECK_FAILS(run("seer-attention", Case({1, 1, 1, 8, 9, 16, 16}).input()), Error,
              "seer-attention: 8 queries and 9 keys, expected as many of one as of the other");
  CHECK_FAILS(run("seer-attention:decode_budget=64", Case({1, 1, 1, 2, 9, 16, 16}).input()), Error,
              "seer-attention: 2 queries and 9 keys, expected as many of one as of the other");
  CHECK_FAILS(run("seer-attention", Case({1, 1, 1, 1, 9, 16, 16}).input()), Error,  // decoding is dense: not its affair
              "seer-attention: 1 queries and 9 keys, expected as many of one as of the other");
}
