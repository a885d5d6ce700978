// dhsa's boundary predictor by its equations, gap by gap, and weights for it.
#pragma once

#include <cmath>
#include <map>
#include <random>
#include <string>
#include <vector>

#include "heed/base/tensor.h"

namespace heed::test {

/// Weights as the mechanism's tensors lay them out. c: C = Hk·D, h: H.
struct PredictorWeights {
  Index c, h;
  std::vector<float> qkv, out, norm, hidden, score;  // [3, C, C], [C, C], [2, C], [4C + 2, H], [H + 1]

  PredictorWeights(Index width, Index units, std::uint64_t seed) : c(width), h(units) {
    std::mt19937_64 random(seed);
    std::normal_distribution<float> normal;
    const auto fill = [&](std::vector<float>& x, Index count, float scale) {
      x.resize(static_cast<size_t>(count));
      for (float& v : x) v = scale * normal(random);
    };
    fill(qkv, 3 * c * c, 1 / std::sqrt(static_cast<float>(c)));
    fill(out, c * c, 1 / std::sqrt(static_cast<float>(c)));
    fill(norm, 2 * c, 1);
    fill(hidden, (4 * c + 2) * h, 1 / std::sqrt(static_cast<float>(4 * c)));
    fill(score, h + 1, 1 / std::sqrt(static_cast<float>(h)));
  }
  /// Views, which this must outlive.
  std::map<std::string, TensorView, std::less<>> tensors() const& {
    return {{"predictor_qkv", {qkv.data(), DType::f32, {3, c, c}}},
            {"predictor_out", {out.data(), DType::f32, {c, c}}},
            {"predictor_norm", {norm.data(), DType::f32, {2, c}}},
            {"predictor_hidden", {hidden.data(), DType::f32, {4 * c + 2, h}}},
            {"predictor_score", {score.data(), DType::f32, {h + 1}}}};
  }
  void tensors() const&& = delete;
};

/// The logit that a chunk ends after token i of keys [N][C], whose window must lie inside.
inline double naive_boundary_logit(const std::vector<std::vector<double>>& keys, Index i, Index half, Index heads,
                                   const PredictorWeights& w) {
  const size_t c = static_cast<size_t>(w.c), window = static_cast<size_t>(2 * half), d = c / static_cast<size_t>(heads);
  using Rows = std::vector<std::vector<double>>;
  const auto times = [&](const std::vector<double>& x, const float* matrix, size_t columns) {
    std::vector<double> y(columns, 0.0);
    for (size_t f = 0; f < x.size(); ++f)
      for (size_t j = 0; j < columns; ++j) y[j] += x[f] * static_cast<double>(matrix[f * columns + j]);
    return y;
  };
  Rows q, k, v;
  for (size_t t = 0; t < window; ++t) {
    const std::vector<double>& x = keys[static_cast<size_t>(i - half + 1) + t];
    q.push_back(times(x, w.qkv.data(), c));
    k.push_back(times(x, w.qkv.data() + c * c, c));
    v.push_back(times(x, w.qkv.data() + 2 * c * c, c));
  }
  std::vector<double> l(c, 0.0), r(c, 0.0);
  for (size_t t = 0; t < window; ++t) {
    std::vector<double> mixed(c, 0.0);
    for (size_t head = 0; head < static_cast<size_t>(heads); ++head) {
      std::vector<double> p(window);
      double sum = 0;
      for (size_t j = 0; j < window; ++j) {
        double s = 0;
        for (size_t f = head * d; f < (head + 1) * d; ++f) s += q[t][f] * k[j][f];
        sum += p[j] = std::exp(s / std::sqrt(static_cast<double>(d)));
      }
      for (size_t j = 0; j < window; ++j)
        for (size_t f = head * d; f < (head + 1) * d; ++f) mixed[f] += p[j] / sum * v[j][f];
    }
    const std::vector<double> y = times(mixed, w.out.data(), c);
    double mean = 0, variance = 0;
    for (const double x : y) mean += x / static_cast<double>(c);
    for (const double x : y) variance += (x - mean) * (x - mean) / static_cast<double>(c);
    for (size_t f = 0; f < c; ++f)
      (t < window / 2 ? l : r)[f] += ((y[f] - mean) / std::sqrt(variance + 1e-5) * static_cast<double>(w.norm[f]) +
                                      static_cast<double>(w.norm[c + f])) /
                                     static_cast<double>(half);
  }
  std::vector<double> x = l;
  x.insert(x.end(), r.begin(), r.end());
  double dot = 0, ll = 0, rr = 0;
  for (size_t f = 0; f < c; ++f) x.push_back(std::fabs(l[f] - r[f]));
  for (size_t f = 0; f < c; ++f) {
    x.push_back(l[f] * r[f]);
    dot += l[f] * r[f], ll += l[f] * l[f], rr += r[f] * r[f];
  }
  x.push_back(dot / std::sqrt(ll * rr));
  x.push_back(1);
  const std::vector<double> hidden = times(x, w.hidden.data(), static_cast<size_t>(w.h));
  double logit = static_cast<double>(w.score.back());
  for (size_t j = 0; j < hidden.size(); ++j) logit += std::max(0.0, hidden[j]) * static_cast<double>(w.score[j]);
  return logit;
}

}  // namespace heed::test
