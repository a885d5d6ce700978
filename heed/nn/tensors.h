// heed's views of torch's tensors, and copies both ways.
#pragma once

#include <ATen/core/Tensor.h>

#include "heed/base/tensor.h"

namespace heed::nn {

/// A view of a tensor that the caller keeps alive. f32, f16, bf16, i32 or u8; any strides. Throws Error for others.
TensorView view_of(const at::Tensor& x);
/// Copies `from` into `to`, which has the same shape and element type. Throws Error naming `what` when it has not.
void copy_into(const at::Tensor& to, const TensorView& from, const std::string& what);
/// Copies of f32 tensors, `from` without gaps. Throws Error for other types.
at::Tensor torch_copy(const TensorView& from);
Tensor heed_copy(const at::Tensor& from);

}  // namespace heed::nn
