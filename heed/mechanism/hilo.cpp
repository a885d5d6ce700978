// HiLo: a few heads look at fine detail inside small windows, the others at the means of all windows.
// "Fast Vision Transformers with HiLo Attention", arXiv:2205.13213.

#include <algorithm>

#include "heed/mechanism/grids.h"
#include "heed/mechanism/registry.h"
#include "heed/plan/grid_tiles.h"
#include "heed/plan/pyramid.h"

namespace heed::mechanism {
namespace {

// The means of all windows as a source, each weighing as one token.
Index add_window_means(const Boxes& windows, const KeyValues& input, Plan& plan) {
  return add_pooled(plan, pool_groups(input, windows.tokens(), windows.begins()), PooledWeight::one);
}

Plan plan_hilo(const Params& p, const Inputs& in) {
  const Problem& problem = in.problem;
  if (problem.Hq != problem.Hk)
    fail("hilo: {} heads of q and {} of k, expected as many of one as of the other", problem.Hq, problem.Hk);
  const GridShape grid = read_grid(p, problem);
  const Index window = p.integer("window");
  // Windows of one token are their own means: every head is Lo, which is dense attention.
  const Index lo_heads =
      window == 1 ? problem.Hq : static_cast<Index>(p.number("alpha") * static_cast<double>(problem.Hq) + 1e-9);
  const Index hi_heads = problem.Hq - lo_heads;

  Extents size;
  for (size_t a = 0; a < 3; ++a) size[a] = std::min(window, grid.length[a]);
  const Boxes windows(grid.length, {1, 1, 1}, size);

  Plan plan = make_plan(problem, in.q, *in.kv, in.rule, Lanes::per_query_head);
  if (hi_heads == 0) {
    const Index means = add_window_means(windows, *in.kv, plan), count = windows.count();
    plan.emit = [=](const RowBlock& rows, Tiles& tiles) {
      tiles.add(Set::range(0, rows.rows), Set::range(0, count), Mask::full(), means);
    };
    return plan;
  }
  const auto own = std::make_shared<OwnBoxTiles>(windows);
  own->prepare(plan, *in.kv);
  plan.keep.push_back(own);
  const Index means = lo_heads == 0 ? 0 : add_window_means(windows, *in.kv, plan), count = windows.count();
  plan.emit = [=, own = own.get()](const RowBlock& rows, Tiles& tiles) {
    if (rows.head < hi_heads) own->emit(rows, tiles);
    else tiles.add(Set::range(0, rows.rows), Set::range(0, count), Mask::full(), means);
  };
  return plan;
}

}  // namespace

const Mechanism& hilo() {
  static const Mechanism m{
      .name = "hilo",
      .title = "HiLo attention",
      .paper = "arXiv:2205.13213",
      .year = 2022,
      .stage = "layout, summarize, attend",
      .training = Training::required,
      .idea =
          "The first heads (Hi) attend inside windows of the grid, for detail. The last share alpha of the heads (Lo)\n"
          "attend from every token to the mean key and value of each window, for the whole. Windows that the grid's\n"
          "border cuts are smaller windows.",
      .equations = "Lo heads: the last floor(alpha·H); window = 1: all\n"
                   "Hi: o_i = softmax over j in the window of i of scale·<q_i, k_j>, times v_j\n"
                   "Lo: o_i = softmax over windows w of scale·<q_i, mean of k over w>, times the mean of v over w",
      .cost = "N·window^2·(D + Dv) multiply-adds a Hi head, N·N/window^2·(D + Dv) a Lo head (two axes)",
      .causality = Causality::refused,
      .square = true,
      .params = {required_grid_spec("14x14"), number("alpha", 0.9, 0, 1, "share of the heads that are Lo"),
                 integer("window", 2, 1, "tokens of a window along each axis")},
      .extras = {},
      .not_on_models = "it is not causal, and its windows lie on grids of images",
      .plan = plan_hilo,
  };
  return m;
}

}  // namespace heed::mechanism
