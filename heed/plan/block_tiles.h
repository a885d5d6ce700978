// Tiles of rows that see chosen blocks of keys.
#pragma once

#include <algorithm>
#include <span>

#include "heed/plan/plan.h"

namespace heed {

/// All rows of the block see the keys of `blocks` (ascending; block b: keys [b·block, (b+1)·block)) up to their own
/// positions. Neighbouring blocks make one range, which is read in place where a list would have to be packed. Blocks
/// before the first row need no mask.
inline void add_past_blocks(Tiles& tiles, const RowBlock& rows, std::span<const std::int32_t> blocks, Index block) {
  const Set all = Set::range(0, rows.rows);
  const Index first = rows.position(0), end = rows.position(rows.rows - 1) + 1;
  for (size_t i = 0, next; i < blocks.size(); i = next) {
    for (next = i + 1; next < blocks.size() && blocks[next] == blocks[next - 1] + 1;) ++next;
    const Index from = blocks[i] * block, to = std::min((blocks[next - 1] + 1) * block, end);
    tiles.add(all, Set::range(from, to), to <= first + 1 ? Mask::full() : Mask::causal());
  }
}

}  // namespace heed
