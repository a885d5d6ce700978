// MoBA: every query attends to its own block and to the top_k - 1 past blocks whose mean key has
// the largest dot product with it.
// "MoBA: Mixture of Block Attention for Long-Context LLMs", arXiv:2502.13189.

#include <algorithm>
#include <memory>

#include "heed/mechanism/documents.h"
#include "heed/mechanism/registry.h"
#include "heed/plan/choice.h"
#include "heed/plan/select.h"
#include "heed/plan/summary.h"

namespace heed::mechanism {
namespace {

// Blocks of `block` tokens, starting anew at every document.
std::vector<std::vector<BlockRange>> cut_blocks(const Documents& documents, Index block) {
  std::vector<std::vector<BlockRange>> blocks;
  for (const std::vector<Document>& batch : documents.of) {
    std::vector<BlockRange>& list = blocks.emplace_back();
    for (const Document& d : batch)
      for (Index begin = d.begin; begin < d.end; begin += block) list.push_back({begin, std::min(begin + block, d.end)});
  }
  return blocks;
}

// Scoring takes N · M / block · D / 2 multiply-adds; an emitted block holds O(rows · top_k) indices.
Plan plan_moba(const Params& p, const Inputs& in) {
  const Index block = p.integer("block"), sink = p.integer("sink");
  const Index past_k = std::min(p.integer("top_k") - 1, in.problem.M);  // never more blocks than tokens
  const Ties ties = p.text("tie") == "lower" ? Ties::lower : Ties::higher;

  Plan plan = make_plan(in.problem, in.q, *in.kv, in.rule, Lanes::per_query_head);  // every head chooses for itself
  plan.cut_rows_every(1024);  // rows that chose a block share it; their state stays in cache
  const Documents documents = apply_documents(in, plan);
  const auto blocks = std::make_shared<std::vector<std::vector<BlockRange>>>(cut_blocks(documents, block));

  // Step 1. Mean keys, f32. A block that is not complete is only ever a query's own.
  const bool packed = in.find("doc") != nullptr;
  const auto means = std::make_shared<Summary>(past_k == 0 ? Summary{}
                                               : packed    ? mean_keys(*in.kv, in.problem, *blocks)
                                                           : mean_blocks(*in.kv, in.problem, block));
  plan.keep = {blocks, means};

  const Problem problem = in.problem;
  const Queries queries = in.q;
  plan.emit = [=, blocks = blocks.get(), means = means.get()](const RowBlock& rows, Tiles& tiles) {
    const std::vector<BlockRange>& all = (*blocks)[static_cast<size_t>(rows.b)];
    // Steps 2–4. A query's own block is never scored, as its mean holds keys that the query must
    // not see; candidates are the past blocks of its document.
    Choice choice(rows, all, past_k, tiles.scratch());
    for (const OwnRows& own : choice.own_blocks()) {
      const Index first = choice.block_at(documents.at(rows.b, all[static_cast<size_t>(own.block)].begin).begin);
      choice.choose(own, first, ties, [&](Index row, Index count, Index ranks, float* scores, Index stride) {
        score_rows(queries, rows, row, count, *means, rows.b * problem.Hk + rows.kv_head, ranks, scores, stride, tiles.scratch());
      });
    }
    // Step 5, key-major: the rows that chose a block share its panels, and see all of it.
    for (Index b = 0; b < choice.past_end(); ++b) {
      const BlockRange& range = all[static_cast<size_t>(b)];
      tiles.add(Set::list(choice.rows_of(b)), Set::range(range.begin, range.end), Mask::full());
      const Index sinks_end = std::min(range.end, documents.at(rows.b, range.begin).begin + sink);
      if (range.begin < sinks_end) {
        const Index end = documents.at(rows.b, range.begin).end;
        tiles.add(Set::list(choice.rows_past_without(b, end)), Set::range(range.begin, sinks_end), Mask::full());
      }
    }
    for (const OwnRows& own : choice.own_blocks())
      tiles.add(Set::range(own.begin, own.end), Set::range(all[static_cast<size_t>(own.block)].begin, rows.position(own.end - 1) + 1),
                Mask::causal());
  };
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
      .idea = "Keys are cut into blocks. Each query, in each head, picks the past blocks whose mean key it likes best and\n"
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
                 integer("sink", 0, 0, "first tokens that every query sees: an addition for models not trained with it")},
      .extras = {document_spec()},
      .not_on_models = "",
      .plan = plan_moba,
  };
  return m;
}

}  // namespace heed::mechanism
