// SeerAttention: a small learned gate sees pooled queries and keys and predicts which blocks of the attention map
// matter.
// "SeerAttention: Learning Intrinsic Sparse Attention in Your LLMs", arXiv:2410.13276.

#include <algorithm>
#include <cmath>
#include <memory>

#include "heed/base/threads.h"
#include "heed/mechanism/block_gate.h"
#include "heed/mechanism/registry.h"
#include "heed/plan/block_scores.h"
#include "heed/plan/block_tiles.h"
#include "heed/plan/bounds.h"
#include "heed/plan/select.h"

namespace heed::mechanism {
namespace {

// Softmax over n numbers, in place.
void softmax(float* x, Index n) {
  const float most = *std::max_element(x, x + n);
  double sum = 0;
  for (Index i = 0; i < n; ++i) x[i] = std::exp(x[i] - most), sum += static_cast<double>(x[i]);
  for (Index i = 0; i < n; ++i) x[i] = static_cast<float>(static_cast<double>(x[i]) / sum);
}

bool decodes(const Params& p) { return p.integer("decode_budget") > 0; }

// The gate takes N/block·(3·D·G + N/(2·block)·G) multiply-adds a head; the oracle N²/2·D.
Plan plan_seer_attention(const Params& p, const Inputs& in) {
  const Problem problem = in.problem;
  const Index block = p.integer("block"), n = ceil_div(problem.N, block), budget = p.integer("decode_budget");
  if (budget > 0 && budget < block)
    fail_usage("seer-attention: decode_budget = {}, expected 0 (dense) or at least block = {}", budget, block);
  if (problem.N < problem.M) return plan_bounded_step(problem, in.q, *in.kv, in.rule, block, budget / block);

  // Step 5. The density, where it was given, takes precedence; k counts blocks of a row of the whole map.
  const bool by_density = p.given("density"), dense_tail = p.boolean("last_block_dense"), oracle = p.boolean("oracle");
  const double threshold = p.number("threshold"), r = 1 - std::sqrt(1 - p.number("density"));
  const Index k = std::max<Index>(1, static_cast<Index>(r * static_cast<double>(n) + 1e-9));
  const bool all = by_density ? k >= n : threshold == 0;
  if (!oracle && all) BlockGate::check(in, p.number("rope_base"));
  const auto gate = oracle || all ? nullptr : std::make_shared<BlockGate>(in, block, p.number("rope_base"));

  Plan plan = make_plan(problem, in.q, *in.kv, in.rule, Lanes::per_query_head);  // every head has a gate
  plan.cut_rows_every(block);
  plan.keep = {gate};
  const float scale = in.rule.scale;
  const Queries queries = in.q;
  const KeyValues* kv = in.kv;
  const auto is_dense = [=](Index a) { return all || (by_density && a < k) || (dense_tail && a >= n - 2); };
  const auto select = [=, gate = gate.get()](const RowBlock& rows, Scratch& scratch) {
    const Index a = rows.first / block;
    const auto chosen = scratch.take<std::int32_t>(a + 1);
    float* scores = scratch.take<float>(round_up(a + 1, panel_columns)).data();
    if (oracle)
      block_targets({ScoreKeys::of(*kv, rows.b * problem.Hk + rows.kv_head), scale, block}, queries, rows, scores,
                    scratch);
    else gate->score(rows, scores, scratch);
    Index count = 0;
    if (by_density) {
      count = choose_top(scores, a + 1, k, Ties::lower, chosen.data());  // a softmax would not change the order
    } else {
      if (!oracle) softmax(scores, a + 1);
      for (Index b = 0; b <= a; ++b)
        if (static_cast<double>(scores[b]) > threshold)
          chosen[static_cast<size_t>(count++)] = static_cast<std::int32_t>(b);
    }
    // The diagonal always: our rule, as a row must see itself.
    if (count == 0 || chosen[static_cast<size_t>(count - 1)] != a)
      chosen[static_cast<size_t>(count++)] = static_cast<std::int32_t>(a);
    return chosen.first(static_cast<size_t>(count));
  };

  plan.emit = [=](const RowBlock& rows, Tiles& tiles) {
    if (is_dense(rows.first / block))
      tiles.add(Set::range(0, rows.rows), Set::range(0, rows.position(rows.rows - 1) + 1), Mask::causal());
    else add_past_blocks(tiles, rows, select(rows, tiles.scratch()), block);
  };
  return plan;
}

// What a gate is to learn, and from what. `targets` f32 [B·Hq, n, n]: the block maxima of the model's own attention,
// rows summing to one over the blocks they see. `q_means` f32 [B·Hq, n, D] and `key_pools` f32 [B·Hk, n, 3D]: what the
// gate projects.
NamedTensors calibrate_seer_attention(const Params& p, const Inputs& in) {
  const Problem& problem = in.problem;
  const Index block = p.integer("block"), n = ceil_div(problem.N, block), heads = problem.B * problem.Hq, d = problem.D;
  const GateView view(in, block);
  Tensor targets(DType::f32, {heads, n, n}), q_means(DType::f32, {heads, n, d}),
      key_pools(DType::f32, {problem.B * problem.Hk, n, 3 * d});
  parallel_for(heads * n, [&](Index unit, int) {
    const Index head = unit % heads, a = n - 1 - unit / heads;  // the longest rows go first
    const RowBlock rows{.b = head / problem.Hq,
                        .kv_head = head % problem.Hq / problem.group(),
                        .head = head % problem.Hq,
                        .first = a * block,
                        .rows = std::min(block, problem.N - a * block)};
    Scratch& scratch = thread_scratch();
    const Scratch::Mark mark(scratch);
    float* row = scratch.take<float>(round_up(a + 1, panel_columns)).data();
    block_targets({ScoreKeys::of(*in.kv, rows.b * problem.Hk + rows.kv_head), in.rule.scale, block}, in.q, rows, row,
                  scratch);
    std::copy_n(row, a + 1, targets.as<float>() + (head * n + a) * n);
    mean_query(view.queries(), d, rows, q_means.as<float>() + (head * n + a) * d, scratch);
  });
  parallel_for(problem.B * problem.Hk,
               [&](Index head, int) { view.keys(head, 0, n, key_pools.as<float>() + head * n * 3 * d); });
  NamedTensors tensors;
  tensors.emplace("targets", std::move(targets));
  tensors.emplace("q_means", std::move(q_means));
  tensors.emplace("key_pools", std::move(key_pools));
  return tensors;
}

}  // namespace

const Mechanism& seer_attention() {
  static const Mechanism m{
      .name = "seer-attention",
      .title = "SeerAttention: a learned gate for blocks",
      .paper = "arXiv:2410.13276",
      .year = 2024,
      .stage = "summarize, gate (learned), select, attend",
      .training = Training::required,
      .idea =
          "A gate pools each block of queries and of keys, projects them and predicts the model's own attention map,\n"
          "block by block; it is distilled from the block maxima of that map while the model stays as it is. What the\n"
          "gate finds faint is left out. Two additions of ours: oracle = true takes those block maxima themselves,\n"
          "which needs no gate and saves no time, but shows what the best gate could do; decode_budget lets decoding\n"
          "steps attend only to the blocks whose keys could score highest, by the bounds of their features.",
      .equations =
          "qg_a = RoPE(W_q mean of q over block a);  kg_b = RoPE(W_k [max; min; mean of k over block b])\n"
          "G_ab = softmax over b <= a of <qg_a, kg_b> / sqrt(G)\n"
          "oracle: G_ab = T_ab / sum over b of T_ab, T_ab = max over i in a, j in b of the attention weight p_ij\n"
          "S(a) = own block and {b : G_ab > threshold}, or the k best, k = max(1, floor((1 - sqrt(1 - density))·n));\n"
          "the last two query blocks: everything\n"
          "o_i = softmax over j in S(block of i), j <= i of scale·<q_i, k_j>, times v_j\n"
          "a decoding step: the decode_budget / block blocks of largest sum over f of max(q_f·max k_f, q_f·min k_f), "
          "and "
          "the last",
      .cost = "N/block·(3·D·G + N/(2·block)·G) multiply-adds a head for the gate, N²/2·density·(D + Dv) to attend",
      .causality = Causality::implied,
      .square = true,
      .decodes = decodes,
      .params = {integer("block", 64, 1, "tokens per block"),
                 number("threshold", 0, 0, 1, "blocks whose predicted share lies above are attended; 0: all"),
                 share("density", 1, "share of all pairs of blocks; where given, threshold is not used"),
                 boolean("last_block_dense", true, "the last two query blocks see everything"),
                 number("rope_base", 0, 0, 1e300, "base of the gate's rotary positions; 0: none"),
                 boolean("oracle", false, "block maxima of the attention itself in place of a gate: our addition"),
                 integer("decode_budget", 0, 0,
                         "tokens that a decoding step attends, the last block on top; 0: all. Our "
                         "addition")},
      .extras = gate_extras(),
      .not_on_models = "",
      .plan = plan_seer_attention,
      .calibrate = calibrate_seer_attention,
      .fitted = true,
  };
  return m;
}

}  // namespace heed::mechanism
