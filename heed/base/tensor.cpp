#include "heed/base/tensor.h"

#include <fmt/format.h>

#include <memory>

#include "heed/base/memory.h"

namespace heed {

std::string to_string(const Shape& shape) { return fmt::format("[{}]", fmt::join(shape, ", ")); }

Index elements(const Shape& shape) {
  constexpr Index limit = Index{1} << 62;
  Index n = 1;
  for (Index extent : shape) {
    if (extent < 0) fail("shape = {}, expected extents >= 0", to_string(shape));
    if (extent != 0 && n > limit / extent) fail("shape = {}, expected fewer than 2^62 elements", to_string(shape));
    n *= extent;
  }
  return n;
}

TensorView::TensorView(const void* elements_in, DType type, Shape extents)
    : data(elements_in), dtype(type), shape(std::move(extents)), stride(shape.size()) {
  Index step = 1;
  for (Index axis = rank() - 1; axis >= 0; --axis) {
    stride[static_cast<size_t>(axis)] = step;
    step *= shape[static_cast<size_t>(axis)];
  }
}

const void* TensorView::at(std::initializer_list<Index> index) const {
  Index offset = 0;
  size_t axis = 0;
  for (Index i : index) offset += i * stride[axis++];
  return static_cast<const std::byte*>(data) + offset * size_of(dtype);
}

void read_f32(const void* data, DType dtype, Index stride, Index count, float* out) {
  switch (dtype) {
    case DType::f32: {
      const auto* p = static_cast<const float*>(data);
      if (stride == 1) {
        std::memcpy(out, p, static_cast<size_t>(count) * sizeof(float));
      } else {
        for (Index i = 0; i < count; ++i) out[i] = p[i * stride];
      }
      return;
    }
    case DType::bf16: {
      const auto* p = static_cast<const bf16*>(data);
      for (Index i = 0; i < count; ++i) out[i] = to_f32(p[i * stride]);
      return;
    }
    case DType::f16: {
      const auto* p = static_cast<const std::uint16_t*>(data);
      for (Index i = 0; i < count; ++i) out[i] = f16_to_f32(p[i * stride]);
      return;
    }
    case DType::i32:
    case DType::u8:
    case DType::i8: fail("dtype = {}, expected f32, f16 or bf16", name_of(dtype));
  }
}

Tensor::Tensor(DType dtype, Shape shape) : dtype_(dtype), shape_(std::move(shape)) {
  constexpr size_t alignment = 64;
  const size_t needed = static_cast<size_t>(bytes()) + alignment;
  storage_.reserve(needed);  // not touched yet
  ask_for_large_pages(storage_.data(), static_cast<Index>(needed));
  storage_.resize(needed);
  void* p = storage_.data();
  size_t space = storage_.size();
  data_ = std::align(alignment, static_cast<size_t>(bytes()), p, space);
}

}  // namespace heed
