#include "heed/plan/plan.h"

#include <algorithm>

#include "heed/kernel/kernels.h"

namespace heed {

void Queries::read(Index b, Index head, Index token, float* out) const {
  const Index d = q_.shape[3];
  read_f32(q_.at({b, head, token}), q_.dtype, q_.stride[3], d, out);
  if (arithmetic_ == DType::bf16 && q_.dtype != DType::bf16)
    for (Index i = 0; i < d; ++i) out[i] = round_to_bf16(out[i]);
}

void Queries::read_packed(const PanelLayout& layout, Index b, Index head, Index token, void* out) const {
  if (layout.product == DType::f32) {
    auto* q = static_cast<float*>(out);
    read(b, head, token, q);
    std::fill(q + layout.d, q + layout.dp, 0.0f);
    return;
  }
  Scratch& scratch = thread_scratch();
  const Scratch::Mark mark(scratch);
  float* wide = scratch.take<float>(layout.d).data();
  auto* q = static_cast<bf16*>(out);
  read(b, head, token, wide);
  kernels().round_bf16(wide, layout.d, q);
  std::fill(q + layout.d, q + layout.dp, bf16{});
}

void Plan::cut_rows_every(Index rows) {
  const Index n = problem.N, position0 = problem.position(0);
  cuts = {0};
  for (Index t = rows - position0 % rows; t < n; t += rows) cuts.push_back(t);
  if (n > 0) cuts.push_back(n);
}

Plan make_plan(const Problem& problem, const Queries& queries, const KeyValues& kv, const Rule& rule, Lanes lanes) {
  Plan plan;
  plan.problem = problem;
  plan.lanes = lanes;
  plan.queries = queries;
  plan.rule = rule;
  Source input;
  input.layout = kv.layout();
  for (Index head = 0; head < problem.B * problem.Hk; ++head) {
    SourceView view;
    view.keys = kv.keys(head);
    view.values = kv.values(head);
    view.key_scale = kv.key_scales(head), view.value_scale = kv.value_scales(head);
    view.columns = problem.M;
    input.views.push_back(view);
  }
  plan.sources.push_back(std::move(input));
  plan.cut_rows_every(256);
  return plan;
}

void show_key_rows(Plan& plan, const KeyValues& kv) {
  const KeyRows rows = kv.key_rows();
  std::vector<SourceView>& views = plan.sources[0].views;
  for (size_t head = 0; head < views.size(); ++head) views[head].key_rows = rows.row(static_cast<Index>(head), 0);
}

}  // namespace heed
