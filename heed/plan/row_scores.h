// The scores of a few query rows, for what is read off attention beside its output.
#pragma once

#include "heed/plan/plan.h"

namespace heed {

/// scores[i·stride + c] = <query of token first + i, key of token c>, for c = 0 … end - 1 and `rows` query tokens of
/// one head, not scaled. stride >= `end` rounded up to 64. Keys are read where they lie packed; queries are rounded as
/// attention rounds them.
void score_keys(const Queries& queries, const KeyValues& kv, const Problem& problem, Index b, Index head, Index first,
                Index rows, Index end, float* scores, Index stride);

}  // namespace heed
