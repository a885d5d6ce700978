// Partial results over disjoint sets of keys form a monoid.
#pragma once

#include "heed/base/tensor.h"

namespace heed {

/// o [rows, Dv] and lse [rows] (natural log, -inf = no key seen), row-major, owned elsewhere.
struct Partial {
  float* o = nullptr;
  float* lse = nullptr;
  Index rows = 0, dv = 0;
};

/// Merges b into a: the attention over both sets of keys. Two empty rows merge to zeros and -inf.
/// Associative up to f32 rounding. Throws Error if the shapes differ; nothing has been written then.
void merge(Partial a, const Partial& b);

}  // namespace heed
