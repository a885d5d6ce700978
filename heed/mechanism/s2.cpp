// S2-Attention: every head sees a window and every V-th block before it, each KV head at another
// phase, so that the heads together see the whole context while each keeps a V-th of it.
// "Efficient LLM Training and Serving with Heterogeneous Context Sharding among Attention Heads", arXiv:2407.17678.

#include <algorithm>
#include <bit>

#include "heed/mechanism/registry.h"
#include "heed/plan/block_runs.h"
#include "heed/plan/strided_blocks.h"

namespace heed::mechanism {
namespace {

StridedBlocks read_shards(const Params& p, const Inputs& in) {
  const Problem& problem = in.problem;
  const Index block = p.integer("block"), stride = p.integer("stride_blocks");
  const StridedBlocks shards{.heads = problem.Hk,
                             .local = p.integer("local_blocks"),
                             .stride = stride,
                             // Query heads, not KV heads, set the step of the phase.
                             .step = p.boolean("same_phase") ? 0 : std::max<Index>(1, stride / problem.Hq),
                             .offset = p.integer("offset"),
                             .dense = p.integer("dense_heads")};
  if (!std::has_single_bit(static_cast<std::uint64_t>(block)))
    fail_usage("s2: block = {}, expected a power of two", block);
  if (shards.local == 0 && stride > 1)
    fail_usage("s2: local_blocks = 0, expected >= 1 with stride_blocks = {}", stride);
  if (shards.offset >= stride)
    fail_usage("s2: offset = {}, expected less than stride_blocks = {}", shards.offset, stride);
  if (shards.dense > problem.Hk)
    fail_usage("s2: dense_heads = {}, expected at most the {} KV heads", shards.dense, problem.Hk);
  if (!p.boolean("allow_partial")) {
    // Over the whole prompt, so that no chunk of it is refused after others were read.
    const Index blocks = ceil_div(std::max(in.prompt, problem.M), block);
    const double share = shards.coverage(blocks);
    if (share < 1)
      fail_usage("s2: stride_blocks = {}, expected one that {} KV heads cover: they see {:.1f} % of {} blocks "
                 "between them, which allow_partial=true permits",
                 stride, problem.Hk, 100 * share, blocks);
  }
  return shards;
}

Plan plan_s2(const Params& p, const Inputs& in) {
  const Index block = p.integer("block");
  const StridedBlocks shards = read_shards(p, in);
  Plan plan = make_plan(in.problem, in.q, *in.kv, in.rule, Lanes::per_kv_head);
  plan.cut_rows_every(round_up(256, block));

  plan.reaches = [=](Index lane, Index position, Index begin, Index end) {
    for (Index j = begin / block; j <= (end - 1) / block; ++j)
      if (!shards.may_forget(lane % shards.heads, position / block, j)) return true;
    return false;
  };
  plan.emit = [=](const RowBlock& rows, Tiles& tiles) {
    add_block_rows(rows, block, tiles, [&](BlockRuns& runs) {
      const Index window = shards.is_dense(rows.kv_head) ? 0 : std::max<Index>(0, runs.own() - shards.local + 1);
      for (Index j = shards.first_owned(rows.kv_head); j < window; j += shards.stride) runs.add(j, j + 1);
      runs.add(window, runs.own() + 1);
    });
  };
  return plan;
}

}  // namespace

const Mechanism& s2() {
  static const Mechanism m{
      .name = "s2",
      .title = "S2-Attention: sharded context",
      .paper = "arXiv:2407.17678",
      .year = 2024,
      .stage = "select (static), attend",
      .training = Training::continued,
      .idea =
          "A static block mask that differs by head: the latest `local_blocks` blocks and, further back, every\n"
          "`stride_blocks`-th block, at a phase of the KV head's own. Together the heads see everything, each keeps\n"
          "about 1 / stride_blocks of it: a block that left the window and is not the head's own is never seen again,\n"
          "so a cache may drop it. Models usually mix such layers with dense ones.",
      .equations =
          "i = block of the query, j = block of the key, h = KV head, V = stride_blocks, step = max(1, V ÷ Hq)\n"
          "visible: j <= i, and i - j < local_blocks, or (j + h·step + offset) mod V = 0, or h is one of the\n"
          "last dense_heads; inside the own block no later key",
      .cost = "N·block·(local_blocks + N / (2·block·stride_blocks))·(D + Dv) multiply-adds",
      .causality = Causality::implied,
      .square = false,
      .params = {integer("block", 64, 1, "tokens per block, a power of two"),
                 integer("local_blocks", 4, 0, "latest blocks that a query sees, its own included"),
                 integer("stride_blocks", 4, 1, "of the blocks before them a head sees every how many-th; 1 = all"),
                 integer("dense_heads", 0, 0, "KV heads, the last ones, that see everything"),
                 integer("offset", 0, 0, "phase of KV head 0; a model may vary it by layer"),
                 boolean("same_phase", false, "all heads see the same blocks; the coverage is lost"),
                 boolean("allow_partial", false, "blocks that no head sees are no error")},
      .extras = {},
      .not_on_models = "",
      .plan = plan_s2,
  };
  return m;
}

}  // namespace heed::mechanism
