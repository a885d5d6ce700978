#include "heed/plan/select.h"

#include <algorithm>

#include "heed/kernel/kernels.h"

namespace heed {

Index choose_top(const float* scores, Index n, Index k, Ties ties, std::int32_t* chosen) {
  k = std::min(k, n);
  if (k <= 0) return 0;
  if (k < n) {
    kernels().choose_top(scores, n, k, ties == Ties::higher, chosen);
  } else {
    for (Index i = 0; i < n; ++i) chosen[i] = static_cast<std::int32_t>(i);
  }
  return k;
}

Index choose_mass(const float* weights, Index n, double mass, std::int32_t* order, std::int32_t* chosen) {
  double total = 0, sum = 0;
  for (Index i = 0; i < n; ++i) order[i] = static_cast<std::int32_t>(i), total += static_cast<double>(weights[i]);
  Index count = 0;
  if (mass >= 1) {
    count = n;
  } else {
    std::sort(order, order + n, [&](std::int32_t a, std::int32_t b) {
      return weights[a] != weights[b] ? weights[a] > weights[b] : a < b;
    });
    while (count < n && sum < mass * total) sum += static_cast<double>(weights[order[count++]]);
  }
  std::copy_n(order, count, chosen);
  std::sort(chosen, chosen + count);
  return count;
}

}  // namespace heed
