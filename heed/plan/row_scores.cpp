#include "heed/plan/row_scores.h"

#include <algorithm>

#include "heed/kernel/kernels.h"

namespace heed {

void score_keys(const Queries& queries, const KeyValues& kv, const Problem& problem, Index b, Index head, Index first,
                Index rows, Index end, float* scores, Index stride) {
  const PanelLayout& layout = kv.layout();
  const void* keys = kv.keys(b * problem.Hk + head / problem.group());
  const Index columns = round_up(end, panel_columns), dp = layout.dp;
  Scratch& scratch = thread_scratch();
  const Scratch::Mark mark(scratch);
  float* q = scratch.take<float>(rows * dp).data();
  std::fill_n(q, rows * dp, 0.0f);
  for (Index i = 0; i < rows; ++i) queries.read(b, head, first + i, q + i * dp);
  if (layout.dtype == DType::f32) {
    kernels().gemm_f32(rows, columns, dp, q, dp, static_cast<const float*>(keys), scores, stride, false);
    return;
  }
  bf16* rounded = scratch.take<bf16>(rows * dp).data();
  kernels().round_bf16(q, rows * dp, rounded);
  kernels().gemm_bf16(rows, columns, dp, rounded, dp, static_cast<const bf16*>(keys), scores, stride, false);
}

}  // namespace heed
