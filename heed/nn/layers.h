// The few equations that layers are made of, on torch's tensors, differentiable.
#pragma once

#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>

#include "heed/base/types.h"
#include "heed/model/rope.h"

namespace heed::nn {

/// y = x·Wᵀ. x [..., inputs], w [outputs, inputs]; both are rounded to `arithmetic` (f32 or bf16) first, which is the
/// type of y [..., outputs].
at::Tensor product(const at::Tensor& x, const at::Tensor& w, at::ScalarType arithmetic);

/// x / sqrt(mean of x² over the last axis + eps) · gain, in f32. gain [features].
at::Tensor rms_norm(const at::Tensor& x, const at::Tensor& gain, double eps);

/// Rotary positions: token t turns pair i of a head by the angle t · spacing · base^(-2i/D).
class Rotary {
 public:
  Rotary(Index head_size, double base, model::RopePairs pairs, Index spacing = 1)
      : half_(head_size / 2), spacing_(spacing), base_(base), pairs_(pairs) {}
  /// x [B, H, N, D], positions 0 … N - 1. f32. Not thread-safe: the table grows.
  at::Tensor turn(const at::Tensor& x);

 private:
  Index half_, spacing_;
  double base_;
  model::RopePairs pairs_;
  at::Tensor table_;  // [positions, D/2] complex: e^(i·angle), computed in f64, kept as f32
};

}  // namespace heed::nn
