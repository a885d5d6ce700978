// Strided views of tensors that somebody else owns, and the one tensor type that owns its memory.
#pragma once

#include <array>
#include <cstring>
#include <string>
#include <vector>

#include "heed/base/error.h"
#include "heed/base/types.h"

namespace heed {

/// The shape of a tensor, outermost first; at most four axes are used by operators.
using Shape = std::vector<Index>;

/// "[1, 8, 4096, 64]".
std::string to_string(const Shape& shape);

/// Number of elements; 1 for a scalar. Throws Error when an extent is negative or the product
/// exceeds 2^62, so that untrusted shapes cannot overflow.
Index elements(const Shape& shape);

/// A read-only view: element (i0, i1, …) stands at data + Σ i·stride (strides in elements).
struct TensorView {
  const void* data = nullptr;
  DType dtype = DType::f32;
  Shape shape;
  Shape stride;

  TensorView() = default;
  /// A contiguous row-major view.
  TensorView(const void* elements_in, DType type, Shape extents);
  /// A view with explicit strides, in elements.
  TensorView(const void* elements_in, DType type, Shape extents, Shape steps)
      : data(elements_in), dtype(type), shape(std::move(extents)), stride(std::move(steps)) {}

  Index rank() const { return static_cast<Index>(shape.size()); }
  bool empty() const { return data == nullptr; }
  /// Address of element (i…); missing trailing indices are 0.
  const void* at(std::initializer_list<Index> i) const;
};

/// Reads `count` elements that stand `stride` elements apart, widened to f32. Throws for i32.
void read_f32(const void* data, DType dtype, Index stride, Index count, float* out);

/// A tensor that owns its elements, row-major, zero-initialised, 64-byte aligned.
class Tensor {
 public:
  Tensor() = default;
  Tensor(DType dtype, Shape shape);

  DType dtype() const { return dtype_; }
  const Shape& shape() const { return shape_; }
  Index size() const { return elements(shape_); }
  Index bytes() const { return size() * size_of(dtype_); }
  void* data() { return data_; }
  const void* data() const { return data_; }
  template <class T>
  T* as() {
    return static_cast<T*>(data());
  }
  template <class T>
  const T* as() const {
    return static_cast<const T*>(data());
  }
  TensorView view() const { return {data(), dtype_, shape_}; }

 private:
  DType dtype_ = DType::f32;
  Shape shape_;
  std::vector<std::byte> storage_;
  void* data_ = nullptr;
  // Moves keep data_ valid (a vector's buffer moves with it); copies would not.
 public:
  Tensor(Tensor&&) = default;
  Tensor& operator=(Tensor&&) = default;
  Tensor(const Tensor&) = delete;
  Tensor& operator=(const Tensor&) = delete;
};

}  // namespace heed
