// Pooled keys and values: one column stands for several tokens, by their means. Levels of growing
// groups are a pyramid.
#pragma once

#include <memory>
#include <span>
#include <vector>

#include "heed/plan/plan.h"

namespace heed {

/// Columns that stand for groups of tokens, the same groups in every head.
struct PooledColumns {
  std::shared_ptr<const KeyValues> means;  // of keys and of values, f32 sums, rounded to the input's arithmetic
  std::vector<std::int32_t> position;      // of each group's last token: past it, the whole group is past
  std::vector<float> log_weight;           // ln(tokens of the group): as many copies of the mean
  Members members;
  Index columns() const { return static_cast<Index>(position.size()); }
};

/// Column j is the mean of tokens [j·size, min((j + 1)·size, tokens)), where 1 <= tokens <= kv.size(): a group that
/// the end cuts short has the mean and the weight of what it holds. Reads (D + Dv)·tokens numbers a head.
PooledColumns pool_every(const KeyValues& kv, Index tokens, Index size);

/// Column g is the mean of order[begins[g] … begins[g + 1]), which is not empty; its position is that of the last of
/// them.
PooledColumns pool_groups(const KeyValues& kv, std::span<const std::int32_t> order, std::span<const Index> begins);

/// Whether a pooled column weighs as much as its tokens together, or as one.
enum class PooledWeight : std::uint8_t { tokens, one };

/// Adds the columns to the plan as a source, shared by the query heads of a KV head, and keeps them alive.
/// Returns the source's index.
Index add_pooled(Plan& plan, PooledColumns columns, PooledWeight weight);

/// How alike the keys are that stand at the ends of a group, [heads · ceil(tokens / block)]: for every block the mean,
/// over its complete groups of `size` tokens, of the cosine between the first and the last key (0 for a key of zeros);
/// -1 for a block without such a group. What differs is poorly served by its mean.
std::vector<float> end_similarity(const KeyValues& kv, Index tokens, Index block, Index size);

}  // namespace heed
