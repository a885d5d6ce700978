#include "heed/exec/merge.h"

#include <cmath>

#include "heed/base/error.h"

namespace heed {

void merge(Partial a, const Partial& b) {
  if (a.rows != b.rows || a.dv != b.dv)
    fail("merge: b = [{}, {}], expected the shape of a, [{}, {}]", b.rows, b.dv, a.rows, a.dv);
  for (Index i = 0; i < a.rows; ++i) {
    const float la = a.lse[i], lb = b.lse[i];
    float* x = a.o + i * a.dv;
    const float* y = b.o + i * b.dv;
    if (std::isinf(lb) && lb < 0) {
      if (std::isinf(la) && la < 0)
        for (Index e = 0; e < a.dv; ++e) x[e] = 0;
      continue;
    }
    // With both sums relative to the larger one, neither exponential overflows.
    const float most = std::fmax(la, lb), wa = std::exp(la - most), wb = std::exp(lb - most), sum = wa + wb;
    for (Index e = 0; e < a.dv; ++e) x[e] = ((wa > 0 ? wa * x[e] : 0) + wb * y[e]) / sum;
    a.lse[i] = most + std::log(sum);
  }
}

}  // namespace heed
