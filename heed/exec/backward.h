// Gradients of a plan: the traversal of attend once more, over the tiles that emit gives again.
#pragma once

#include <vector>

#include "heed/exec/attend.h"

namespace heed {

/// Gradients of what one source holds, f32, views and columns as in the source.
struct SourceGradients {
  Tensor dk, dv;       // [views, columns, D], [views, columns, Dv]
  Tensor dlog_weight;  // [views, columns], empty where the source has none
};

struct PlanGradients {
  Tensor dq;                             // [B, Hq, N, D]
  std::vector<SourceGradients> sources;  // of each source of the plan, on its own
  Tensor dbias;                          // as the rule's bias is shaped, or empty
  Tensor dsinks;                         // [Hq], or empty
  AttendStats stats;                     // pairs as attend counts them
};

/// Gradients of sum(o∘dout), where o [B, Hq, R, Dv] and lse [B, Hq, R] f32 are what attend(plan) gave, R =
/// plan.rows_per_head(), and dout is shaped as o; any strides. What emit chose is taken as constant. With bf16
/// arithmetic queries, keys and values are as rounded and everything else is f32. Rows without keys give nothing.
/// Memory: O(N·D), 1 … 4 times the sources' gradients among it. The same bits for any number of threads.
/// Throws Error for shapes that do not fit.
PlanGradients attend_backward(const Plan& plan, const TensorView& o, const TensorView& lse, const TensorView& dout);

/// Adds the gradients of derived sources to those of the tokens that their columns are made of (Members) in source 0,
/// which must be the input: a copied token gets its column's gradient, each of n averaged ones the n-th part. Folded
/// sources keep their own. Log-weights of derived columns are constants.
void fold(const Plan& plan, PlanGradients& gradients);

}  // namespace heed
