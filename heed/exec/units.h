// How the work of a plan is cut into units.
#pragma once

#include <limits>

#include "heed/plan/plan.h"

namespace heed {

/// Units of work: (lane, row block, split). A function of shapes alone.
struct Units {
  Index heads = 1;  // query heads that share keys, stacked
  Index lanes = 0;  // per batch and head (or KV head when stacked)
  Index blocks = 0, splits = 1;
  Index split_chunks = std::numeric_limits<Index>::max();  // chunks that one split holds
  Index count() const { return lanes * blocks * splits; }
};
Units units_of(const Plan& plan);

/// Rows cuts[cut] … cuts[cut + 1] of the lane's heads.
RowBlock block_of(const Plan& plan, const Units& units, Index lane, Index cut);

}  // namespace heed
