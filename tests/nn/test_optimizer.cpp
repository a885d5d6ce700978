// AdamW and Muon against their equations in f64, and Muon's orthogonalisation against singular values.
#include "support/doctest_with_torch.h"

#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/eye.h>
#include <ATen/ops/linalg_svd.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>

#include <cmath>
#include <numbers>

#include "heed/base/random.h"
#include "heed/nn/optimizer.h"

using namespace heed;

namespace {

at::Tensor random_matrix(Index m, Index n, std::uint64_t seed) {
  const at::Tensor x = at::zeros({m, n}, at::kFloat);
  Random random(seed);
  for (Index i = 0; i < x.numel(); ++i) x.data_ptr<float>()[i] = static_cast<float>(random.normal());
  return x;
}

void set_gradient(const at::Tensor& w, const at::Tensor& g) { w.mutable_grad() = g.clone(); }

// u·diag(s)·vᵀ with orthonormal u and v.
at::Tensor with_singular_values(Index m, Index n, const std::vector<double>& s) {
  const auto [u, unused, vt] = at::linalg_svd(random_matrix(m, n, 4).to(at::kDouble), false);
  return at::matmul(u * at::tensor(s, at::kDouble), vt).to(at::kFloat);
}

}  // namespace

TEST_CASE("orthogonalise: singular values go near 1, singular vectors stay") {
  for (const auto& [m, n] : {std::pair{12, 40}, {40, 12}, {20, 20}, {1, 9}, {9, 1}}) {
    CAPTURE(m);
    const Index rank = std::min(m, n);
    std::vector<double> s;
    for (Index i = 0; i < rank; ++i)
      s.push_back(0.02 + 0.98 * static_cast<double>(i) / static_cast<double>(std::max<Index>(1, rank - 1)));
    if (rank == 1) s = {1};
    const at::Tensor x = with_singular_values(m, n, s);
    const at::Tensor o = nn::orthogonalise(x).to(at::kDouble);
    const auto [u, got, vt] = at::linalg_svd(o, false);
    // Of unit Frobenius norm, the smallest value may begin below 0.01 and is then only lifted: these do not.
    CHECK(got.min().item<double>() > 0.6);
    CHECK(got.max().item<double>() < 1.14);
    // x = U S Vᵀ and o = U S' Vᵀ: oᵀx is symmetric and has no negative eigenvalue.
    const at::Tensor both = at::matmul(o.t(), x.to(at::kDouble));
    CHECK((both - both.t()).abs().max().item<double>() < 1e-4);
    CHECK((nn::orthogonalise(x.t()) - nn::orthogonalise(x).t()).abs().max().item<double>() < 1e-5);
    CHECK((nn::orthogonalise(1000 * x) - nn::orthogonalise(x)).abs().max().item<double>() < 1e-4);
  }
  CHECK(nn::orthogonalise(at::zeros({3, 5})).abs().max().item<double>() == 0);
}

TEST_CASE("three steps of AdamW by its equations") {
  const at::Tensor w = random_matrix(2, 3, 1), b = random_matrix(1, 4, 2).flatten();
  std::vector<double> x;
  for (const at::Tensor& t : {w, b})
    for (Index i = 0; i < t.numel(); ++i) x.push_back(t.data_ptr<float>()[i]);
  std::vector<double> m(x.size()), v(x.size());
  nn::OptimizerOptions options;
  options.weight_decay = 0.3;
  nn::Optimizer optimizer({{"token_embd", w}, {"output_norm", b}}, options);
  for (int t = 1; t <= 3; ++t) {
    const at::Tensor gw = random_matrix(2, 3, 10 + static_cast<std::uint64_t>(t)),
                     gb = random_matrix(1, 4, 20 + static_cast<std::uint64_t>(t)).flatten();
    set_gradient(w, gw), set_gradient(b, gb);
    const double rate = 0.01 * t;
    for (size_t i = 0; i < x.size(); ++i) {
      const double g = i < 6 ? gw.data_ptr<float>()[i] : gb.data_ptr<float>()[i - 6];
      m[i] = 0.9 * m[i] + 0.1 * g, v[i] = 0.95 * v[i] + 0.05 * g * g;
      const double mean = m[i] / (1 - std::pow(0.9, t)), square = v[i] / (1 - std::pow(0.95, t));
      x[i] = (i < 6 ? 1 - rate * 0.3 : 1) * x[i] - rate * mean / (std::sqrt(square) + 1e-8);
    }
    optimizer.step(rate);
    CHECK(!w.grad().defined());
    for (size_t i = 0; i < x.size(); ++i)
      CHECK((i < 6 ? w.data_ptr<float>()[i] : b.data_ptr<float>()[i - 6]) == doctest::Approx(x[i]).epsilon(1e-5));
  }
}

