// Linear layers: weights packed once from any GGUF format, then one microkernel.
#pragma once

#include <functional>
#include <span>
#include <vector>

#include "heed/kernel/kernels.h"
#include "heed/model/buffer.h"
#include "heed/model/gguf.h"

namespace heed::model {

/// Rows of activations ready to be multiplied. With bf16 arithmetic they are rounded: kept as bf16
/// when the kernels multiply bf16, else as f32.
class Activations {
 public:
  /// x [rows, columns], f32, row stride ldx elements (0: columns). Kept by reference for f32
  /// arithmetic, copied otherwise. Uses threads.
  void assign(const float* x, Index rows, Index columns, DType arithmetic, Index ldx = 0);
  /// The same of rows that are made here: `row(r, out)` writes columns floats. Uses threads.
  void make(Index rows, Index columns, DType arithmetic, const std::function<void(Index r, float* out)>& row);
  Index rows() const { return rows_; }
  Index columns() const { return columns_; }
  const float* f32() const { return f32_; }
  const bf16* rounded() const { return rounded_.data(); }
  Index stride() const { return stride_; }  // elements between rows of f32() or rounded()
  Index bytes() const { return rounded_.bytes() + own_.bytes(); }

 private:
  const float* f32_ = nullptr;
  Index rows_ = 0, columns_ = 0, stride_ = 0;
  Buffer<bf16> rounded_;
  Buffer<float> own_;  // rows that are made here, and rounded values as f32
  void reach(Index rows, Index columns, DType arithmetic);
};

/// y = x · W^T with W [outputs, inputs]. Packed for the kernels in use when it was made.
class Linear {
 public:
  Linear() = default;
  /// Packs W into panels of 64 outputs; with bf16 arithmetic the weights are rounded. Uses threads. keep_file: the
  /// tensor's own bytes outlive this object and serve apply_row().
  Linear(const GgufTensor& w, DType arithmetic, bool keep_file = false);
  Index inputs() const { return inputs_; }
  Index outputs() const { return outputs_; }
  Index panels() const { return ceil_div(outputs_, panel_columns); }
  Index bytes() const { return f32_panels_.bytes() + bf16_panels_.bytes(); }
  /// Bytes that packing W takes, before it is done.
  static Index packed_bytes(Index outputs, Index inputs, DType arithmetic);

  /// y [x.rows(), outputs], row stride ldy >= round_up(outputs, 16) floats. Uses threads.
  void apply(const Activations& x, float* y, Index ldy) const;
  /// The same for outputs [first_panel·64, …): `panels` panels into y with row stride ldy, rows
  /// [row, row + rows) of x. One thread.
  void apply_panels(const Activations& x, Index row, Index rows, Index first_panel, Index panels, float* y,
                    Index ldy) const;

  struct Job {
    const Linear* linear;
    float* y;
    Index ldy;
  };
  /// Several layers of the same inputs at once, so that small ones keep every thread busy.
  static void apply_all(const Activations& x, std::span<const Job> jobs);

  /// One row of f32 activations x [inputs] times W in its file's format, read once and not rounded: what decoding is
  /// bound by. For formats of blocks x is rounded to 16 bits: each 32 of them to whole multiples of their largest
  /// magnitude / 32767; with f32 arithmetic what that leaves is rounded and multiplied as well. Throws Error where a
  /// layer kept no file. Uses threads.
  static void apply_row(const float* x, std::span<const Job> jobs);
  bool has_file() const { return !file_.bytes.empty(); }
  Index file_bytes() const { return static_cast<Index>(file_.bytes.size()); }

 private:
  GgufTensor file_;
  Index inputs_ = 0, outputs_ = 0, depth_ = 0;  // depth_: inputs padded to the kernel's step
  DType arithmetic_ = DType::f32;
  bool bf16_ = false;  // multiplied as bf16
  Buffer<float> f32_panels_;
  Buffer<bf16> bf16_panels_;
};

}  // namespace heed::model
