#include "heed/exec/spans.h"

#include <algorithm>

#include "heed/exec/attend.h"

namespace heed {
namespace {

Plan plan_spans(const Problem& problem, const Queries& queries, const Source& source, const Rule& rule,
                std::span<const BlockRange> spans) {
  const Index rows = static_cast<Index>(spans.size());
  Plan plan;
  plan.problem = problem;
  plan.problem.N = rows;
  plan.lanes = Lanes::per_query_head;
  plan.queries = queries;
  plan.rule = rule;
  plan.sources = {source};
  for (SourceView& view : plan.sources[0].views) view.position = nullptr;
  plan.cut_rows_every(256);
  // A row stands at a position of its own, and spans are what may be seen from there.
  plan.visible_first.assign(static_cast<size_t>(problem.B * problem.M), 0);
  plan.visible_end = plan.visible_first;
  for (Index b = 0; b < problem.B; ++b)
    for (Index r = 0; r < rows; ++r) {
      const auto at = static_cast<size_t>(b * problem.M + plan.problem.position(r));
      plan.visible_first[at] = static_cast<std::int32_t>(spans[static_cast<size_t>(r)].begin);
      plan.visible_end[at] = static_cast<std::int32_t>(spans[static_cast<size_t>(r)].end);
    }
  plan.emit = [spans](const RowBlock& block, Tiles& tiles) {
    const auto some = spans.subspan(static_cast<size_t>(block.first), static_cast<size_t>(block.rows));
    const auto by_begin = [](const BlockRange& a, const BlockRange& b) { return a.begin < b.begin; };
    const auto by_end = [](const BlockRange& a, const BlockRange& b) { return a.end < b.end; };
    tiles.add(Set::range(0, block.rows),
              Set::range(std::min_element(some.begin(), some.end(), by_begin)->begin,
                         std::max_element(some.begin(), some.end(), by_end)->end),
              Mask::full());
  };
  return plan;
}

}  // namespace

Tensor attend_spans(const Problem& problem, const Queries& queries, const Source& source, const Rule& rule,
                    std::span<const BlockRange> spans) {
  const Index rows = static_cast<Index>(spans.size());
  const Plan plan = plan_spans(problem, queries, source, rule, spans);
  Tensor o(DType::f32, {problem.B, problem.Hq, rows, problem.Dv});
  attend(plan, {o.as<float>(), problem.Hq * rows * problem.Dv, rows * problem.Dv, problem.Dv, nullptr});
  return o;
}

SpanGradients attend_spans_backward(const Problem& problem, const Queries& queries, const Source& source,
                                    const Rule& rule, std::span<const BlockRange> spans, const TensorView& dout) {
  const Index rows = static_cast<Index>(spans.size());
  const Plan plan = plan_spans(problem, queries, source, rule, spans);
  Tensor o(DType::f32, {problem.B, problem.Hq, rows, problem.Dv}), lse(DType::f32, {problem.B, problem.Hq, rows});
  attend(plan, {o.as<float>(), problem.Hq * rows * problem.Dv, rows * problem.Dv, problem.Dv, lse.as<float>()});
  PlanGradients found = attend_backward(plan, o.view(), lse.view(), dout);
  return {std::move(found.dq), std::move(found.sources[0])};
}

}  // namespace heed
