#include "heed/plan/select.h"

#include <algorithm>

#include "heed/base/scratch.h"

namespace heed {

Index choose_top(const float* scores, Index n, Index k, Ties ties, std::int32_t* chosen) {
  k = std::min(k, n);
  if (k <= 0) return 0;
  if (k == n) {
    for (Index i = 0; i < n; ++i) chosen[i] = static_cast<std::int32_t>(i);
    return n;
  }
  // `chosen` is a heap whose front is the worst of the best so far. With ascending indices a new
  // score displaces an equal one only where the higher index wins.
  const auto better = [&](std::int32_t a, std::int32_t b) {
    if (scores[a] != scores[b]) return scores[a] > scores[b];
    return ties == Ties::lower ? a < b : a > b;
  };
  for (Index i = 0; i < k; ++i) chosen[i] = static_cast<std::int32_t>(i);
  std::make_heap(chosen, chosen + k, better);
  for (Index i = k; i < n; ++i) {
    const float least = scores[chosen[0]];
    if (scores[i] < least || (scores[i] == least && ties == Ties::lower)) continue;
    std::pop_heap(chosen, chosen + k, better);
    chosen[k - 1] = static_cast<std::int32_t>(i);
    std::push_heap(chosen, chosen + k, better);
  }
  std::sort(chosen, chosen + k);
  return k;
}

}  // namespace heed
