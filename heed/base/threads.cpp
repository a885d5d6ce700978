#include "heed/base/threads.h"

#include <omp.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <exception>
#include <fstream>
#include <mutex>
#include <string>

#include "heed/base/error.h"

namespace heed {
namespace {

int affinity_cpus() {
  cpu_set_t set;
  CPU_ZERO(&set);
  if (sched_getaffinity(0, sizeof set, &set) != 0) return 1;
  return std::max(1, CPU_COUNT(&set));
}

// cgroup v2: "max 100000" or "200000 100000" (microseconds of quota, of period).
int cgroup_cpus() {
  std::ifstream file("/sys/fs/cgroup/cpu.max");
  std::string quota;
  double period = 0;
  if (!(file >> quota >> period) || quota == "max" || period <= 0) return 1 << 20;
  char* end = nullptr;
  const double q = std::strtod(quota.c_str(), &end);
  if (end == quota.c_str() || q <= 0) return 1 << 20;
  return std::max(1, static_cast<int>(q / period + 0.5));
}

std::atomic<int> current{0};

}  // namespace

int default_threads() {
  if (const char* text = std::getenv("HEED_THREADS"); text != nullptr && *text != 0) {
    char* end = nullptr;
    const long n = std::strtol(text, &end, 10);
    if (*end != 0 || n < 1 || n > 4096) fail_usage("HEED_THREADS = {}, expected an integer 1 … 4096", text);
    return static_cast<int>(n);
  }
  return std::min(affinity_cpus(), cgroup_cpus());
}

void set_threads(int n) {
  if (n < 1 || n > 4096) fail_usage("threads = {}, expected 1 … 4096", n);
  current = n;
}

int threads() {
  int n = current;
  if (n == 0) current = n = default_threads();
  return n;
}

void parallel_for(Index units, const std::function<void(Index, int)>& body) {
  const int n = static_cast<int>(std::min<Index>(threads(), units));
  if (n <= 1 || omp_in_parallel()) {
    for (Index unit = 0; unit < units; ++unit) body(unit, 0);
    return;
  }
  std::atomic<Index> next{0};
  std::exception_ptr error;
  std::mutex error_mutex;
#pragma omp parallel num_threads(n)
  {
    const int thread = omp_get_thread_num();
    try {
      for (Index unit; (unit = next.fetch_add(1)) < units;) body(unit, thread);
    } catch (...) {
      next = units;
      const std::lock_guard lock(error_mutex);
      if (!error) error = std::current_exception();
    }
  }
  if (error) std::rethrow_exception(error);
}

}  // namespace heed
