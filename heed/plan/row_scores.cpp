#include "heed/plan/row_scores.h"

#include <algorithm>

#include "heed/kernel/kernels.h"

namespace heed {

void score_keys(const Queries& queries, const KeyValues& kv, const Problem& problem, Index b, Index head, Index first,
                Index rows, Index end, float* scores, Index stride) {
  const PanelLayout& layout = kv.layout();
  const Index lane = b * problem.Hk + head / problem.group(), row_bytes = layout.dp * size_of(layout.product);
  Scratch& scratch = thread_scratch();
  const Scratch::Mark mark(scratch);
  auto* q = scratch.take<std::byte>(rows * row_bytes).data();
  for (Index i = 0; i < rows; ++i) queries.read_packed(layout, b, head, first + i, q + i * row_bytes);
  multiply_keys({layout, kv.keys(lane), kv.key_scales(lane)}, 0, round_up(end, panel_columns), q, rows, scores, stride);
}

}  // namespace heed
