// Lists that row blocks select, when selecting is dear.
#pragma once

#include <functional>
#include <span>

#include "heed/plan/plan.h"

namespace heed {

/// What a row block of a query head selected; the memory is the scratch's or the function's own.
using Select = std::function<std::span<const std::int32_t>(const RowBlock&, Scratch&)>;

/// `select`, for a plan of one lane per query head whose cuts stand. A plan of few rows is carried out
/// in splits, each of which asks for its tiles anew: there everything is selected now, once, in parallel.
/// Longer plans select when asked and keep nothing.
Select select_once(const Plan& plan, Select select);

}  // namespace heed
