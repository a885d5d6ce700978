// MoBA: every query attends to its own block and to the top_k - 1 past blocks whose mean key has
// the largest dot product with it.
// "MoBA: Mixture of Block Attention for Long-Context LLMs", arXiv:2502.13189.

#include "heed/mechanism/block_router.h"
#include "heed/mechanism/registry.h"

namespace heed::mechanism {
namespace {

Plan plan_moba(const Params& p, const Inputs& in) {
  Plan plan = make_plan(in.problem, in.q, *in.kv, in.rule, Lanes::per_query_head);  // every head chooses for itself
  const Documents documents = apply_documents(in, plan);
  const BlockRouter router{.block = p.integer("block"),
                           .top_k = p.integer("top_k"),
                           .ties = p.text("tie") == "lower" ? Ties::lower : Ties::higher,
                           .sink = p.integer("sink"),
                           .keys = in.kv};
  route_blocks(router, in, documents, plan);
  return plan;
}

}  // namespace

const Mechanism& moba() {
  static const Mechanism m{
      .name = "moba",
      .title = "MoBA: mixture of block attention",
      .paper = "arXiv:2502.13189",
      .year = 2025,
      .stage = "summarize, select, attend",
      .training = Training::continued,
      .idea =
          "Keys are cut into blocks. Each query, in each head, picks the past blocks whose mean key it likes best and\n"
          "attends to them and to its own block: a router without parameters.",
      .equations = "kbar_b = mean of k over block b;  s_tb = <q_t, kbar_b>\n"
                   "S(t) = own block of t and the top_k - 1 past blocks of largest s_tb\n"
                   "o_t = softmax over j in S(t), j <= t of scale·<q_t, k_j>, times v_j",
      .cost = "N·M/(2·block)·D to choose and N·block·(top_k - 1/2)·(D + Dv) multiply-adds to attend",
      .causality = Causality::implied,
      .square = false,
      .params = {integer("block", 512, 1, "tokens per block"),
                 integer("top_k", 3, 1, "blocks per query, its own included"),
                 choice("tie", "lower", {"lower", "higher"}, "which of equally scored blocks wins"),
                 integer("sink", 0, 0,
                         "first tokens that every query sees: an addition for models not trained with it")},
      .extras = {document_spec()},
      .not_on_models = "",
      .plan = plan_moba,
  };
  return m;
}

}  // namespace heed::mechanism
