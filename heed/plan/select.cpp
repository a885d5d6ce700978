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

}  // namespace heed
