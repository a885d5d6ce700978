// PBS-Attn: inside fixed segments keys are sorted by how much the last queries attend to them, so that few blocks
// hold most of the weight; a block of queries takes the blocks of earlier segments that reach a share of it.
// "Sparser Block-Sparse Attention via Token Permutation", arXiv:2510.21270.

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <numeric>

#include "heed/base/threads.h"
#include "heed/kernel/kernels.h"
#include "heed/mechanism/registry.h"
#include "heed/plan/block_scores.h"
#include "heed/plan/permute.h"
#include "heed/plan/select.h"

namespace heed::mechanism {
namespace {

// Keys of past segments in the order of one query head, and what selects among their blocks.
struct Sorted {
  std::shared_ptr<const PermutedSource> source;
  std::unique_ptr<KeyValues> pooled;     // [B · Hq] heads of past blocks, one f32 vector each
  std::vector<std::int32_t> first_block;  // [B · Hq], that holds token 0
};

// Steps 1 and 2: keys [0, past_end) of one query head, segment by segment, by falling importance; the lower token first
// among equals. The softmax of the importance covers all complete segments, and hides no later key.
std::vector<std::int32_t> sort_keys(const Inputs& in, Index lane, Index block, Index segment, Index past_end) {
  const Problem& p = in.problem;
  RowBlock last;
  last.b = lane / p.Hq, last.head = lane % p.Hq, last.kv_head = last.head / p.group();
  last.rows = std::min(block, p.N), last.first = p.N - last.rows;
  BlockScores scores{ScoreKeys::of(*in.kv, lane / p.group()), in.rule.scale, 1};
  scores.keys.columns = p.N / segment * segment;
  Scratch& scratch = thread_scratch();
  const Scratch::Mark mark(scratch);
  const auto importance = scratch.take<float>(round_up(scores.keys.columns, panel_columns));
  std::fill(importance.begin(), importance.end(), 0.0f);
  scores.weigh(in.q, last, 1, false, nullptr, importance.data(), scratch);

  std::vector<std::int32_t> order(static_cast<size_t>(past_end));
  std::iota(order.begin(), order.end(), 0);
  for (auto begin = order.begin(); begin != order.end(); begin += segment)
    std::stable_sort(begin, begin + segment, [&](std::int32_t i, std::int32_t j) {
      return importance[static_cast<size_t>(i)] > importance[static_cast<size_t>(j)];
    });
  return order;
}

// Sorted copies take as much memory as keys and values repeated for every query head.
std::shared_ptr<const Sorted> sort_and_pool(const Inputs& in, Index block, Index segment, Index past_end,
                                            bool largest) {
  const Problem& p = in.problem;
  const Index lanes = p.B * p.Hq, blocks = past_end / block;
  auto sorted = std::make_shared<Sorted>();
  std::vector<std::vector<std::int32_t>> orders(static_cast<size_t>(lanes));
  parallel_for(lanes, [&](Index lane, int) {
    orders[static_cast<size_t>(lane)] = sort_keys(in, lane, block, segment, past_end);
  });
  for (const auto& order : orders)
    sorted->first_block.push_back(
        static_cast<std::int32_t>((std::find(order.begin(), order.end(), 0) - order.begin()) / block));
  sorted->source = permute_each(*in.kv, orders);

  // Step 3, keys. f32 whatever the arithmetic.
  Tensor pooled(DType::f32, {lanes, blocks, p.D});
  const PanelLayout& layout = sorted->source->source.layout;
  parallel_for(lanes * blocks, [&](Index unit, int) {
    const Index begin = unit % blocks * block, end = begin + block;
    const void* keys = sorted->source->source.views[static_cast<size_t>(unit / blocks)].keys;
    float* out = pooled.as<float>() + unit * p.D;
    if (largest) {
      std::fill_n(out, p.D, -std::numeric_limits<float>::infinity());
      max_columns(layout, keys, begin, end, out);
    } else {
      sum_columns(layout, keys, begin, end, out);
      for (Index i = 0; i < p.D; ++i) out[i] /= static_cast<float>(block);
    }
  });
  sorted->pooled = std::make_unique<KeyValues>(pack_keys(pooled.view(), DType::f32));
  return sorted;
}

// Step 3, queries: the mean over those there are, or the largest of each feature.
void pool_queries(const Queries& queries, const RowBlock& rows, bool largest, Index d, float* out, Scratch& scratch) {
  const Scratch::Mark mark(scratch);
  float* row = scratch.take<float>(d).data();
  std::fill_n(out, d, largest ? -std::numeric_limits<float>::infinity() : 0.0f);
  for (Index r = 0; r < rows.rows; ++r) {
    queries.read(rows.b, rows.head, rows.token(r), row);
    for (Index i = 0; i < d; ++i) out[i] = largest ? std::max(out[i], row[i]) : out[i] + row[i];
  }
  if (!largest)
    for (Index i = 0; i < d; ++i) out[i] /= static_cast<float>(rows.rows);
}

// Importance takes block·N·D multiply-adds a query head, scoring (N / block)²·D / 2.
Plan plan_pbs(const Params& p, const Inputs& in) {
  const Problem problem = in.problem;
  const Index block = p.integer("block"), segment = p.integer("segment"), d = problem.D;
  if (segment % block != 0) fail_usage("pbs-attn: segment = {}, expected a multiple of block = {}", segment, block);
  const double mass = p.number("mass");
  const bool force_first = p.boolean("force_first"), largest = p.text("pool") == "max";

  Plan plan = make_plan(problem, in.q, *in.kv, in.rule, Lanes::per_query_head);
  plan.cut_rows_every(block);
  // The segments that are past for some query; they are complete.
  const Index past_end = (problem.N - 1) / segment * segment;
  std::shared_ptr<const Sorted> sorted;
  if (past_end > 0) {
    sorted = sort_and_pool(in, block, segment, past_end, largest);
    plan.sources.push_back(sorted->source->source);
    plan.keep = {sorted};
  }

  const Queries queries = in.q;
  const float scale = in.rule.scale;
  plan.emit = [=, sorted = sorted.get()](const RowBlock& rows, Tiles& tiles) {
    const Set all = Set::range(0, rows.rows);
    const Index own = rows.position(0) / segment * segment, past = own / block;
    const auto chosen = tiles.take<std::int32_t>(past + 1);
    if (past > 0) {
      Scratch& scratch = tiles.scratch();
      const Scratch::Mark mark(scratch);
      const Index lane = rows.b * problem.Hq + rows.head;
      float* query = scratch.take<float>(d).data();
      float* weights = scratch.take<float>(round_up(past, panel_columns)).data();
      // Step 4: a softmax over the blocks of past segments.
      pool_queries(queries, rows, largest, d, query, scratch);
      kernels().gemm_f32(1, past, d, query, d, static_cast<const float*>(sorted->pooled->keys(lane)), weights,
                         round_up(past, panel_columns), false);
      float top = -std::numeric_limits<float>::infinity();
      for (Index b = 0; b < past; ++b) weights[b] *= scale, top = std::max(top, weights[b]);
      for (Index b = 0; b < past; ++b) weights[b] = std::exp(weights[b] - top);
      // Steps 5 and 6.
      Index count = choose_mass(weights, past, mass, scratch.take<std::int32_t>(past).data(), chosen.data());
      const std::int32_t first = sorted->first_block[static_cast<size_t>(lane)];
      const auto end = chosen.begin() + count, at = std::lower_bound(chosen.begin(), end, first);
      if (force_first && (at == end || *at != first)) std::copy_backward(at, end, end + 1), *at = first, ++count;
      // Step 7. Neighbouring blocks make one tile, which is read where it lies.
      for (Index i = 0, next; i < count; i = next) {
        for (next = i + 1;
             next < count && chosen[static_cast<size_t>(next)] == chosen[static_cast<size_t>(i)] + next - i;)
          ++next;
        const Index begin = chosen[static_cast<size_t>(i)];
        tiles.add(all, Set::range(begin * block, (begin + next - i) * block), Mask::full(), 1);
      }
    }
    // All of the own segment, whose order does not matter then: as it stands.
    tiles.add(all, Set::range(own, rows.position(rows.rows - 1) + 1), Mask::causal());
  };
  return plan;
}

ParamSpec mass_spec() {
  ParamSpec spec = number("mass", 0.9, 0, 1, "share of the blocks' softmax that the chosen ones reach; 1: all blocks");
  spec.above_least = true;
  return spec;
}

}  // namespace

const Mechanism& pbs_attn() {
  static const Mechanism m{
      .name = "pbs-attn",
      .title = "PBS-Attn: permuted block-sparse attention",
      .paper = "arXiv:2510.21270",
      .year = 2025,
      .stage = "layout, summarize, select, attend",
      .training = Training::none,
      .idea =
          "Keys that everyone attends to lie scattered, so that nearly every block holds one. Sorted by importance "
          "inside\n"
          "fixed segments they share few blocks. Importance is what the last `block` queries of the prompt give a "
          "key.\n"
          "A block of queries sees its own segment and, of earlier ones, the blocks whose mean keys make up `mass` of\n"
          "the softmax, which may be any of their tokens as all are past. The choice looks at the end of the prompt:\n"
          "outputs do not mix in later values, but which blocks they see depends on later tokens. Prefill only.",
      .equations = "s_j = mean over the last `block` queries i of softmax_j(scale·<q_i, k_j>), j in complete segments\n"
                   "pi sorts each segment by falling s_j;  kbar_b, qbar_a = means of blocks of k[pi] and of q\n"
                   "P_ab = softmax over blocks b of segments before a's of scale·<qbar_a, kbar_b>\n"
                   "S(a) = fewest b, by falling P_ab, with sum >= mass; the block of token 0; a's segment\n"
                   "o_i = softmax over j in S(block of i), j <= i of scale·<q_i, k_j>, times v_j",
      .cost = "block·N·D multiply-adds for importance, (N/block)²·D/2 to choose; keys and values are copied for every "
              "query head",
      .causality = Causality::implied,
      .square = true,
      .params = {integer("block", 128, 1, "tokens per block"),
                 integer("segment", 256, 1, "tokens that are sorted together; a multiple of block"), mass_spec(),
                 boolean("force_first", true, "every query sees the block that holds token 0"),
                 choice("pool", "mean", {"mean", "max"},
                        "what stands for a block: the mean, or each feature's largest")},
      .extras = {},
      .not_on_models = "",
      .plan = plan_pbs,
  };
  return m;
}

}  // namespace heed::mechanism
