#include "heed/plan/select.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>

#include "heed/kernel/kernels.h"

namespace heed {
namespace {

// The best few so far, worst last, on a stack: for small k a shift beats a heap.
constexpr Index few = 32;

Index choose_few(const float* scores, Index n, Index k, Ties ties, std::int32_t* chosen) {
  float best[few];
  std::fill_n(best, k, -std::numeric_limits<float>::infinity());
  Index held = 0;
  // Scores come by ascending index, so an equal one displaces its elders only where the higher index
  // wins: then the bound is the next float below.
  const auto bound = [&](float x) { return ties == Ties::lower ? x : std::nextafter(x, -std::numeric_limits<float>::infinity()); };
  const auto insert = [&](float score, Index index) {
    Index at = held < k ? held++ : k - 1;
    for (; at > 0 && (ties == Ties::lower ? best[at - 1] < score : best[at - 1] <= score); --at)
      best[at] = best[at - 1], chosen[at] = chosen[at - 1];
    best[at] = score, chosen[at] = static_cast<std::int32_t>(index);
  };
  for (Index i = 0; i < k; ++i) insert(scores[i], i);
  for (Index i = k; (i = kernels().find_above(scores, i, n, bound(best[k - 1]))) < n; ++i) insert(scores[i], i);
  return k;
}

}  // namespace

Index choose_top(const float* scores, Index n, Index k, Ties ties, std::int32_t* chosen) {
  k = std::min(k, n);
  if (k <= 0) return 0;
  if (k == n) {
    for (Index i = 0; i < n; ++i) chosen[i] = static_cast<std::int32_t>(i);
    return n;
  }
  if (k <= few) {
    choose_few(scores, n, k, ties, chosen);
    std::sort(chosen, chosen + k);
    return k;
  }
  // The least of the best k by halving the interval that holds it: every pass only counts, which
  // vectorises. Integers order as floats do; adding zero makes -0 and 0 one.
  const auto ordered = [&](Index i) {
    const auto bits = std::bit_cast<std::int32_t>(scores[i] + 0.0f);
    return bits ^ ((bits >> 31) & 0x7fffffff);
  };
  const auto count_above = [&](std::int32_t bound) {
    std::int32_t count = 0;
    for (Index i = 0; i < n; ++i) count += ordered(i) > bound ? 1 : 0;
    return static_cast<Index>(count);
  };
  // More than k - 1 scores are >= low, fewer than k are above high.
  std::int32_t low = ordered(0), high = low;
  for (Index i = 1; i < n; ++i) low = std::min(low, ordered(i)), high = std::max(high, ordered(i));
  Index above = 0;  // high
  while (low < high) {
    const auto middle = static_cast<std::int32_t>(low + (static_cast<std::int64_t>(high) - low) / 2);
    const Index count = count_above(middle);
    if (count == k) {
      high = middle, above = k;
      break;
    }
    if (count > k) {
      low = middle + 1;
    } else {
      high = middle, above = count;
    }
  }
  Index equal = 0;
  for (Index i = 0; i < n; ++i) equal += ordered(i) == high ? 1 : 0;
  // All above, and of the equal ones the first or the last k - above.
  Index skip = ties == Ties::lower ? 0 : equal - (k - above), take = k - above, held = 0;
  for (Index i = 0; i < n && held < k; ++i) {
    const std::int32_t x = ordered(i);
    bool taken = x > high;
    if (x == high) taken = skip > 0 ? (--skip, false) : take > 0 && (--take, true);
    if (taken) chosen[held++] = static_cast<std::int32_t>(i);
  }
  return k;
}

}  // namespace heed
