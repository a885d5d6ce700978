// Reading learned parts that come as extra tensors.
#pragma once

#include <vector>

#include "heed/base/tensor.h"

namespace heed::mechanism {

/// The elements of a vector or matrix of real numbers, row-major, widened to f32.
inline std::vector<float> values_of(const TensorView& x) {
  const Index rows = x.rank() == 2 ? x.shape[0] : 1, columns = x.shape.back();
  std::vector<float> values(static_cast<size_t>(rows * columns));
  for (Index i = 0; i < rows; ++i)
    read_f32(x.rank() == 2 ? x.at({i}) : x.data, x.dtype, x.stride.back(), columns, values.data() + i * columns);
  return values;
}

}  // namespace heed::mechanism
