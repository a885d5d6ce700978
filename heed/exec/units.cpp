#include "heed/exec/units.h"

#include <algorithm>

namespace heed {
namespace {

// Calls with few rows are cut along the columns as well, so that two threads can share one decode step.
constexpr Index few_rows = 256;
// Units that such a call is cut into where there are fewer lanes and blocks, and columns suffice: 2, 3, 4 or 6 threads
// share them evenly, and with more of them starting and merging show. In long contexts a split holds so many bytes of
// keys and values at most: some tens of microseconds.
constexpr Index enough_units = 12, split_bytes = Index{512} << 10;
// Query heads that share keys are stacked while all their rows fit in one sub-block.
constexpr Index stacked_rows = 48;

}  // namespace

Units units_of(const Plan& plan) {
  const Problem& p = plan.problem;
  Units u;
  const bool stack = plan.lanes == Lanes::per_kv_head && plan.rows_per_head() * p.group() <= stacked_rows;
  u.heads = stack ? p.group() : 1;
  u.lanes = p.B * p.Hq / u.heads;
  u.blocks = std::max<Index>(0, static_cast<Index>(plan.cuts.size()) - 1);
  if (plan.rows_per_head() <= few_rows) {
    Index chunks = 0;
    for (const Source& s : plan.sources) chunks += ceil_div(s.views.empty() ? 0 : s.views[0].columns, chunk_columns);
    const Index chunk_bytes = chunk_columns / panel_columns * plan.sources.at(0).layout.panel_bytes();
    const Index wanted = std::max<Index>(1, enough_units / std::max<Index>(1, u.lanes * u.blocks));
    const Index a_split = std::clamp<Index>(ceil_div(chunks, wanted), 1, std::max<Index>(1, split_bytes / chunk_bytes));
    if (chunks > a_split) u.splits = ceil_div(chunks, a_split), u.split_chunks = a_split;
  }
  return u;
}

RowBlock block_of(const Plan& plan, const Units& u, Index lane, Index cut) {
  const Problem& p = plan.problem;
  RowBlock block;
  const Index per_batch = p.Hq / u.heads;
  block.b = lane / per_batch;
  block.head = lane % per_batch * u.heads;
  block.kv_head = block.head / p.group();
  block.first = plan.cuts[static_cast<size_t>(cut)];
  block.rows = plan.cuts[static_cast<size_t>(cut) + 1] - block.first;
  block.position0 = p.position(0);
  if (!plan.row_tokens.empty())
    block.tokens =
        plan.row_tokens[static_cast<size_t>(plan.lanes == Lanes::per_query_head ? block.b * p.Hq + block.head
                                                                                : block.b * p.Hk + block.kv_head)]
            .data();
  return block;
}

}  // namespace heed
