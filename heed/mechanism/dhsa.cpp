// DHSA: keys are cut into chunks where their content changes; a block of queries attends to the
// tokens of the chunks whose length-normalised mean it likes best, and to the first and latest tokens.
// "Long-Context Modeling with Dynamic Hierarchical Sparse Attention for On-Device LLMs", arXiv:2510.24606.

#include <memory>

#include "heed/base/threads.h"
#include "heed/kernel/kernels.h"
#include "heed/mechanism/boundary_predictor.h"
#include "heed/mechanism/registry.h"
#include "heed/plan/chunks.h"

namespace heed::mechanism {
namespace {

// Steps (a) and (b). The trailing question starts a chunk of its own, after its first token as the authors have it, and
// is not cut. Without a predictor chunks are even.
class Cutter {
 public:
  Cutter(const Params& p, const Inputs& in)
      : given_(in.find("boundary_logits")),
        predictor_(BoundaryPredictor::of(in, p.integer("half_window"), p.integer("predictor_heads"))) {
    const Index n = tokens_ = in.problem.N, block = p.integer("query_block"), per_block = p.integer("chunks_per_block");
    even_ = block / per_block;
    rule_ = {.most = n / block * per_block,
             .threshold = p.number("threshold"),
             .radius = p.integer("nms_radius"),
             .margin = p.integer("half_window"),
             .forced = n - p.integer("dense_tail")};
    if (p.boolean("strict_causal")) rule_.most = per_block, rule_.per = block;
  }
  std::vector<BlockRange> chunks(Index b) const {
    if (given_ == nullptr) return predictor_ ? cut_at_peaks(predictor_->logits(b), rule_) : cut_evenly(tokens_, even_);
    std::vector<float> logits(static_cast<size_t>(tokens_));
    read_f32(given_->at({b}), given_->dtype, given_->stride[1], tokens_, logits.data());
    return cut_at_peaks(logits, rule_);
  }

