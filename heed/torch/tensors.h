// heed's views of torch's tensors.
#pragma once

#include <ATen/core/Tensor.h>

#include <string>

#include "heed/base/tensor.h"

namespace heed::aten {

/// A view of a tensor that the caller keeps alive. f32, f16, bf16, i32 or u8; any strides. Throws Error naming `name`
/// for others.
TensorView view_of(const std::string& name, const at::Tensor& x);

}  // namespace heed::aten
