// LLSA: blocks of queries choose blocks of keys down a pyramid of means, and attend to the chosen tokens and to the
// coarse tokens met on the way, each weighted by the tokens that it stands for.
// "Trainable Log-linear Sparse Attention for Efficient Diffusion Transformers", arXiv:2512.16615.

#include <algorithm>

#include "heed/mechanism/registry.h"
#include "heed/plan/levels.h"
#include "heed/plan/pyramid.h"
#include "heed/plan/stretches.h"

namespace heed::mechanism {
namespace {

Levels read_levels(const Params& p, Index tokens) {
  Levels levels{.tokens = tokens, .branch = p.integer("block"), .top = 1};
  // Above a level with one run there is nothing to choose between: coarser ones would only count it again.
  const Index most = levels.single();
  levels.top = p.given("levels") ? p.integer("levels") : std::min<Index>(most, tokens < 16384 ? 1 : 2);
  if (levels.top > most)
    fail_usage("llsa: levels = {}, expected at most {} for {} tokens in blocks of {}", levels.top, most, tokens,
               levels.branch);
  const Index enriched = p.given("enriched_levels") ? p.integer("enriched_levels") : levels.top;
  if (enriched != 0 && enriched != levels.top)
    fail_usage("llsa: enriched_levels = {}, expected 0 or levels = {}", enriched, levels.top);
  return levels;
}

// What a row block needs to know.
struct Pyramid {
  Levels levels;
  LevelChoice choice;
  std::vector<Index> sources;  // [level], 0 being the tokens
  Index heads = 1;             // of queries
};

// Rows of the block that lie in `run` of a level.
Set rows_in(const RowBlock& rows, Index run, Index width) {
  return Set::range(std::max<Index>(0, run * width - rows.first), std::min(rows.rows, (run + 1) * width - rows.first));
}

// Calls visit(run, its rows) for the runs of a level that hold rows of the block.
template <class Visit>
void for_runs(const RowBlock& rows, Index width, Visit visit) {
  for (Index run = rows.first / width; run * width < rows.first + rows.rows; ++run)
    visit(run, rows_in(rows, run, width));
}

// The `branch` children of each of the runs `parents` of a level, as columns of the level below, which has `count`.
Set children_of(std::span<const std::int32_t> parents, Index branch, Index count) {
  const Index all = static_cast<Index>(parents.size()) * branch;
  return {0, all - std::max<Index>(0, (parents.back() + 1) * branch - count), parents.data(), branch};
}

// Level 0, weight 1: the tokens of the blocks that each block of queries chose.
void emit_chosen(const Pyramid& pyramid, const RowBlock& rows, Tiles& tiles) {
  const auto& [levels, choice, sources, heads] = pyramid;
  const Index block = levels.width(1), head = rows.b * heads + rows.head;
  if (choice.all(1)) {
    tiles.add(Set::range(0, rows.rows), Set::range(0, levels.tokens), Mask::full());
    return;
  }
  // Less than a panel is packed sooner than met by itself.
  if (block < panel_columns) {
    for_runs(rows, block, [&](Index a, const Set& own) {
      tiles.add(own, children_of(choice.of(1, head, a), block, levels.tokens), Mask::full());
    });
    return;
  }
  Index count = 0;
  for_runs(rows, block, [&](Index a, const Set&) { count += static_cast<Index>(choice.of(1, head, a).size()); });
  const auto stretches = tiles.take<Stretch>(count);
  size_t n = 0;
  for_runs(rows, block, [&](Index a, const Set& own) {
    for (const std::int32_t j : choice.of(1, head, a))
      stretches[n++] = {own.first, own.first + own.count, j * block, std::min((j + 1) * block, levels.tokens)};
  });
  add_stretches(stretches, 0, tiles);
}

// `columns` runs of a level; with dedupe those that the rows chose, and so see finer, are left out.
void add_coarse(const Pyramid& pyramid, const RowBlock& rows, Index level, const Set& own, const Set& columns,
                bool dedupe, Tiles& tiles) {
  const auto& [levels, choice, sources, heads] = pyramid;
  const Index source = sources[static_cast<size_t>(level)];
  if (!dedupe) {
    tiles.add(own, columns, Mask::full(), source);
    return;
  }
  if (choice.all(level)) return;
  const Index words = ceil_div(columns.count, 64), width = levels.width(level);
  const auto bits = tiles.take<std::uint64_t>(own.count * words);
  std::fill(bits.begin(), bits.end(), ~std::uint64_t{0});
  for_runs(rows, width, [&](Index run, const Set& all_rows) {
    const Index begin = std::max(all_rows.first, own.first) - own.first;
    const Index end = std::min(all_rows.first + all_rows.count, own.first + own.count) - own.first;
    Index c = 0;  // both ascend
    for (const std::int32_t j : choice.of(level, rows.b * heads + rows.head, run)) {
      if (begin >= end) break;
      while (columns[c] != j) ++c;
      for (Index row = begin; row < end; ++row)
        bits[static_cast<size_t>(row * words + c / 64)] &= ~(std::uint64_t{1} << (c % 64));
    }
  });
  tiles.add(own, columns, Mask::bits(bits.data(), words), source);
}

// Step 3, the coarse tokens: at every level the candidates that were compared there.
void emit_coarse(const Pyramid& pyramid, const RowBlock& rows, bool dedupe, Tiles& tiles) {
  const auto& [levels, choice, sources, heads] = pyramid;
  const Index head = rows.b * heads + rows.head, top = levels.top;
  for (Index level = 1; level < top; ++level) {
    const Index count = levels.count(level);
    for_runs(rows, levels.width(level + 1), [&](Index parent, const Set& own) {
      const Set children = choice.all(level + 1)
                               ? Set::range(0, count)
                               : children_of(choice.of(level + 1, head, parent), levels.branch, count);
      add_coarse(pyramid, rows, level, own, children, dedupe, tiles);
    });
  }
  add_coarse(pyramid, rows, top, Set::range(0, rows.rows), Set::range(0, levels.count(top)), dedupe, tiles);
}

Plan plan_llsa(const Params& p, const Inputs& in) {
  const Problem& problem = in.problem;
  const Levels levels = read_levels(p, problem.N);
  const bool reweight = p.boolean("reweight"), dedupe = p.boolean("dedupe");
  const bool enriched = !p.given("enriched_levels") || p.integer("enriched_levels") > 0;

  Plan plan = make_plan(problem, in.q, *in.kv, in.rule, Lanes::per_query_head);  // every head chooses for itself
  // Whole blocks of queries, as many as make panels and gathered lists worth their while.
  const Index block = levels.branch, cut = block * std::max<Index>(1, 256 / block);
  plan.cuts = {0};
  while (plan.cuts.back() < problem.N) plan.cuts.push_back(std::min(plan.cuts.back() + cut, problem.N));

  // Steps 1 and 2.
  const auto pyramid = std::make_shared<Pyramid>(
      Pyramid{levels, LevelChoice(levels, p.integer("top_k"), problem, in.q, *in.kv), {0}, problem.Hq});
  for (Index level = 1; enriched && level <= levels.top; ++level)
    pyramid->sources.push_back(add_pooled(plan, pool_every(*in.kv, problem.N, levels.width(level)),
                                          reweight ? PooledWeight::tokens : PooledWeight::one));
  plan.keep.push_back(pyramid);

  plan.emit = [=, pyramid = pyramid.get()](const RowBlock& rows, Tiles& tiles) {
    emit_chosen(*pyramid, rows, tiles);
    if (enriched) emit_coarse(*pyramid, rows, dedupe, tiles);
  };
  return plan;
}

}  // namespace

const Mechanism& llsa() {
  static const Mechanism m{
      .name = "llsa",
      .title = "LLSA: log-linear sparse attention",
      .paper = "arXiv:2512.16615",
      .year = 2025,
      .stage = "summarize, select, attend",
      .training = Training::required,
      .idea =
          "Tokens are averaged in blocks, blocks in blocks of blocks. From the coarsest level down, each block of "
          "queries\n"
          "compares its mean with the means of keys and goes on with the children of the top_k best. Its queries "
          "attend\n"
          "to the tokens of the blocks chosen last and to all means compared on the way, each counted as often as it "
          "has\n"
          "tokens, in one softmax. For images and video in an order that keeps neighbours together (Morton order).",
      .equations =
          "X^l[i] = mean of the tokens of run i of block^l tokens;  top level: C = all runs\n"
          "I^l[a] = top_k of j in C^l[a] by <q^l_a, k^l_j>;  C^(l-1) of a's children = the children of I^l[a]\n"
          "S(a) = tokens of I^1[a], weight 1, and at each level l all of C^l, weight n_j = tokens of j (reweight) or "
          "1\n"
          "o_i = sum over S of n_j·exp(scale·<q_i, k_j>)·v_j / sum over S of n_j·exp(scale·<q_i, k_j>)\n"
          "Fine tokens count inside their coarse ones too; dedupe leaves such ancestors out, so that top_k = all is "
          "dense.",
      .cost = "N·(top_k·block·levels + N/block^levels)·(D + Dv) multiply-adds to attend; N·top_k·D to choose",
      .causality = Causality::refused,
      .square = true,
      .params = {integer("block", 16, 2, "tokens of a block, blocks of the next level's run"),
                 integer("top_k", 8, 1, "runs of keys that a run of queries keeps at every level"),
                 integer("levels", 1, 1, "of means; when not given, 1 below 16384 tokens, else 2"),
                 integer("enriched_levels", 1, 0, "levels whose means are attended: levels (when not given) or 0"),
                 boolean("reweight", true, "a mean counts as often as it has tokens"),
                 boolean("dedupe", false,
                         "leave out means whose tokens are seen finer: an addition for untrained use")},
      .extras = {},
      .not_on_models = "it is not causal: queries are averaged with later ones, and means of keys hold later tokens",
      .plan = plan_llsa,
  };
  return m;
}

}  // namespace heed::mechanism
