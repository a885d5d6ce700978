#include "heed/plan/bounds.h"

#include <algorithm>

#include "heed/kernel/kernels.h"
#include "heed/plan/block_tiles.h"
#include "heed/plan/select.h"

namespace heed {

Plan plan_bounded_step(const Problem& problem, const Queries& queries, const KeyValues& kv, const Rule& rule,
                       Index block, Index count) {
  const Index d = problem.D, keys = problem.M, last = (keys - 1) / block;
  Plan plan = make_plan(problem, queries, kv, rule, count < last ? Lanes::per_query_head : Lanes::per_kv_head);
  if (count >= last) {
    plan.emit = [=](const RowBlock&, Tiles& tiles) { tiles.add(Set::range(0, 1), Set::range(0, keys), Mask::full()); };
    return plan;
  }
  const BlockBounds& all = kv.block_bounds(block);
  const auto bounds_of = [bounds = all.bounds.data(), capacity = all.capacity, d](Index head, Index b) {
    return bounds + (head * capacity + b) * 2 * d;
  };
  plan.emit = [=](const RowBlock& rows, Tiles& tiles) {
    const auto chosen = tiles.take<std::int32_t>(count + 1);
    const auto scores = tiles.take<float>(last);
    float* parts = tiles.take<float>(2 * d).data();
    // max(q·most, q·least) is q·most where q > 0 and q·least elsewhere: one dot product with [q+; q-].
    queries.read(rows.b, rows.head, rows.token(0), parts);
    for (Index f = 0; f < d; ++f) parts[d + f] = std::min(parts[f], 0.0f), parts[f] = std::max(parts[f], 0.0f);
    for (Index b = 0; b < last; ++b)
      scores[static_cast<size_t>(b)] = kernels().dot(parts, bounds_of(rows.b * problem.Hk + rows.kv_head, b), 2 * d);
    choose_top(scores.data(), last, count, Ties::lower, chosen.data());
    chosen.back() = static_cast<std::int32_t>(last);
    add_past_blocks(tiles, rows, chosen, block);
  };
  return plan;
}

}  // namespace heed
