// PowerAttention: a window, the first block, and the blocks at distances 1, 2, 4, 8, …, so that
// after d layers every block less than 2^d away has had its say.
// "PowerAttention: Exponentially Scaling of Receptive Fields for Effective Sparse Attention", arXiv:2503.03588.

#include <algorithm>

#include "heed/mechanism/registry.h"
#include "heed/plan/block_runs.h"

namespace heed::mechanism {
namespace {

Plan plan_power(const Params& p, const Inputs& in) {
  const Index block = p.integer("block"), window = p.integer("window_blocks"), sink = p.integer("sink_blocks");
  Plan plan = make_plan(in.problem, in.q, *in.kv, in.rule, Lanes::per_kv_head);
  // Rows of one key block share their columns; several blocks make one row block.
  plan.cut_rows_every(round_up(256, block));

  plan.emit = [=](const RowBlock& rows, Tiles& tiles) {
    // Algorithm 1: distance d = own - column block is allowed when d < window, d is a power of two, or
    // the column block is the sink. Ascending columns: sink, powers falling, window.
    add_block_rows(rows, block, tiles, [&](BlockRuns& runs) {
      const Index own = runs.own();
      runs.add(0, sink);
      Index distance = 1;
      while (2 * distance <= own) distance *= 2;
      for (; distance >= window; distance /= 2)
        if (distance <= own) runs.add(own - distance, own - distance + 1);
      runs.add(std::max<Index>(0, own - window + 1), own + 1);
    });
  };
  return plan;
}

}  // namespace

const Mechanism& power() {
  static const Mechanism m{
      .name = "power",
      .title = "PowerAttention",
      .paper = "arXiv:2503.03588",
      .year = 2025,
      .stage = "select (static), attend",
      .training = Training::continued,
      .idea = "A static block mask: the last `window_blocks` blocks, the first block, and those at distances 1, 2, 4, "
              "8, …\n"
              "Information from any block less than 2^d blocks away reaches a query within d layers.",
      .equations = "d = block(i) - block(j);  visible: d < window_blocks, or d & (d - 1) = 0, or block(j) < "
                   "sink_blocks; and j <= i",
      .cost = "N·block·(window_blocks + 1 + log2(N / block))·(D + Dv) multiply-adds",
      .causality = Causality::implied,
      .square = false,
      .params = {integer("block", 256, 1, "tokens per block"),
                 integer("window_blocks", 5, 1, "latest blocks that a query sees, its own included"),
                 integer("sink_blocks", 1, 0, 1, "first blocks that every query sees")},
      .extras = {},
      .not_on_models = "",
      .plan = plan_power,
  };
  return m;
}

}  // namespace heed::mechanism
