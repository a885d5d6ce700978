// Neighborhood attention on grids: what its kinds share.
#pragma once

#include "heed/mechanism/mechanism.h"
#include "heed/plan/axis_window.h"

namespace heed::mechanism {

/// grid, kernel_size, dilation and is_causal; the caller may add `stride`.
std::vector<ParamSpec> neighborhood_params();
/// k_extra and v_extra.
std::vector<ExtraSpec> neighborhood_extras();

/// The windows that the parameters describe; stride 1 where there is none. Throws UsageError for a
/// window that does not fit its axis and for a stride above the kernel.
GridWindow read_windows(const Params& p, const Inputs& in);

Plan plan_neighborhood(const Params& p, const Inputs& in);

/// Gradients of k_extra and v_extra, where they were given.
void finish_neighborhood_gradient(const Params& p, const Inputs& in, const Differentiated& done, AttendGradients& out);

}  // namespace heed::mechanism