 private:
  const TensorView* given_;
  std::optional<BoundaryPredictor> predictor_;
  Index tokens_ = 0, even_ = 0;
  PeakRule rule_;
};

// Chunks and scores take M·D·Hk + N·D·Hq additions and N / query_block · chunks · D multiply-adds; the
// lists N / query_block · budget numbers, shared by all heads.
Plan plan_dhsa(const Params& p, const Inputs& in) {
  const Problem problem = in.problem;
  const Index n = problem.N, block = p.integer("query_block"), per_block = p.integer("chunks_per_block");
  const Index budget = p.integer("budget"), global = p.integer("global"), local = p.integer("local");
  if (budget < global + local && budget < n)
    fail_usage("dhsa: budget = {}, expected at least global + local = {}", budget, global + local);
  if (per_block > block) fail_usage("dhsa: chunks_per_block = {}, expected at most query_block = {}", per_block, block);
  const Cutter cutter(p, in);
  const bool strict = p.boolean("strict_causal");
  const std::string& pooled = p.text("pooling");
  const Pooling pooling = pooled == "avg" ? Pooling::avg : pooled == "max" ? Pooling::max : Pooling::avg_norm;

  Plan plan = make_plan(problem, in.q, *in.kv, in.rule, Lanes::per_kv_head);
  const Index dense_from = std::max<Index>(0, n - p.integer("dense_tail")), blocks = ceil_div(dense_from, block);
  plan.cuts = {0};
  while (plan.cuts.back() < dense_from) plan.cuts.push_back(std::min(plan.cuts.back() + block, dense_from));
  while (plan.cuts.back() < n) plan.cuts.push_back(std::min(plan.cuts.back() + 256, n));

  // What block u may see ends at allowed(u); the middle lies between the first and the latest tokens.
  const auto allowed = [=](Index u) { return std::min(n, (u + 1) * block); };
  using Lists = std::vector<std::vector<std::int32_t>>;
  const auto lists = std::make_shared<Lists>(static_cast<size_t>(problem.B * blocks));
  plan.keep = {lists};
  for (Index b = 0; b < problem.B && budget < n; ++b) {
    const std::vector<BlockRange> chunks = cutter.chunks(b);
    const std::vector<float> panels = pool_keys(*in.kv, problem, b, chunks, pooling);
    const Index count = static_cast<Index>(chunks.size()), d = problem.D;
    parallel_for(blocks, [&](Index u, int) {
      if (allowed(u) <= budget) return;
      // Steps (c) and (d).
      std::vector<float> query(static_cast<size_t>(d)), one(query),
          scores(static_cast<size_t>(round_up(count, panel_columns)));
      pool_tokens(pooling, u * block, allowed(u), problem.Hq, d, query.data(), [&](Index t, Index h, float* row) {
        in.q.read(b, h, t, one.data());
        for (size_t i = 0; i < one.size(); ++i) row[i] += one[i];
      });
      kernels().gemm_f32(1, count, d, query.data(), d, panels.data(), scores.data(), round_up(count, panel_columns),
                         false);
      if (strict) {  // of the chunk that the block's end cuts, what is visible
        const auto cut = std::partition_point(chunks.begin(), chunks.end(),
                                              [&](const BlockRange& c) { return c.end <= allowed(u); });
        if (cut != chunks.end() && cut->begin < allowed(u)) {
          pool_key(*in.kv, problem, b, {cut->begin, allowed(u)}, pooling, one.data());
          scores[static_cast<size_t>(cut - chunks.begin())] = kernels().dot(query.data(), one.data(), d);
        }
      }
      (*lists)[static_cast<size_t>(b * blocks + u)] =
          fill_from_chunks(chunks, scores.data(), global, allowed(u) - local, budget - global - local);
    });
  }

  if (problem.N > budget) show_key_rows(plan, *in.kv);
  plan.emit = [=, lists = lists.get()](const RowBlock& rows, Tiles& tiles) {
    const Set all = Set::range(0, rows.rows);
    const Index end = rows.position(rows.rows - 1) + 1, u = rows.first / block;
    if (rows.first >= dense_from || allowed(u) <= budget) {
      tiles.add(all, Set::range(0, end), Mask::causal());
      return;
    }
    tiles.add(all, Set::range(0, global), Mask::causal());
    tiles.add(all, Set::list((*lists)[static_cast<size_t>(rows.b * blocks + u)]), Mask::causal());
    tiles.add(all, Set::range(allowed(u) - local, end), Mask::causal());
  };
  return plan;
}

// What the predictor is to learn of a layer.
NamedTensors calibrate_dhsa(const Params& p, const Inputs& in) {
  return boundary_lessons(in, p.integer("half_window"));
}

std::vector<ExtraSpec> extras() {
  std::vector<ExtraSpec> all = predictor_extras();
  all.push_back({"boundary_logits",
                 {DType::f32, DType::f16, DType::bf16},
                 {"B", "N"},
                 false,
                 "logits that a chunk ends after a token, in the predictor's place"});
  return all;
}

}  // namespace

const Mechanism& dhsa() {
  static const Mechanism m{
      .name = "dhsa",
      .title = "DHSA: dynamic hierarchical sparse attention",
      .paper = "arXiv:2510.24606",
      .year = 2025,
      .stage = "layout, summarize, select, attend",
      .training = Training::none,
      .idea =
          "A small predictor says where the content of the keys changes; they are cut there into chunks (without it,\n"
          "into even ones). A block of queries takes the tokens of the best chunks up to a budget, one list for all "
          "heads.\n"
          "Means are scaled by the root of the chunk's length, or long chunks would look duller than short ones.\n"
          "The predictor is fitted to a model by heed calibrate, one for all layers; boundary_logits, where given, "
          "take\n"
          "its place. A token's attention is causal, but which keys it is offered looks ahead: to the end of its "
          "block\n"
          "of queries, to that of a chunk which reaches past it, and, as the best boundaries of the whole prompt are\n"
          "kept, to the end of the prompt. strict_causal (ours) leaves the first, which query_block = 1 ends, and\n"
          "half_window tokens of the predictor.",
      .equations =
          "gap i sees keys x of tokens i-w+1 … i+w, w = half_window:  y = LayerNorm(attention(x Wq, x Wk, x Wv) Wo)\n"
          "l, r = means of y left and right of the gap;  logit_i = [ReLU([l, r, |l-r|, l*r, cos, 1] Wh), 1] · ws\n"
          "chunks end where logit_i > threshold, the best first, nms_radius apart\n"
          "k_c = sqrt|c| · mean over heads and tokens of c of k;  q_u = sqrt|u| · mean over heads and rows of "
          "block u of q\n"
          "token j of chunk c scores <q_u, k_c>;  list(u) = first `global`, latest `local`, best others, "
          "`budget` in all\n"
          "o_i = softmax over j in list(u), j <= i of scale·<q_i, k_j>, times v_j;  the last dense_tail rows "
          "see all j <= i",
      .cost = "N·(4·C² + (2w)²·C·predictor_heads + 4·C·H), C = Hk·D, for the predictor, N/query_block·chunks·D "
              "multiply-adds for all heads to choose, N·budget·(D + Dv) to attend",
      .causality = Causality::implied,
      .square = true,
      .params = {integer("budget", 1024, 1, "keys per query block, first and latest ones included"),
                 integer("query_block", 128, 1, "queries that share a list"),
                 integer("chunks_per_block", 8, 1,
                         "chunks per query_block tokens: at most, or exactly where nothing predicts boundaries"),
                 integer("half_window", 4, 1,
                         "tokens that the predictor sees on each side of a gap; no boundary nearer to the ends"),
                 integer("predictor_heads", 4, 1, "heads of the predictor's attention, a divisor of Hk·D"),
                 integer("nms_radius", 8, 0, "tokens around a boundary without another"),
                 number("threshold", 1.1, -1e300, 1e300, "a boundary's logit lies above"),
                 integer("global", 128, 0, "first tokens in every list"),
                 integer("local", 128, 0, "latest tokens in every list"),
                 integer("dense_tail", 64, 0, "last queries that see everything: the question"),
                 boolean("strict_causal", false,
                         "boundaries from left to right, and of a chunk what is visible: our addition"),
                 choice("pooling", "avg_norm", {"avg_norm", "avg", "max"}, "how tokens become a vector")},
      .extras = extras(),
      .not_on_models = "",
      .plan = plan_dhsa,
      .calibrate = calibrate_dhsa,
      .fitted = true,
  };
  return m;
}

}  // namespace heed::mechanism
