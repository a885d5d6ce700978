// A matrix as the right factor of Kernels::gemm_f32.
#pragma once

#include <vector>

#include "heed/kernel/panels.h"

namespace heed {

/// X [k, n], element (f, c) at x[f·row_step + c·column_step], packed in f32 panels of 64 columns; columns beyond are
/// zero.
inline std::vector<float> right_factor(const float* x, Index k, Index n, Index row_step, Index column_step) {
  std::vector<float> panels(static_cast<size_t>(round_up(n, panel_columns) * k));
  for (Index f = 0; f < k; ++f)
    for (Index c = 0; c < n; ++c)
      panels[static_cast<size_t>((c / panel_columns * k + f) * panel_columns + c % panel_columns)] =
          x[f * row_step + c * column_step];
  return panels;
}
/// Row-major.
inline std::vector<float> right_factor(const float* x, Index k, Index n) { return right_factor(x, k, n, n, 1); }

}  // namespace heed
