// Attention of rows that each see one run of columns: what a region of tokens says of itself.
#pragma once

#include <span>

#include "heed/exec/backward.h"
#include "heed/plan/summary.h"

namespace heed {

/// o [B, Hq, R, Dv], f32, of queries [B, Hq, R, D], R <= problem.M: row r of every head sees columns
/// [spans[r].begin, spans[r].end) of `source`, by rank. Cheapest when neighbours see neighbouring columns. A row
/// that sees nothing gives zeros.
Tensor attend_spans(const Problem& problem, const Queries& queries, const Source& source, const Rule& rule,
                    std::span<const BlockRange> spans);

/// Gradients of sum(o∘dout) for that o, dout [B, Hq, R, Dv] f32: of the queries [B, Hq, R, D] and of what the source
/// holds. It attends once more.
struct SpanGradients {
  Tensor dq;
  SourceGradients source;
};
SpanGradients attend_spans_backward(const Problem& problem, const Queries& queries, const Source& source,
                                    const Rule& rule, std::span<const BlockRange> spans, const TensorView& dout);

}  // namespace heed
