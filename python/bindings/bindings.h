// What the parts of the Python module heed._core share: arrays in and out without a copy.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/map.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/unique_ptr.h>
#include <nanobind/stl/vector.h>

#include <memory>

#include "heed/mechanism/attend.h"

namespace heed::python {

namespace nb = nanobind;

/// Whatever speaks DLPack or the buffer protocol, on the CPU, any strides.
using Array = nb::ndarray<nb::ro, nb::device::cpu>;
using Arrays = std::map<std::string, Array>;

/// Throws Error for element types that heed does not have.
TensorView view_of(const std::string& name, const Array& x);

/// An f32 tensor as a NumPy array that owns it.
nb::object numpy_of(Tensor&& x);
/// Elements [shape] as a NumPy array that owns them.
template <class T>
nb::object numpy_of(std::vector<T>&& x, const std::vector<size_t>& shape) {
  auto held = std::make_unique<std::vector<T>>(std::move(x));
  T* data = held->data();
  const nb::capsule owner(held.release(), [](void* p) noexcept { delete static_cast<std::vector<T>*>(p); });
  return nb::cast(nb::ndarray<nb::numpy, T>(data, shape.size(), shape.data(), owner));
}

/// A call as heed::attend takes it; the arrays must outlive it.
struct Call {
  MechanismCall call;
  AttendInput in;
  /// dtype: "f32", "bf16" or nothing: bf16 when q, k and v all are, else f32. v may be missing: k stands in.
  Call(const Array& q, const Array& k, const Array* v, const Arrays& extra, const std::string& mechanism, bool causal,
       std::optional<float> scale, const std::optional<std::string>& dtype);
};

DType dtype_named(const std::string& argument, const std::string& name);

void bind_attend(nb::module_& m);
void bind_plan(nb::module_& m);
void bind_model(nb::module_& m);

}  // namespace heed::python
