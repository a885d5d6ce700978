// Gradients by central differences of a loss that a test computes in f64.
#pragma once

#include <functional>
#include <vector>

#include "support/cases.h"

namespace heed::test {

/// sum(o∘dout) of a naive o [B, Hq, N, Dv].
inline double loss_of(const std::vector<double>& o, const Sample& dout) {
  const Shape s = dout.view().shape;
  double sum = 0;
  size_t i = 0;
  for (Index b = 0; b < s[0]; ++b)
    for (Index h = 0; h < s[1]; ++h)
      for (Index t = 0; t < s[2]; ++t)
        for (Index e = 0; e < s[3]; ++e) sum += o[i++] * dout.get(b, h, t, e);
  return sum;
}

/// d loss / d x for every element, in their order; `loss` reads x, which must hold f32. Steps are what f32 makes of
/// `step`: larger where a loss keeps something in f32 on its way.
inline std::vector<double> differences(Sample& x, const std::function<double()>& loss, double step = 1e-4) {
  const Shape s = x.view().shape;
  std::vector<double> slopes;
  for (Index b = 0; b < s[0]; ++b)
    for (Index h = 0; h < s[1]; ++h)
      for (Index t = 0; t < s[2]; ++t)
        for (Index i = 0; i < s[3]; ++i) {
          const double before = x.get(b, h, t, i);
          x.set(b, h, t, i, before + step);
          const double above = x.get(b, h, t, i), more = loss();
          x.set(b, h, t, i, before - step);
          slopes.push_back((more - loss()) / (above - x.get(b, h, t, i)));
          x.set(b, h, t, i, before);
        }
  return slopes;
}
inline std::vector<double> differences(std::vector<float>& x, const std::function<double()>& loss) {
  std::vector<double> slopes;
  for (float& at : x) {
    const float before = at, above = before + 1e-4f, below = before - 1e-4f;
    at = above;
    const double more = loss();
    at = below;
    slopes.push_back((more - loss()) / (static_cast<double>(above) - static_cast<double>(below)));
    at = before;
  }
  return slopes;
}

/// The same numbers in f32 with f32 arithmetic: what gradients in bf16 are compared with, as a difference cannot be
/// taken of rounded numbers.
inline Case widened(const Case& c) {
  Case wide(c.size);
  const auto copy = [](const Sample& from, Sample& to, bool round) {
    const Shape s = to.view().shape;
    for (Index b = 0; b < s[0]; ++b)
      for (Index h = 0; h < s[1]; ++h)
        for (Index t = 0; t < s[2]; ++t)
          for (Index i = 0; i < s[3]; ++i) {
            const double x = from.get(b, h, t, i);
            to.set(b, h, t, i, round ? nearest_bf16(x) : x);
          }
  };
  const bool round = c.arithmetic == DType::bf16;
  copy(c.q, wide.q, round), copy(c.k, wide.k, round), copy(c.v, wide.v, round);
  return wide;
}

}  // namespace heed::test
