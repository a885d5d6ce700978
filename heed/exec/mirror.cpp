#include "heed/exec/mirror.h"

#include <map>
#include <tuple>
#include <utility>

#include "heed/base/threads.h"

namespace heed {
namespace {

struct Sides {
  float *key_panels, *value_panels, *key_rows;  // key_panels: null where the source's own are f32
};

float widen(float x) { return x; }
float widen(bf16 x) { return to_f32(x); }

template <class T>
void mirror_panel(const PanelLayout& from, const SourceView& view, Index panel, Index qp, const Sides& to) {
  const T *keys = static_cast<const T*>(view.keys), *values = static_cast<const T*>(view.values);
  for (Index c = 0; c < panel_columns; ++c) {
    const Index column = panel * panel_columns + c;
    for (Index f = 0; f < from.d; ++f) {
      const float x = widen(keys[from.key_offset(column, f)]);
      to.key_rows[column * qp + f] = x;
      if (to.key_panels != nullptr) to.key_panels[(panel * from.d + f) * panel_columns + c] = x;
    }
    for (Index e = 0; e < from.dv; ++e)
      to.value_panels[(panel * from.dv + e) * panel_columns + c] = widen(values[from.value_offset(column, e)]);
  }
}

}  // namespace

const SourceView& Mirrors::view(const Plan& plan, Index source, const RowBlock& rows) const {
  const Problem& p = plan.problem;
  const bool per_query = plan.sources[static_cast<size_t>(source)].per_query_head;
  return views[static_cast<size_t>(source)]
              [static_cast<size_t>(per_query ? rows.b * p.Hq + rows.head : rows.b * p.Hk + rows.kv_head)];
}

Mirrors mirror_sources(Plan& plan) {
  const Index d = plan.problem.D, dv = plan.problem.Dv;
  Mirrors out;
  out.scores = {DType::f32, d, dv, d, 0};
  out.layout = {DType::f32, dv, d, dv, round_up(d, Index{16})};
  out.dvp = round_up(dv, Index{16});
  std::map<std::tuple<const void*, const void*, Index>, std::pair<const void*, SourceView>>
      known;  // key panels, mirror
  for (Source& source : plan.sources) {
    const PanelLayout from = source.layout;
    std::vector<SourceView>& mirrors = out.views.emplace_back();
    for (SourceView& view : source.views) {
      const auto [it, fresh] = known.try_emplace({view.keys, view.values, view.columns});
      auto& [key_panels, mirror] = it->second;
      if (fresh) {
        const Index panels = ceil_div(view.columns, panel_columns), columns = panels * panel_columns;
        const auto take = [&](Index n) { return out.memory.emplace_back(DType::f32, Shape{n}).as<float>(); };
        Sides to{};
        to.key_panels = from.dtype == DType::f32 ? nullptr : take(columns * d);
        to.value_panels = take(columns * dv);
        to.key_rows = take(columns * out.qp());
        parallel_for(panels, [&](Index panel, int) {
          if (from.dtype == DType::f32) mirror_panel<float>(from, view, panel, out.qp(), to);
          else mirror_panel<bf16>(from, view, panel, out.qp(), to);
        });
        key_panels = to.key_panels == nullptr ? view.keys : to.key_panels;
        mirror.keys = to.value_panels, mirror.values = to.key_rows;
      }
      mirrors.push_back(mirror);
      mirrors.back().columns = view.columns;
      view.keys = key_panels, view.values = nullptr, view.key_rows = nullptr;
    }
    source.layout = out.scores;
  }
  return out;
}

}  // namespace heed
