// Dense attention: every query meets every key that causality leaves. What the others are measured by.

#include "heed/mechanism/documents.h"
#include "heed/mechanism/registry.h"

namespace heed::mechanism {
namespace {

Plan plan_dense(const Params&, const Inputs& in) {
  Plan plan = make_plan(in.problem, in.q, *in.kv, in.rule, Lanes::per_kv_head);
  if (const TensorView* bias = in.find("bias")) plan.rule.bias = *bias;
  apply_documents(in, plan);
  apply_key_mask(in, plan);

  const Index keys = in.problem.M;
  const bool causal = in.problem.causal;
  plan.emit = [=](const RowBlock& rows, Tiles& tiles) {
    // No row of the block sees past its last one.
    const Index end = causal ? rows.position(rows.rows - 1) + 1 : keys;
    tiles.add(Set::range(0, rows.rows), Set::range(0, end), causal ? Mask::causal() : Mask::full());
  };
  return plan;
}

}  // namespace

const Mechanism& dense() {
  static const Mechanism m{
      .name = "dense",
      .title = "Dense softmax attention",
      .paper = "arXiv:1706.03762",
      .year = 2017,
      .stage = "attend",
      .training = Training::none,
      .idea = "Every query attends to every key (to every earlier key and its own when causal).",
      .equations = "o_i = softmax_j(scale·<q_i, k_j> + bias_ij) · v_j",
      .cost = "N·M·(D + Dv) multiply-adds, half of it when causal",
      .causality = Causality::either,
      .square = false,
      .params = {},
      .extras = {{"bias",
                  {DType::f32, DType::f16, DType::bf16},
                  {"B|1", "Hq|1", "N", "M"},
                  false,
                  "added to the scaled scores; -inf hides a pair",
                  true},
                 document_spec(),
                 key_mask_spec()},
      .not_on_models = "",
      .plan = plan_dense,
  };
  return m;
}

}  // namespace heed::mechanism
