#include "heed/base/threads.h"

#include <sched.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <exception>
#include <fstream>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

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

// True inside a body: a nested loop runs serially.
thread_local bool inside = false;

// A moment in which the next loop, or the last unit of this one, usually comes: some 20 µs. After
// it a waiting thread sleeps, so that on a busy machine it does not take the processor from the
// thread it waits for.
template <class Done>
bool spin_until(Done done) {
  for (int i = 0; i < 1000; ++i) {
    if (done()) return true;
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }
  return false;
}

// Workers that live as long as the process. A loop opens the gate, workers that are awake join, and
// the caller works too; when no unit is left it shuts the gate and waits for those who joined. One
// that wakes too late finds the gate shut, and nobody has waited for it.
class Pool {
 public:
  static Pool& instance() {
    static Pool pool;
    return pool;
  }
  ~Pool() {
    stop_ = true;
    ++calls_;
    calls_.notify_all();
    for (std::thread& w : workers_) w.join();
  }

  /// False when another loop holds the pool.
  bool run(int threads, Index units, const std::function<void(Index, int)>& body) {
    const std::unique_lock lock(busy_, std::try_to_lock);
    if (!lock) return false;
    while (static_cast<int>(workers_.size()) < threads - 1)
      workers_.emplace_back([this, index = static_cast<int>(workers_.size()) + 1] { serve(index); });
    body_ = &body, units_ = units, limit_ = threads, next_ = 0;
    error_ = nullptr;
    gate_ = open;
    ++calls_;
    calls_.notify_all();
    work(0);
    gate_ &= ~open;
    if (!spin_until([&] { return gate_ == 0; }))
      for (std::uint32_t joined; (joined = gate_) != 0;) gate_.wait(joined);
    if (error_) std::rethrow_exception(error_);
    return true;
  }

 private:
  static constexpr std::uint32_t open = 1u << 31;  // the rest of gate_ counts those who joined

  void serve(int index) {
    for (std::uint32_t seen = 0; !stop_;) {
      if (!spin_until([&] { return calls_ != seen; })) calls_.wait(seen);
      seen = calls_;
      std::uint32_t gate = gate_;
      while ((gate & open) != 0 && !gate_.compare_exchange_weak(gate, gate + 1)) {
      }
      if ((gate & open) == 0) continue;
      if (index < limit_) work(index);
      if (--gate_ == 0) gate_.notify_one();
    }
  }

  void work(int thread) {
    inside = true;
    try {
      for (Index unit; (unit = next_.fetch_add(1)) < units_;) (*body_)(unit, thread);
    } catch (...) {
      next_ = units_;
      const std::lock_guard lock(error_mutex_);
      if (!error_) error_ = std::current_exception();
    }
    inside = false;
  }

  std::mutex busy_, error_mutex_;
  std::vector<std::thread> workers_;
  std::atomic<std::uint32_t> calls_{0}, gate_{0};
  std::atomic<bool> stop_{false};
  std::atomic<Index> next_{0};
  // Of the loop that is open; written while nobody has joined.
  const std::function<void(Index, int)>* body_ = nullptr;
  Index units_ = 0;
  int limit_ = 0;
  std::exception_ptr error_;
};

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
  if (n > 1 && !inside && Pool::instance().run(n, units, body)) return;
  for (Index unit = 0; unit < units; ++unit) body(unit, 0);
}

}  // namespace heed
