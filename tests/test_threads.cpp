// The parallel loop and the number of threads.
#include <doctest/doctest.h>

#include <atomic>
#include <cstdlib>
#include <string>
#include <vector>

#include "heed/base/error.h"
#include "heed/base/scratch.h"
#include "heed/base/threads.h"
#include "support/naive.h"

using namespace heed;
using heed::test::UseThreads;

namespace {

/// Sets HEED_THREADS for a scope.
class Environment {
 public:
  explicit Environment(const char* value) {
    if (const char* old = std::getenv("HEED_THREADS"); old != nullptr) before_ = old, had_ = true;
    setenv("HEED_THREADS", value, 1);
  }
  ~Environment() {
    if (had_) setenv("HEED_THREADS", before_.c_str(), 1);
    else unsetenv("HEED_THREADS");
  }

 private:
  std::string before_;
  bool had_ = false;
};

}  // namespace

TEST_CASE("every unit runs once") {
  for (const int n : {1, 2, 3, 8})
    for (const Index units : {0, 1, 2, 7, 1000}) {
      const UseThreads use(n);
      CHECK(threads() == n);
      std::vector<std::atomic<int>> runs(static_cast<size_t>(units));
      std::atomic<int> strays{0};
      parallel_for(units, [&](Index unit, int thread) {
        runs[static_cast<size_t>(unit)]++;
        if (thread < 0 || thread >= n) strays++;
      });
      for (const auto& r : runs) CHECK(r == 1);
      CHECK(strays == 0);
    }
}

TEST_CASE("units on one thread never overlap") {
  const UseThreads use(3);
  std::atomic<int> busy[3] = {0, 0, 0}, overlaps = 0;
  parallel_for(500, [&](Index, int thread) {
    if (busy[thread]++ != 0) overlaps++;
    busy[thread]--;
  });
  CHECK(overlaps == 0);
}

TEST_CASE("an exception reaches the caller and later loops still work") {
  for (const int n : {1, 3}) {
    const UseThreads use(n);
    CHECK_FAILS(parallel_for(100,
                             [](Index unit, int) {
                               if (unit == 40) fail("unit = {}, expected another", unit);
                             }),
                Error, "unit = 40, expected another");
    std::atomic<Index> sum{0};
    parallel_for(10, [&](Index unit, int) { sum += unit; });
    CHECK(sum == 45);
  }
}

TEST_CASE("nested loops run each unit once") {
  const UseThreads use(3);
  std::atomic<int> runs{0};
  parallel_for(6, [&](Index, int) { parallel_for(5, [&](Index, int) { runs++; }); });
  CHECK(runs == 30);
}

TEST_CASE("the number of threads comes from HEED_THREADS") {
  {
    const Environment e("3");
    CHECK(default_threads() == 3);
  }
  for (const char* bad : {"0", "-1", "two", "2x", "1e1", "99999999999999999999"}) {
    const Environment e(bad);
    CHECK_FAILS(default_threads(), UsageError, "HEED_THREADS = " + std::string(bad) + ", expected an integer 1 … 4096");
  }
  CHECK(default_threads() >= 1);
}

TEST_CASE("fewer than one thread is refused") {
  const int before = threads();
  CHECK_FAILS(set_threads(0), UsageError, "threads = 0, expected 1 … 4096");
  CHECK_FAILS(set_threads(-2), UsageError, "threads = -2, expected 1 … 4096");
  CHECK(threads() == before);
}

TEST_CASE("scratch hands out aligned memory and takes it back") {
  Scratch scratch;
  const Scratch::Mark outer(scratch);
  const auto a = scratch.take<float>(5);
  const auto b = scratch.take<double>(1000);
  CHECK(reinterpret_cast<std::uintptr_t>(a.data()) % 64 == 0);
  CHECK(reinterpret_cast<std::uintptr_t>(b.data()) % 64 == 0);
  for (float& x : a) x = 1;
  for (double& x : b) x = 2;
  const void* inner = nullptr;
  for (int i = 0; i < 3; ++i) {
    const Scratch::Mark mark(scratch);
    const auto c = scratch.take<char>(1 << 22);  // larger than what was held
    for (char& x : c) x = 3;
    if (i == 1) inner = c.data();
    if (i == 2) CHECK(c.data() == inner);
  }
  const Index capacity = scratch.capacity();
  for (int i = 0; i < 100; ++i) {
    const Scratch::Mark mark(scratch);
    scratch.take<char>(1 << 22);
  }
  CHECK(scratch.capacity() == capacity);
  bool kept = true;
  for (const float x : a) kept = kept && x == 1;
  for (const double x : b) kept = kept && x == 2;
  CHECK(kept);
}
