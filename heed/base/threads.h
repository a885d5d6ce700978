// Threads: how many, and a parallel loop whose units any thread may take.
#pragma once

#include <functional>

#include "heed/base/types.h"

namespace heed {

/// Threads that heed uses by default: HEED_THREADS, else the smaller of the affinity mask and the
/// cgroup's CPU quota. Throws Error when HEED_THREADS is not an integer >= 1.
int default_threads();

/// Sets / reads the number of threads used from now on (>= 1).
void set_threads(int n);
int threads();

/// Calls body(unit, thread) for unit = 0 … units-1 in that order of start, each unit on whichever
/// thread is free. thread < threads(). Results must not depend on which thread ran a unit.
/// The first exception thrown by a body is rethrown here after all threads have stopped.
/// A body may not itself call parallel_for in parallel: nested calls run serially.
void parallel_for(Index units, const std::function<void(Index unit, int thread)>& body);

}  // namespace heed
