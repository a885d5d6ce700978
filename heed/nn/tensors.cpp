#include "heed/nn/tensors.h"

#include <ATen/ops/empty.h>

#include <algorithm>
#include <cstring>

#include "heed/torch/tensors.h"

namespace heed::nn {

TensorView view_of(const at::Tensor& x) { return aten::view_of("tensor", x); }

void copy_into(const at::Tensor& to, const TensorView& from, const std::string& what) {
  const TensorView here = view_of(to);
  if (from.shape != here.shape || from.dtype != here.dtype)
    fail("{}: {} {}, expected {} {}", what, name_of(from.dtype), to_string(from.shape), name_of(here.dtype),
         to_string(here.shape));
  if (!to.is_contiguous()) fail("{}: strides, expected a tensor without gaps", what);
  std::memcpy(to.data_ptr(), from.data, static_cast<size_t>(elements(from.shape) * size_of(from.dtype)));
}

at::Tensor torch_copy(const TensorView& from) {
  const at::Tensor copy = at::empty(from.shape, at::kFloat);
  copy_into(copy, from, "tensor");
  return copy;
}

Tensor heed_copy(const at::Tensor& from) {
  const at::Tensor plain = from.contiguous();
  Tensor copy(DType::f32, plain.sizes().vec());
  if (copy.size() > 0) std::copy_n(plain.const_data_ptr<float>(), copy.size(), copy.as<float>());
  return copy;
}

}  // namespace heed::nn
