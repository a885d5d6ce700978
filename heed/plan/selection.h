// Lists that row blocks select, kept for more than one call.
#pragma once

#include <functional>
#include <span>

#include "heed/plan/plan.h"

namespace heed {

/// What a row block of a query head selected; the memory is the scratch's or the function's own.
using Select = std::function<std::span<const std::int32_t>(const RowBlock&, Scratch&)>;

/// What `select` gives for every row block of a plan of one lane per query head whose cuts stand: selected now, in
/// parallel, and kept, so that calls to come can use it as well.
Select select_now(const Plan& plan, const Select& select);

}  // namespace heed
