#include "heed/mechanism/neighborhood.h"

#include <algorithm>

#include "heed/mechanism/grids.h"
#include "heed/plan/grid_tiles.h"

namespace heed::mechanism {
namespace {

// Keys that every query sees beside its window: a source of its own in the same softmax. Returns its
// index, or 0 when there is none.
Index add_extra_keys(const Params& p, const Inputs& in, Plan& plan) {
  const TensorView *k = in.find("k_extra"), *v = in.find("v_extra");
  if (k == nullptr && v == nullptr) return 0;
  if (k == nullptr) fail("{}: tensor k_extra is missing, expected it beside v_extra", p.owner());
  if (v == nullptr) fail("{}: tensor v_extra is missing, expected it beside k_extra", p.owner());
  const Index extra = k->shape[2], heads = in.problem.B * in.problem.Hk;
  if (v->shape[2] != extra) fail("v_extra: shape = {}, expected the {} tokens of k_extra", to_string(v->shape), extra);
  const auto kv = std::make_shared<KeyValues>(heads, in.problem.D, in.problem.Dv, extra, in.kv->arithmetic());
  kv->append(*k, *v);
  Source& source = plan.sources.emplace_back();
  source.layout = kv->layout();
  for (Index head = 0; head < heads; ++head) {
    SourceView& view = source.views.emplace_back();
    view.keys = kv->keys(head), view.values = kv->values(head), view.columns = extra;
  }
  plan.keep.push_back(kv);
  return static_cast<Index>(plan.sources.size()) - 1;
}

bool has(const Params& p, std::string_view name) {
  for (const auto& [known, value] : p.values())
    if (known == name) return true;
  return false;
}

}  // namespace

std::vector<ParamSpec> neighborhood_params() {
  ParamSpec kernel = list("kernel_size", "", 2, "keys in a window, per axis");
  kernel.required = true;
  ParamSpec causal =
      list("is_causal", "0", 0, "per axis, 1: a query sees no later key of that axis; --causal: all axes");
  causal.most = 1;
  return {grid_spec(), kernel, list("dilation", "1", 1, "per axis: every how many-th token makes up a window"), causal};
}

std::vector<ExtraSpec> neighborhood_extras() {
  const std::vector<DType> real{DType::f32, DType::f16, DType::bf16};
  return {{"k_extra", real, {"B", "Hk", "*", "D"}, false, "keys that every query sees, in the same softmax", true},
          {"v_extra", real, {"B", "Hk", "*", "Dv"}, false, "their values", true}};
}

GridWindow read_windows(const Params& p, const Inputs& in) {
  const GridShape grid = read_grid(p, in.problem);
  const Extents kernel = read_per_axis(p, "kernel_size", grid, 1), dilation = read_per_axis(p, "dilation", grid, 1);
  const Extents causal = read_per_axis(p, "is_causal", grid, 0);
  const Extents stride = has(p, "stride") ? read_per_axis(p, "stride", grid, 1) : Extents{1, 1, 1};
  GridWindow window;
  for (Index named = 0; named < grid.axes; ++named) {
    const size_t a = grid.axis(named);
    window[a] = {.length = grid.length[a],
                 .kernel = kernel[a],
                 .stride = stride[a],
                 .dilation = dilation[a],
                 .causal = in.problem.causal || causal[a] != 0};
    if (kernel[a] > grid.length[a] / dilation[a])
      fail_usage("{}: kernel_size · dilation = {} · {} on axis {}, expected at most its length {}", p.owner(),
                 kernel[a], dilation[a], named, grid.length[a]);
    if (stride[a] > kernel[a])
      fail_usage("{}: stride = {} on axis {}, expected at most kernel_size = {}", p.owner(), stride[a], named,
                 kernel[a]);
  }
  return window;
}

Plan plan_neighborhood(const Params& p, const Inputs& in) {
  Plan plan = make_plan(in.problem, in.q, *in.kv, in.rule, Lanes::per_kv_head);
  const auto windows = std::make_shared<SlidingTiles>(read_windows(p, in));
  windows->prepare(plan, *in.kv);
  plan.keep.push_back(windows);
  const Index extra = add_extra_keys(p, in, plan);
  const Index extra_keys = extra == 0 ? 0 : plan.sources.back().views[0].columns;

  plan.emit = [=, windows = windows.get()](const RowBlock& rows, Tiles& tiles) {
    windows->emit(rows, tiles);
    tiles.add(Set::range(0, rows.rows), Set::range(0, extra_keys), Mask::full(), extra);
  };
  return plan;
}

void finish_neighborhood_gradient(const Params&, const Inputs& in, const Differentiated& done, AttendGradients& out) {
  if (in.find("k_extra") == nullptr) return;
  const auto give = [&](const char* name, const Tensor& x) {
    Tensor d(DType::f32, in.find(name)->shape);
    std::copy_n(x.as<float>(), x.size(), d.as<float>());
    out.extra.emplace(name, std::move(d));
  };
  give("k_extra", done.gradients.sources.back().dk), give("v_extra", done.gradients.sources.back().dv);
}

}  // namespace heed::mechanism
