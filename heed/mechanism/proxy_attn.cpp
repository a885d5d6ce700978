// ProxyAttn: the mean of a group's heads ranks the blocks of keys for all of them; each head takes as many of the best
// as its last queries say it needs.
// "ProxyAttn: Guided Sparse Attention via Representative Heads", arXiv:2509.24745.

#include <algorithm>
#include <memory>
#include <numeric>

#include "heed/base/threads.h"
#include "heed/mechanism/proxy_heads.h"
#include "heed/mechanism/registry.h"
#include "heed/plan/block_scores.h"
#include "heed/plan/block_tiles.h"

namespace heed::mechanism {
namespace {

constexpr Index lanes = 16;  // room that block scores want beyond the last block

// Step 3: how many of all blocks hold `mass` of what the last min(block, N) queries of each query head [B · Hq] attend
// to. The fewest whose cumulative share reaches it; a mass of 1 takes every block, however little it has.
std::vector<Index> budgets_of(const Inputs& in, Index block, double mass) {
  const Problem& p = in.problem;
  const Index n = ceil_div(p.N, block), rows = std::min(block, p.N);
  std::vector<Index> budgets(static_cast<size_t>(p.B * p.Hq), n);
  if (mass >= 1) return budgets;
  parallel_for(p.B * p.Hq, [&](Index head, int) {
    const RowBlock last{
        .b = head / p.Hq, .kv_head = head % p.Hq / p.group(), .head = head % p.Hq, .first = p.N - rows, .rows = rows};
    std::vector<float> share(static_cast<size_t>(round_up(n, lanes)), 0.0f);
    const BlockScores scores{ScoreKeys::of(*in.kv, last.b * p.Hk + last.kv_head), in.rule.scale, block};
    scores.weigh(in.q, last, 1, true, nullptr, share.data(), thread_scratch());
    share.resize(static_cast<size_t>(n));
    std::sort(share.begin(), share.end(), std::greater<>());
    const double wanted = mass * std::accumulate(share.begin(), share.end(), 0.0);
    double sum = 0;
    Index count = 0;
    while (count < n && sum < wanted) sum += static_cast<double>(share[static_cast<size_t>(count++)]);
    budgets[static_cast<size_t>(head)] = count;
  });
  return budgets;
}

// The best blocks of every (batch, proxy head, query block), best first: as many as some head takes, none where each
// takes everything.
using Rankings = std::vector<std::vector<std::int32_t>>;

// Ranking takes P·N²/(2·stride)·D multiply-adds for all heads, budgets 2·Hq·block·N·D.
Plan plan_proxy_attn(const Params& p, const Inputs& in) {
  const Problem problem = in.problem;
  const Index block = p.integer("block"), stride = p.integer("query_stride"), groups = p.integer("proxy_heads");
  if (problem.Hk % groups != 0)
    fail_usage("proxy-attn: proxy_heads = {}, expected a divisor of the {} heads of k", groups, problem.Hk);
  const Index n = ceil_div(problem.N, block), least = ceil_div(p.integer("min_budget"), block);
  const Index heads = problem.Hq / groups, kv_heads = problem.Hk / groups;  // of a group

  Plan plan = make_plan(problem, in.q, *in.kv, in.rule, Lanes::per_query_head);  // every head has its own budget
  plan.cut_rows_every(block);

  const auto budgets = std::make_shared<std::vector<Index>>(
      least >= n ? std::vector<Index>(static_cast<size_t>(problem.B * problem.Hq), n)
                 : budgets_of(in, block, p.number("mass")));
  // Step 4: c of n blocks become the same share of the a + 1 blocks that query block a may see.
  const auto kept = [=, budgets = budgets.get()](Index b, Index head, Index a) {
    const Index share = ceil_div((*budgets)[static_cast<size_t>(b * problem.Hq + head)] * (a + 1), n);
    return std::min(std::max(share, least), a + 1);
  };

  const auto rankings = std::make_shared<Rankings>(static_cast<size_t>(problem.B * groups * n));
  for (Index b = 0; b < problem.B; ++b)
    for (Index g = 0; g < groups; ++g) {
      // The longest list that any of the heads takes of less than all.
      const auto longest = [&](Index a) {
        Index most = 0;
        for (Index head = g * heads; head < (g + 1) * heads; ++head)
          if (const Index count = kept(b, head, a); count <= a) most = std::max(most, count);
        return most;
      };
      if (longest(n - 1) == 0) continue;  // then every head takes everything everywhere
      // Step 1. RoPE is linear, so means of turned keys are turned means.
      const std::vector<float> mean = mean_head_panels(*in.kv, b * problem.Hk + g * kv_heads, kv_heads);
      const BlockScores scores{ScoreKeys::of(mean.data(), problem.D, problem.M), in.rule.scale, block};
      parallel_for(n, [&](Index unit, int) {
        const Index a = n - 1 - unit, most = longest(a), d = problem.D;  // the longest rows go first
        if (most == 0) return;
        // Step 2. Windows of `stride` queries start anew in each block, so that none goes without one.
        Scratch& scratch = thread_scratch();
        const Scratch::Mark mark(scratch);
        const Index rows = ceil_div(std::min(block, problem.N - a * block), stride);
        const auto q = scratch.take<float>(rows * d);
        const auto ends = scratch.take<std::int32_t>(rows);
        for (Index i = 0; i < rows; ++i) {
          const Index token = a * block + i * stride;
          ends[static_cast<size_t>(i)] = static_cast<std::int32_t>(token + 1);
          mean_query(in.q, b, g * heads, heads, token, q.data() + i * d);
        }
        const auto largest = scratch.take<float>(round_up(a + 1, lanes));
        std::fill(largest.begin(), largest.end(), 0.0f);
        scores.weigh(q.data(), rows, ends.data(), largest.data(), nullptr, scratch);

        std::vector<std::int32_t> order(static_cast<size_t>(a + 1));
        std::iota(order.begin(), order.end(), 0);
        std::partial_sort(order.begin(), order.begin() + most, order.end(), [&](std::int32_t x, std::int32_t y) {
          const float rx = largest[static_cast<size_t>(x)], ry = largest[static_cast<size_t>(y)];
          return rx > ry || (rx == ry && x < y);
        });
        order.resize(static_cast<size_t>(most));
        order.shrink_to_fit();
        (*rankings)[static_cast<size_t>((b * groups + g) * n + a)] = std::move(order);
      });
    }
  plan.keep = {budgets, rankings};

  plan.emit = [=, rankings = rankings.get()](const RowBlock& rows, Tiles& tiles) {
    const Index a = rows.first / block, count = kept(rows.b, rows.head, a);
    if (count > a) {
      tiles.add(Set::range(0, rows.rows), Set::range(0, rows.position(rows.rows - 1) + 1), Mask::causal());
      return;
    }
    // Heads of a group take longer or shorter beginnings of one ranking. A row must see itself: the diagonal is added.
    const auto& order = (*rankings)[static_cast<size_t>((rows.b * groups + rows.head / heads) * n + a)];
    auto chosen = tiles.take<std::int32_t>(count + 1);
    std::copy_n(order.begin(), count, chosen.begin());
    chosen.back() = static_cast<std::int32_t>(a);
    std::sort(chosen.begin(), chosen.end());
    const auto last = std::unique(chosen.begin(), chosen.end());
    add_past_blocks(tiles, rows, chosen.first(static_cast<size_t>(last - chosen.begin())), block);
  };
  return plan;
}

}  // namespace

const Mechanism& proxy_attn() {
  static const Mechanism m{
      .name = "proxy-attn",
      .title = "ProxyAttn: block selection by representative heads",
      .paper = "arXiv:2509.24745",
      .year = 2025,
      .stage = "summarize (heads), select, attend",
      .training = Training::none,
      .idea =
          "Instead of pooling tokens to guess which blocks of keys matter, pool heads: one proxy head, the mean of a\n"
          "group's queries and keys, is scored token by token and ranks the blocks for the whole group. How many of\n"
          "them a head takes is its own affair: as many as hold `mass` of what its last queries attend to. For\n"
          "reading a prompt; decoding is dense.",
      .equations =
          "A_g = causal softmax of scale·<mean of q, mean of k> over the heads of group g, every query_stride-th "
          "query\n"
          "R_g[a,b] = max over i in query block a, j in key block b of A_g[i,j]\n"
          "c_h = fewest of the n blocks that hold `mass` of the attention of head h's last `block` queries\n"
          "S_h(a) = own block and the max(ceil(c_h·(a+1) / n), min_budget / block) blocks of largest R_g[a,·]\n"
          "o_i = softmax over j in S_h(block of i), j <= i of scale·<q_i, k_j>, times v_j",
      .cost =
          "proxy_heads·N²/(2·query_stride)·D multiply-adds to rank, 2·Hq·block·N·D for budgets, N²/2·density·(D + Dv) "
          "a head",
      .causality = Causality::implied,
      .square = true,
      .params = {integer("proxy_heads", 1, 1, "groups of heads, each with its own ranking; divides the heads of k"),
                 share("mass", 0.95, "share of attention that a head's budget holds"),
                 integer("query_stride", 4, 1, "of a block's queries, every how many-th is scored"),
                 integer("min_budget", 2048, 0, "tokens that every head takes at least"),
                 integer("block", 128, 1, "tokens per block of queries and of keys")},
      .extras = {},
      .not_on_models = "",
      .plan = plan_proxy_attn,
      .calibrate = calibrate_proxy_heads,
      .settle = settle_proxy_heads,
  };
  return m;
}

}  // namespace heed::mechanism
