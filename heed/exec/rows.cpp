#include "heed/exec/rows.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace heed {

Rows load_rows(const Plan& plan, const RowBlock& block, Index heads, const PanelLayout& layout, Scratch& scratch) {
  Rows rows{.block = block, .heads = heads};
  const Index count = rows.count(), dp = layout.dp;
  rows.m = scratch.take<float>(count).data();
  rows.l = scratch.take<float>(count).data();
  rows.acc = scratch.take<float>(count * layout.dvp).data();
  std::fill_n(rows.m, count, -std::numeric_limits<float>::infinity());
  std::fill_n(rows.l, count, 0.0f);
  std::fill_n(rows.acc, count * layout.dvp, 0.0f);

  const Index bytes = dp * size_of(layout.product);
  auto* q = scratch.take<std::byte>(count * bytes).data();
  for (Index i = 0; i < count; ++i)
    plan.queries.read_packed(layout, block.b, rows.head_of(i), block.token(rows.row_of(i)), q + i * bytes);
  rows.q = q;
  return rows;
}

void merge_state(Rows& a, const float* m, const float* l, const float* acc, Index dvp) {
  for (Index i = 0; i < a.count(); ++i) {
    if (std::isinf(m[i])) continue;  // saw nothing
    const float most = std::max(a.m[i], m[i]);
    const float ours = std::isinf(a.m[i]) ? 0 : std::exp2(a.m[i] - most), theirs = std::exp2(m[i] - most);
    for (Index e = 0; e < dvp; ++e) a.acc[i * dvp + e] = a.acc[i * dvp + e] * ours + acc[i * dvp + e] * theirs;
    a.l[i] = a.l[i] * ours + l[i] * theirs;
    a.m[i] = most;
  }
}

}  // namespace heed
