// VMoBA: for video. Blocks are runs of frames, columns through time or boxes, layer by layer in turn; all pairs of a
// query and a block compete in one ranking per head.
// "VMoBA: Mixture-of-Block Attention for Video Diffusion Models", arXiv:2506.23858.

#include <memory>

#include "heed/base/threads.h"
#include "heed/mechanism/grids.h"
#include "heed/mechanism/registry.h"
#include "heed/plan/permute.h"
#include "heed/plan/ranking.h"

namespace heed::mechanism {
namespace {

// Tokens in the order of the blocks: block c is tokens[begins[c] … begins[c + 1]), and own[t] the block of token t.
struct Partition {
  std::vector<std::int32_t> tokens, own;
  std::vector<Index> begins;
  Index count() const { return static_cast<Index>(begins.size()) - 1; }
};

// Step 1. Blocks of 1d: runs of `chunk` tokens, the last one perhaps shorter; 2d: a patch of every frame; 3d: a box.
Boxes cut_grid(const Params& p, const Problem& problem) {
  const std::string& mode = p.text("mode");
  const std::vector<Index> chunk = p.list("chunk");
  if (mode == "1d") {
    if (p.given("grid")) read_grid(p, problem);
    if (chunk.size() != 1)
      fail_usage("vmoba: chunk = {}, expected one number of tokens with mode = 1d", p.text("chunk"));
    return Boxes({1, 1, problem.N}, {1, 1, 1}, {1, 1, std::min(chunk[0], problem.N)});
  }
  if (!p.given("grid")) fail_usage("vmoba: grid is missing, expected TxHxW with mode = {}", mode);
  const GridShape grid = read_grid(p, problem);
  if (grid.axes != 3) fail_usage("vmoba: grid = {}, expected TxHxW with mode = {}", grid.text, mode);
  const size_t axes = mode == "2d" ? 2 : 3;  // the last ones
  if (chunk.size() != 1 && chunk.size() != axes)
    fail_usage("vmoba: chunk = {}, expected {} or one number for all with mode = {}", p.text("chunk"),
               axes == 2 ? "HxW" : "TxHxW", mode);
  Extents size = grid.length;
  for (size_t a = 0; a < axes; ++a) {
    Index& extent = size[3 - axes + a];
    const Index length = extent;
    extent = chunk[chunk.size() == 1 ? 0 : a];
    if (length % extent != 0)
      fail_usage("vmoba: chunk = {}, expected lengths that divide those of grid = {}", p.text("chunk"), grid.text);
  }
  return Boxes(grid.length, {1, 1, 1}, size);
}

Partition partition(const Boxes& boxes) {
  Partition parts{.tokens = boxes.tokens(), .own = {}, .begins = boxes.begins()};
  parts.own.resize(parts.tokens.size());
  for (Index c = 0; c < parts.count(); ++c)
    for (Index i = parts.begins[static_cast<size_t>(c)]; i < parts.begins[static_cast<size_t>(c) + 1]; ++i)
      parts.own[static_cast<size_t>(parts.tokens[static_cast<size_t>(i)])] = static_cast<std::int32_t>(c);
  return parts;
}

// Steps 3 and 4, head by head: where each head's ranking is cut. Scores are never kept: N·C of them are made, of
// D multiply-adds each, four times here (six times where equal scores stand at the cut), and once more by emit.
std::vector<RankCut> rank_pairs(const Plan& plan, const Summary& means, const Partition& parts, double mass) {
  const Problem& problem = plan.problem;
  std::vector<RankCut> cuts(static_cast<size_t>(problem.B * problem.Hq));
  parallel_for(problem.B * problem.Hq, [&](Index lane, int) {
    RowBlock rows{.b = lane / problem.Hq, .head = lane % problem.Hq};
    rows.kv_head = rows.head / problem.group();
    const ScoredRows scores = [&](const std::function<void(Index token, const float* scores)>& visit) {
      for (size_t cut = 0; cut + 1 < plan.cuts.size(); ++cut) {  // as emit will ask for them
        rows.first = plan.cuts[cut], rows.rows = plan.cuts[cut + 1] - rows.first;
        visit_scores(plan.queries, rows, means, rows.b * problem.Hk + rows.kv_head, thread_scratch(),
                     [&](Index row, const float* s) { visit(rows.token(row), s); });
      }
    };
    cuts[static_cast<size_t>(lane)] = cut_at_mass(scores, parts.count(), parts.own, mass);
  });
  return cuts;
}

Plan plan_vmoba(const Params& p, const Inputs& in) {
  const auto parts = std::make_shared<const Partition>(partition(cut_grid(p, in.problem)));
  Plan plan = make_plan(in.problem, in.q, *in.kv, in.rule, Lanes::per_query_head);
  plan.cut_rows_every(1024);  // rows that chose a block share it; their state stays in cache
  // Keys and values are permuted once, so that a block is a range; queries and outputs stay where they are.
  const Index source = add_permuted(plan, *in.kv, parts->tokens);
  // Step 2. f32, of the keys as they are, whatever the arithmetic.
  const auto means = std::make_shared<const Summary>(mean_keys(*in.kv, in.problem, parts->tokens, parts->begins));
  const auto cuts = std::make_shared<const std::vector<RankCut>>(rank_pairs(plan, *means, *parts, p.number("mass")));
  plan.keep.insert(plan.keep.end(), {parts, means, cuts});

  plan.emit = [=, problem = in.problem, queries = in.q, parts = parts.get(), means = means.get(), cuts = cuts.get()](
                  const RowBlock& rows, Tiles& tiles) {
    const RankCut& cut = (*cuts)[static_cast<size_t>(rows.b * problem.Hq + rows.head)];
    WantedBlocks wanted(rows.rows, parts->count(), tiles.scratch());
    visit_scores(queries, rows, *means, rows.b * problem.Hk + rows.kv_head, tiles.scratch(),
                 [&](Index row, const float* scores) {
                   const Index token = rows.token(row);
                   wanted.want_ranked(row, token, scores, cut);
                   wanted.want(row, parts->own[static_cast<size_t>(token)]);
                 });
    // Step 5, key-major.
    for (Index c = 0; c < parts->count(); ++c)
      tiles.add(wanted.rows_of(c),
                Set::range(parts->begins[static_cast<size_t>(c)], parts->begins[static_cast<size_t>(c) + 1]),
                Mask::full(), source);
  };
  return plan;
}

ParamSpec required_chunk() {
  ParamSpec chunk = list("chunk", "", 1, "a block: tokens (1d), HxW of all frames (2d), or TxHxW (3d)");
  chunk.required = true;
  return chunk;
}

ParamSpec video_grid() {
  ParamSpec grid = grid_spec();
  grid.help = "TxHxW: frames, rows and columns, row-major; 2d and 3d need it";
  return grid;
}

}  // namespace

const Mechanism& vmoba() {
  static const Mechanism m{
      .name = "vmoba",
      .title = "VMoBA: mixture of block attention for video",
      .paper = "arXiv:2506.23858",
      .year = 2025,
      .stage = "layout, summarize, select, attend",
      .training = Training::continued,
      .idea = "Video tokens are cut into blocks along time (1d), into patches through time (2d) or into boxes (3d); "
              "layers take\n"
              "the three in turn. In each head all pairs of a query and a block compete by the block's mean key, and "
              "the best\n"
              "are kept until they hold a share of the similarity: some queries see many blocks, some only their own. "
              "Made for\n"
              "training; on a model not trained with it the ranking favours queries of large norm.",
      .equations =
          "kbar_c = mean of k over block c;  g_sc = <q_s, kbar_c>;  w_sc = (g_sc - min g)/(max g - min g), per head\n"
          "pairs: all (s, own block of s), and of the others those of largest w, the fewest (at least one) "
          "with\n"
          "  sum of w over the pairs >= mass · sum of w over all;  equal scores: lower block, then lower token\n"
          "o_s = softmax over j in the blocks paired with s of scale·<q_s, k_j>, times v_j",
      .cost = "5·N·C·D multiply-adds to rank N·C pairs, and about mass·N²·(D + Dv) to attend",
      .causality = Causality::refused,
      .square = true,
      .params = {choice("mode", "1d", {"1d", "2d", "3d"}, "how blocks are cut"), video_grid(), required_chunk(),
                 number("mass", 0.25, 0, 1, "share of the similarity that the pairs kept hold")},
      .extras = {},
      .not_on_models = "it is not causal: queries of a whole video compete for blocks",
      .plan = plan_vmoba,
  };
  return m;
}

}  // namespace heed::mechanism
