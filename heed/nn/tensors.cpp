#include "heed/nn/tensors.h"

#include <cstring>

namespace heed::nn {

TensorView view_of(const at::Tensor& x) {
  const auto dtype = [&] {
    switch (x.scalar_type()) {
      case at::kFloat: return DType::f32;
      case at::kHalf: return DType::f16;
      case at::kBFloat16: return DType::bf16;
      case at::kInt: return DType::i32;
      case at::kByte: return DType::u8;
      default: fail("tensor: dtype = {}, expected f32, f16, bf16, i32 or u8", c10::toString(x.scalar_type()));
    }
  };
  return {x.const_data_ptr(), dtype(), {x.sizes().begin(), x.sizes().end()}, {x.strides().begin(), x.strides().end()}};
}

void copy_into(const at::Tensor& to, const TensorView& from, const std::string& what) {
  const TensorView here = view_of(to);
  if (from.shape != here.shape || from.dtype != here.dtype)
    fail("{}: {} {}, expected {} {}", what, name_of(from.dtype), to_string(from.shape), name_of(here.dtype),
         to_string(here.shape));
  if (!to.is_contiguous()) fail("{}: strides, expected a tensor without gaps", what);
  std::memcpy(to.data_ptr(), from.data, static_cast<size_t>(elements(from.shape) * size_of(from.dtype)));
}

}  // namespace heed::nn
