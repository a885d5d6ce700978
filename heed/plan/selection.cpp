#include "heed/plan/selection.h"

#include <algorithm>
#include <memory>

#include "heed/base/threads.h"

namespace heed {

Select select_now(const Plan& plan, const Select& select) {
  const Problem& p = plan.problem;
  const Index blocks = static_cast<Index>(plan.cuts.size()) - 1;
  const auto lists = std::make_shared<std::vector<std::vector<std::int32_t>>>(static_cast<size_t>(p.B * p.Hq * blocks));
  parallel_for(p.B * p.Hq * blocks, [&](Index unit, int) {
    const size_t cut = static_cast<size_t>(unit % blocks);
    RowBlock rows;
    rows.b = unit / blocks / p.Hq, rows.head = unit / blocks % p.Hq, rows.kv_head = rows.head / p.group();
    rows.first = plan.cuts[cut], rows.rows = plan.cuts[cut + 1] - plan.cuts[cut];
    rows.position0 = p.position(0);
    if (!plan.row_tokens.empty()) rows.tokens = plan.row_tokens[static_cast<size_t>(unit / blocks)].data();
    Scratch& scratch = thread_scratch();
    const Scratch::Mark mark(scratch);
    const auto list = select(rows, scratch);
    (*lists)[static_cast<size_t>(unit)].assign(list.begin(), list.end());
  });
  return
      [lists, blocks, cuts = plan.cuts, heads = p.Hq](const RowBlock& rows, Scratch&) -> std::span<const std::int32_t> {
        const Index cut = std::lower_bound(cuts.begin(), cuts.end(), rows.first) - cuts.begin();
        return (*lists)[static_cast<size_t>((rows.b * heads + rows.head) * blocks + cut)];
      };
}

}  // namespace heed
