#include "heed/torch/tensors.h"

namespace heed::aten {

TensorView view_of(const std::string& name, const at::Tensor& x) {
  const auto dtype = [&] {
    switch (x.scalar_type()) {
      case at::kFloat: return DType::f32;
      case at::kHalf: return DType::f16;
      case at::kBFloat16: return DType::bf16;
      case at::kInt: return DType::i32;
      case at::kByte: return DType::u8;
      default: fail("{}: dtype = {}, expected f32, f16, bf16, i32 or u8", name, c10::toString(x.scalar_type()));
    }
  }();
  return {x.const_data_ptr(), dtype, x.sizes().vec(), x.strides().vec()};
}

}  // namespace heed::aten
