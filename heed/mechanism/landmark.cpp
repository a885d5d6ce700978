// Landmark attention: a token after every block stands for it; how much of a block a query sees is how much
// it likes the block's landmark.
// "Landmark Attention: Random-Access Infinite Context Length for Transformers", arXiv:2305.16300.

#include <algorithm>
#include <memory>

#include "heed/mechanism/registry.h"
#include "heed/plan/choice.h"
#include "heed/plan/summary.h"

namespace heed::mechanism {
namespace {

// A finished block must fit one chunk of the executor, whatever column of a panel it begins at.
constexpr Index most_tokens = chunk_columns - panel_columns;

struct Blocks {
  std::vector<BlockRange> ranges;    // cover all M positions, landmarks included; the last one may have none
  std::vector<std::uint64_t> gates;  // one bit per position: a landmark
  bool landmark(Index j) const { return ((gates[static_cast<size_t>(j / 64)] >> (j % 64)) & 1) != 0; }
  Index block_at(Index position) const {
    return std::partition_point(ranges.begin(), ranges.end(), [&](const BlockRange& r) { return r.end <= position; }) -
           ranges.begin();
  }
  /// The normal tokens of a block.
  BlockRange tokens(Index block) const {
    const BlockRange& r = ranges[static_cast<size_t>(block)];
    return {r.begin, r.end - (landmark(r.end - 1) ? 1 : 0)};
  }
};

Blocks cut_blocks(const Params& p, const Inputs& in) {
  const Index block = p.integer("block"), M = in.problem.M;
  const TensorView* given = in.find("is_landmark");
  Blocks blocks;
  blocks.gates.resize(static_cast<size_t>(ceil_div(M, panel_columns)));
  Index begin = 0;
  for (Index j = 0; j < M; ++j) {
    if (given == nullptr ? j % (block + 1) != block : *static_cast<const std::uint8_t*>(given->at({j})) == 0) continue;
    if (j == begin) fail("is_landmark: a landmark at {}, expected a token of its block before it", j);
    // The last position's landmark closes a block that no query sees through it.
    if (j - begin > most_tokens && j < M - 1) {
      if (given != nullptr)
        fail("is_landmark: {} tokens before the landmark at {}, expected at most {}", j - begin, j, most_tokens);
      fail_usage("landmark: block = {}, expected at most {} where a block ends before the last of {} keys", block,
                 most_tokens, M);
    }
    blocks.gates[static_cast<size_t>(j / 64)] |= std::uint64_t{1} << (j % 64);
    blocks.ranges.push_back({begin, j + 1});
    begin = j + 1;
  }
  if (begin < M) blocks.ranges.push_back({begin, M});
  return blocks;
}

// Group G0's own tokens: those of the query's block, up to itself; never the block's landmark, also when the
// query stands there.
void add_own(const Blocks& blocks, const RowBlock& rows, const OwnRows& own, Tiles& tiles) {
  const BlockRange tokens = blocks.tokens(own.block);
  tiles.add(Set::range(own.begin, own.end),
            Set::range(tokens.begin, std::min(tokens.end, rows.position(own.end - 1) + 1)), Mask::causal());
}

// Every earlier block through its landmark: the form of training.
Plan plan_all(const Inputs& in, const std::shared_ptr<const Blocks>& blocks) {
  Plan plan = make_plan(in.problem, in.q, *in.kv, in.rule, Lanes::per_kv_head);
  plan.emit = [blocks = blocks.get()](const RowBlock& rows, Tiles& tiles) {
    // Blocks before the first row's own are gated for all rows; those between, for the rows behind them.
    const Index shared = blocks->ranges[static_cast<size_t>(blocks->block_at(rows.position(0)))].begin;
    tiles.add(Set::range(0, rows.rows), Set::range(0, shared), Mask::full(), 0, true);
    for (Index begin = 0, end; begin < rows.rows; begin = end) {
      const Index own = blocks->block_at(rows.position(begin));
      const BlockRange& range = blocks->ranges[static_cast<size_t>(own)];
      end = std::min(rows.rows, begin + range.end - rows.position(begin));
      tiles.add(Set::range(begin, end), Set::range(shared, range.begin), Mask::full(), 0, true);
      add_own(*blocks, rows, {own, begin, end}, tiles);
    }
  };
  return plan;
}

// The earlier blocks whose landmarks score highest, for each query and head: the form of inference, where
// landmarks of other blocks take no part in any softmax. Positions stay as they are.
Plan plan_retrieved(const Inputs& in, const std::shared_ptr<const Blocks>& blocks, Index top_k) {
  Plan plan = make_plan(in.problem, in.q, *in.kv, in.rule, Lanes::per_query_head);
  plan.cut_rows_every(1024);  // rows that chose a block share it; their state stays in cache
  std::vector<BlockRange> landmarks;
  for (const BlockRange& r : blocks->ranges)
    if (blocks->landmark(r.end - 1)) landmarks.push_back({r.end - 1, r.end});
  const auto keys = std::make_shared<const Summary>(mean_keys(
      *in.kv, in.problem, std::vector<std::vector<BlockRange>>(static_cast<size_t>(in.problem.B), landmarks)));
  plan.keep = {keys};

  const Queries queries = in.q;
  const Index heads = in.problem.Hk;
  plan.emit = [=, blocks = blocks.get(), keys = keys.get()](const RowBlock& rows, Tiles& tiles) {
    Choice choice(rows, blocks->ranges, top_k, tiles.scratch());
    for (const OwnRows& own : choice.own_blocks())
      choice.choose(own, 0, own.block, Ties::lower,
                    [&](Index row, Index count, Index ranks, float* scores, Index stride) {
                      score_rows(queries, rows, row, count, *keys, rows.b * heads + rows.kv_head, ranks, scores, stride,
                                 tiles.scratch());
                    });
    for (Index b = 0; b < choice.end(); ++b) {
      const BlockRange& range = blocks->ranges[static_cast<size_t>(b)];
      tiles.add(Set::list(choice.rows_of(b)), Set::range(range.begin, range.end), Mask::full(), 0, true);
    }
    for (const OwnRows& own : choice.own_blocks()) add_own(*blocks, rows, own, tiles);
  };
  return plan;
}

Plan plan_landmark(const Params& p, const Inputs& in) {
  const auto blocks = std::make_shared<const Blocks>(cut_blocks(p, in));
  const Index top_k = std::min(p.integer("top_k"), in.problem.M);  // never more blocks than tokens
  Plan plan = top_k == 0 ? plan_all(in, blocks) : plan_retrieved(in, blocks, top_k);
  for (SourceView& view : plan.sources[0].views) view.gates = blocks->gates.data();
  plan.keep.push_back(blocks);
  return plan;
}

}  // namespace

const Mechanism& landmark() {
  static const Mechanism m{
      .name = "landmark",
      .title = "Landmark attention",
      .paper = "arXiv:2305.16300",
      .year = 2023,
      .stage = "summarize (learned), gate, attend",
      .training = Training::required,
      .idea =
          "A landmark token closes every block of `block` tokens. A query sees its own block directly and an earlier "
          "one\n"
          "through its landmark: the landmark competes with the query's own tokens in one softmax, and the weight it\n"
          "wins is shared out by a second softmax inside its block. Trained so, landmarks find the blocks worth\n"
          "loading: with `top_k` a query meets only the blocks whose landmarks it likes best.",
      .equations =
          "G0(i) = tokens j <= i of i's block and landmarks of earlier blocks (top_k > 0: of the top_k likeliest)\n"
          "S_ij = exp(s_ij - lse over G0 of s_i.), s_ij = scale·<q_i, k_j>; the own landmark is in no group\n"
          "o_i = sum of S_ij v_j over own tokens + sum over earlier blocks b of\n"
          "      S_i,lm(b) · softmax over tokens j of b of s_ij, times v_j;  lse_i = lse over G0",
      .cost = "half of N·M·(D + Dv) multiply-adds; with top_k N·M/(2·block)·D to choose, N·(top_k + 1/2)·block·(D + "
              "Dv) to attend",
      .causality = Causality::implied,
      .square = false,
      .params = {integer("block", 50, 1,
                         "tokens per block, the landmark not counted; at most 192 for a block that ends"),
                 integer("top_k", 0, 0,
                         "earlier blocks that a query and head retrieves; 0: all, the form of training")},
      .extras = {{"is_landmark", {DType::u8}, {"M"}, false, "[M], 1: a landmark (default: every block + 1 tokens)"}},
      .not_on_models = "its landmark tokens must be inserted and trained with the model",
      .plan = plan_landmark,
  };
  return m;
}

}  // namespace heed::mechanism
