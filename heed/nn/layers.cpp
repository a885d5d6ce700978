#include "heed/nn/layers.h"

#include <ATen/ops/arange.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/mean.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/outer.h>
#include <ATen/ops/polar.h>
#include <ATen/ops/pow.h>
#include <ATen/ops/rsqrt.h>
#include <ATen/ops/view_as_complex.h>
#include <ATen/ops/view_as_real.h>

#include <algorithm>

namespace heed::nn {

at::Tensor product(const at::Tensor& x, const at::Tensor& w, at::ScalarType arithmetic) {
  return at::linear(x.to(arithmetic), w.to(arithmetic));
}

at::Tensor rms_norm(const at::Tensor& x, const at::Tensor& gain, double eps) {
  const at::Tensor wide = x.to(at::kFloat);
  return wide * at::rsqrt(wide.square().mean(-1, true) + eps) * gain;
}

at::Tensor Rotary::turn(const at::Tensor& x) {
  const Index n = x.size(2);
  if (!table_.defined() || table_.size(0) < n) {
    const Index positions = std::max<Index>(n, 512);
    const at::Tensor step = at::pow(base_, at::arange(half_, at::kDouble) * (-1.0 / static_cast<double>(half_)));
    const at::Tensor angle = at::outer(at::arange(positions, at::kDouble) * static_cast<double>(spacing_), step);
    table_ = at::polar(at::ones_like(angle), angle).to(at::kComplexFloat);
  }
  // A pair is a complex number, and turning it a product.
  const at::Tensor turn_by = table_.narrow(0, 0, n);
  if (pairs_ == model::RopePairs::adjacent)
    return at::view_as_real(at::view_as_complex(x.unflatten(-1, {half_, 2}).contiguous()) * turn_by).flatten(-2);
  const at::Tensor pairs = x.unflatten(-1, {2, half_}).transpose(-1, -2).contiguous();
  return at::view_as_real(at::view_as_complex(pairs) * turn_by).transpose(-1, -2).flatten(-2);
}

}  // namespace heed::nn
