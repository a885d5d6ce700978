// Packed keys and values in another order, and pooled ones: sources that mechanisms derive from the input.
#pragma once

#include <memory>
#include <span>
#include <vector>

#include "heed/plan/plan.h"

namespace heed {

/// Packed keys and values of their own, with the source that shows them.
struct PermutedSource {
  Tensor keys, values;                 // [heads, packed elements]
  std::vector<std::int32_t> position;  // [columns], or [heads, columns] where every head has its own order
  std::vector<Members> members;        // one, or one for each head
  Source source;
};

/// Column c of every head is token order[c] of `kv`, at that token's position. -1 gives a column of
/// zeros, at position 0, that masks must hide. A copy of packed columns: no rounding.
std::shared_ptr<const PermutedSource> permute(const KeyValues& kv, std::span<const std::int32_t> order);
/// The same for some heads only: view i of the source is head heads[i].
std::shared_ptr<const PermutedSource> permute(const KeyValues& kv, std::span<const std::int32_t> order,
                                              std::span<const std::int32_t> heads);

/// An order for every query head: view l (batch · query heads + query head) holds the columns orders[l] of the KV head
/// that the query head reads. All orders have the same length. Takes memory for query heads x columns of keys and
/// values.
std::shared_ptr<const PermutedSource> permute_each(const KeyValues& kv,
                                                   std::span<const std::vector<std::int32_t>> orders);

/// Adds a permuted source to the plan and keeps it alive. Returns its index, or 0, the input
/// itself, when `order` lists its columns as they stand.
Index add_permuted(Plan& plan, const KeyValues& kv, std::span<const std::int32_t> order);

/// Adds a source with keys derived from the input's, one for each token, and the input's own values, and keeps
/// it alive. `keys` has the heads, the head size and the arithmetic of `kv`; its own values, if any, are not
/// read. Returns the source's index.
Index add_keys(Plan& plan, const KeyValues& kv, std::shared_ptr<const KeyValues> keys);

/// One column per group of tokens: the mean of their keys and of their values, f32 sums, rounded to
/// the arithmetic of `kv`. Group g is tokens[begins[g] … begins[g + 1]).
std::shared_ptr<const KeyValues> mean_columns(const KeyValues& kv, std::span<const std::int32_t> tokens,
                                              std::span<const Index> begins);

}  // namespace heed