TEST_CASE("Muon moves the matrices of layers, AdamW the rest; what has no gradient stays") {
  const at::Tensor w = random_matrix(6, 10, 1), e = random_matrix(6, 10, 1), still = random_matrix(6, 10, 1);
  const at::Tensor before = w.clone();
  nn::OptimizerOptions options;
  options.muon = true, options.weight_decay = 0.2;
  nn::Optimizer optimizer({{"blk.0.attn.q", w}, {"token_embd", e}, {"blk.0.attn.k", still}}, options);
  CHECK(optimizer.state().size() == 4);  // one momentum for each of Muon's, two for AdamW's
  at::Tensor m = at::zeros({6, 10}), x = before.clone();
  for (int t = 0; t < 2; ++t) {
    const at::Tensor g = random_matrix(6, 10, 30 + static_cast<std::uint64_t>(t));
    set_gradient(w, g), set_gradient(e, g);
    m = 0.95 * m + g;
    x = (1 - 0.05 * 0.2) * x - 0.05 * 0.2 * std::sqrt(10.0) * nn::orthogonalise(g + 0.95 * m);
    optimizer.step(0.05);
  }
  CHECK((w - x).abs().max().item<double>() < 1e-5);
  CHECK((w - e).abs().max().item<double>() > 1e-3);
  CHECK((still - before).abs().max().item<double>() == 0);
}

TEST_CASE("clipping shortens all gradients together") {
  const at::Tensor a = at::zeros({2, 2}), b = at::zeros({1});
  nn::Optimizer optimizer({{"token_embd", a}, {"output_norm", b}}, {});
  const auto gradients = [&] {
    set_gradient(a, at::tensor({3.0f, 0.0f, 0.0f, 0.0f}).view({2, 2})), set_gradient(b, at::tensor({4.0f}));
  };
  gradients();
  CHECK(optimizer.clip(0) == doctest::Approx(5));
  CHECK(b.grad().item<double>() == 4);
  CHECK(optimizer.clip(10) == doctest::Approx(5));
  CHECK(b.grad().item<double>() == 4);
  CHECK(optimizer.clip(2.5) == doctest::Approx(5));
  CHECK(b.grad().item<double>() == doctest::Approx(2));
  CHECK(a.grad()[0][0].item<double>() == doctest::Approx(1.5));
}

TEST_CASE("the rate rises, then falls along half a cosine") {
  CHECK(nn::rate_share(0, 100, 10, 0.1) == doctest::Approx(0.1));
  CHECK(nn::rate_share(9, 100, 10, 0.1) == doctest::Approx(1));
  CHECK(nn::rate_share(10, 100, 10, 0.1) == doctest::Approx(1));
  CHECK(nn::rate_share(55, 100, 10, 0.1) == doctest::Approx(0.55));
  CHECK(nn::rate_share(99, 100, 10, 0.1) == doctest::Approx(0.1 + 0.45 * (1 + std::cos(std::numbers::pi * 89 / 90))));
  CHECK(nn::rate_share(0, 1, 0, 0) == doctest::Approx(1));
}
