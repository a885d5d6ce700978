// How packed keys and values lie in memory. Every kernel, instruction set and cache uses this layout.
//
// Columns (keys) come in panels of 64. Stored as f32 or i8:
//   keys    panel p, feature d, column c   at  (p·D + d)·64 + c          the panel is K^T
//   values  column j, feature e            at  j·DvP + e                 rows, padded
// Stored as bf16: the summed axis comes in pairs, as dot-product and tile instructions want it, and as a shift and a
// mask widen it where there are none:
//   keys    panel p, feature d, column c   at  ((p·DP/2 + d/2)·64 + c)·2 + d%2
//   values  column j, feature e            at  ((j/2)·DvP + e)·2 + j%2
// DP and DvP are D and Dv rounded up by PanelLayout; padding is zero.
// Numbers stored as i8 are whole, -127 … 127, and count times a scale of their column: one for its key, one for its
// value, both f32, kept beside the panels.
#pragma once

#include "heed/base/types.h"

namespace heed {

inline constexpr Index panel_columns = 64;
/// Columns between two looks at the running maximum. Chunks stand at absolute multiples of it, so
/// a row's bits depend on the columns it meets and not on how rows were grouped.
inline constexpr Index chunk_columns = 256;

/// Element strides of packed keys and values for one head.
struct PanelLayout {
  DType dtype = DType::f32;  // what is stored: f32, bf16 or i8
  Index d = 0, dv = 0;       // features of keys and of values
  Index dp = 0, dvp = 0;     // padded: dp to the kernel's step, dvp to 16
  // What kernels multiply: queries are packed in this type, weights are rounded to it. bf16 where they have such a
  // product of bf16 panels, else f32.
  DType product = dtype == DType::bf16 ? DType::bf16 : DType::f32;

  /// The layout of copies that are made of some columns: i8 is widened.
  PanelLayout of_copies() const { return dtype == DType::i8 ? PanelLayout{DType::f32, d, dv, dp, dvp} : *this; }
  /// Bytes of a panel, keys and values, scales apart.
  Index panel_bytes() const { return (dp + dvp) * panel_columns * size_of(dtype); }
  Index panel_elements() const { return dp * panel_columns; }
  Index key_elements(Index columns) const { return ceil_div(columns, panel_columns) * panel_elements(); }
  Index value_elements(Index columns) const { return round_up(columns, panel_columns) * dvp; }
  Index key_offset(Index column, Index feature) const {
    const Index panel = column / panel_columns, c = column % panel_columns;
    if (dtype == DType::bf16) return ((panel * (dp / 2) + feature / 2) * panel_columns + c) * 2 + feature % 2;
    return (panel * dp + feature) * panel_columns + c;
  }
  Index value_offset(Index column, Index feature) const {
    if (dtype == DType::bf16) return ((column / 2) * dvp + feature) * 2 + column % 2;
    return column * dvp + feature;
  }
};

}  // namespace heed
