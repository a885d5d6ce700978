// Reading learned parts that come as extra tensors.
#pragma once

#include <vector>

#include "heed/base/tensor.h"
#include "heed/kernel/right_factor.h"

namespace heed::mechanism {

/// The elements of a vector or matrix of real numbers, row-major, widened to f32.
inline std::vector<float> values_of(const TensorView& x) {
  const Index rows = x.rank() == 2 ? x.shape[0] : 1, columns = x.shape.back();
  std::vector<float> values(static_cast<size_t>(rows * columns));
  for (Index i = 0; i < rows; ++i)
    read_f32(x.rank() == 2 ? x.at({i}) : x.data, x.dtype, x.stride.back(), columns, values.data() + i * columns);
  return values;
}

/// Matrix i of a stack x [·, k, n] of real numbers as the right factor of a product.
inline std::vector<float> matrix_panels(const TensorView& x, Index i) {
  const Index k = x.shape[1], n = x.shape[2];
  std::vector<float> values(static_cast<size_t>(k * n));
  for (Index f = 0; f < k; ++f) read_f32(x.at({i, f}), x.dtype, x.stride[2], n, values.data() + f * n);
  return right_factor(values.data(), k, n);
}

}  // namespace heed::mechanism
