// heed's operators on torch tensors: the front door's numbers, and gradients as torch's own autograd has them.
#include <ATen/ATen.h>
#include <doctest/doctest.h>
#include <torch/csrc/autograd/autograd.h>

#include <cmath>

#include "heed/base/threads.h"
#include "heed/torch/attend.h"
#include "support/naive.h"

using heed::Index;
using heed::aten::attend;
using heed::aten::AttendOptions;

namespace {

struct Sizes {
  Index B, Hq, Hk, N, M, D, Dv;
};

struct Case {
  at::Tensor q, k, v;
  explicit Case(const Sizes& s, at::ScalarType type = at::kFloat, std::uint64_t seed = 3) {
    at::Generator random = at::detail::createCPUGenerator(seed);
    const auto normal = [&](at::IntArrayRef shape) {
      return at::randn(shape, random, at::kFloat).to(type).set_requires_grad(true);
    };
    q = normal({s.B, s.Hq, s.N, s.D}), k = normal({s.B, s.Hk, s.M, s.D}), v = normal({s.B, s.Hk, s.M, s.Dv});
  }
};

// softmax(q·k^T/√D + bias, where `sees` [N, M])·v in f64, by torch's own operators.
at::Tensor naive(const Case& c, const at::Tensor& sees, const at::Tensor& bias = {}) {
  const Index group = c.q.size(1) / c.k.size(1);
  const at::Tensor k = c.k.to(at::kDouble).repeat_interleave(group, 1);
  const at::Tensor v = c.v.to(at::kDouble).repeat_interleave(group, 1);
  at::Tensor s = at::matmul(c.q.to(at::kDouble), k.transpose(2, 3)) / std::sqrt(static_cast<double>(c.q.size(3)));
  if (bias.defined()) s = s + bias.to(at::kDouble);
  s = s.masked_fill(sees.logical_not(), -1e300);
  const at::Tensor p = s.softmax(-1) * sees.to(at::kDouble);
  return at::matmul(p, v);
}

// Query t stands at M - N + t.
at::Tensor distance(Index n, Index m) { return (at::arange(n) + (m - n)).unsqueeze(1) - at::arange(m).unsqueeze(0); }

double worst(const at::Tensor& got, const at::Tensor& want) {
  const at::Tensor w = want.to(at::kDouble);
  return ((got.to(at::kDouble) - w).abs().max() / w.abs().max()).item<double>();
}

std::vector<at::Tensor> gradients(const at::Tensor& o, const at::Tensor& dout, const std::vector<at::Tensor>& of) {
  return torch::autograd::grad({o}, of, {dout.to(o.scalar_type())});
}

}  // namespace

TEST_CASE("outputs and gradients are those of a naive masked softmax") {
  const std::vector<Sizes> sizes{{1, 1, 1, 1, 1, 8, 8}, {2, 4, 2, 65, 65, 16, 24}, {1, 6, 2, 33, 130, 40, 8}};
  for (const Sizes& s : sizes) {
    CAPTURE(s.N);
    const Case c(s);
    const at::Tensor d = distance(s.N, s.M);
    const std::vector<std::pair<AttendOptions, at::Tensor>> calls{
        {{.mechanism = "dense"}, at::ones_like(d, at::kBool)},
        {{.mechanism = "dense", .causal = true}, d >= 0},
        {{.mechanism = "streaming:sink=3,window=17"}, (d >= 0).logical_and((d < 17).logical_or(at::arange(s.M) < 3))}};
    for (const auto& [options, sees] : calls) {
      CAPTURE(options.mechanism);
      const auto got = attend(c.q, c.k, c.v, options);
      const at::Tensor want = naive(c, sees);
      CHECK((got.o.scalar_type() == at::kFloat));
      CHECK_FALSE(got.lse.requires_grad());
      CHECK(worst(got.o, want) < 2e-5);
      const at::Tensor dout = at::randn_like(got.o);
      const auto mine = gradients(got.o, dout, {c.q, c.k, c.v}), theirs = gradients(want, dout, {c.q, c.k, c.v});
      // One key: the softmax has no slope, and there is nothing to divide by.
      for (size_t i = s.M == 1 ? 2 : 0; i < 3; ++i) CHECK(worst(mine[i], theirs[i]) < 1e-4);
    }
  }
}

TEST_CASE("a bias is differentiated, a document list is not") {
  const Sizes s{2, 4, 2, 50, 81, 16, 24};
  const Case c(s);
  const at::Tensor bias = at::randn({1, 4, 50, 81}).set_requires_grad(true);
  const at::Tensor doc = (at::arange(81) / 30).to(at::kInt).repeat({2, 1});
  const auto got = attend(c.q, c.k, c.v, {.mechanism = "dense", .causal = true, .extra = {{"bias", bias}}});
  const at::Tensor want = naive(c, distance(50, 81) >= 0, bias);
  CHECK(worst(got.o, want) < 2e-5);
  const at::Tensor dout = at::randn_like(got.o);
  const auto mine = gradients(got.o, dout, {c.q, bias}), theirs = gradients(want, dout, {c.q, bias});
  CHECK(worst(mine[0], theirs[0]) < 1e-4);
  CHECK(worst(mine[1], theirs[1]) < 1e-4);

  const Case square({2, 4, 2, 81, 81, 16, 24});
  const auto cut =
      attend(square.q, square.k, square.v, {.mechanism = "dense", .causal = true, .extra = {{"doc", doc}}});
  const at::Tensor same = doc[0].unsqueeze(1) == doc[0].unsqueeze(0);
  CHECK(worst(cut.o, naive(square, same.logical_and(distance(81, 81) >= 0))) < 2e-5);
  gradients(cut.o, at::randn_like(cut.o), {square.q});
}

TEST_CASE("bf16 tensors are computed in bf16 and give bf16 gradients; views are not copied") {
  const Case c({1, 2, 1, 70, 70, 32, 32}, at::kBFloat16);
  const at::Tensor turned = at::randn({1, 70, 2, 32}).transpose(1, 2);  // tokens before heads in memory
  const at::Tensor sees = distance(70, 70) >= 0;
  const auto got = attend(c.q, c.k, c.v, {.mechanism = "dense", .causal = true});
  CHECK(worst(got.o, naive(c, sees)) < 2e-2);
  const at::Tensor dout = at::randn_like(got.o);
  const auto mine = gradients(got.o, dout, {c.q, c.k, c.v}), theirs = gradients(naive(c, sees), dout, {c.q, c.k, c.v});
  for (size_t i = 0; i < 3; ++i) {
    CHECK((mine[i].scalar_type() == at::kBFloat16));
    CHECK(worst(mine[i], theirs[i]) < 2e-2);
  }
  const auto mixed = attend(turned, c.k, c.v, {.mechanism = "dense", .causal = true});
  CHECK(at::equal(mixed.o, attend(turned.contiguous(), c.k, c.v, {.mechanism = "dense", .causal = true}).o));
}

TEST_CASE("the same bits for any number of threads") {
  const Case c({2, 4, 2, 300, 300, 32, 32});
  const auto run = [&](int threads) {
    heed::set_threads(threads);
    const auto got = attend(c.q, c.k, c.v, {.mechanism = "moba:block=32,top_k=3"});
    return gradients(got.o, got.o.detach(), {c.q, c.k, c.v});
  };
  const auto one = run(1), three = run(3);
  heed::set_threads(heed::default_threads());
  for (size_t i = 0; i < 3; ++i) CHECK(at::equal(one[i], three[i]));
}

TEST_CASE("bad input is one line") {
  const Case c({1, 2, 1, 20, 20, 8, 8});
  CHECK_FAILS(attend(c.q, c.k, c.v, {.mechanism = "moba:top_k=0"}), heed::Error, "moba: top_k = 0, expected >= 1");
  CHECK_FAILS(attend(c.q.to(at::kDouble), c.k, c.v), heed::Error,
              "q: dtype = Double, expected f32, f16, bf16, i32 or u8");
  CHECK_FAILS(attend(c.q, c.k[0], c.v), heed::Error, "k: shape = [1, 20, 8], expected [B, Hk, M, D]");
  CHECK_FAILS(attend(c.q, c.k, c.v, {.mechanism = "dense", .extra = {{"bais", c.q}}}), heed::Error,
              "dense: tensor bais is not one it reads, expected bias, doc, key_mask");
}

TEST_CASE("attention between channels has gradients, as its definition in f64 has them") {
  const Case c({2, 4, 2, 40, 40, 12, 12});
  const auto o = attend(c.q, c.k, c.v, {.mechanism = "davit:kind=channel"}).o;
  const auto wide = [&](const at::Tensor& x) {
    return x.to(at::kDouble).repeat_interleave(4 / x.size(1), 1);  // [B, Hq, N, D]
  };
  const at::Tensor weights = (at::matmul(wide(c.q).transpose(2, 3), wide(c.k)) / std::sqrt(12.0)).softmax(-1);
  const at::Tensor want = at::matmul(wide(c.v), weights.transpose(2, 3));
  CHECK(worst(o, want) < 2e-5);
  const at::Tensor dout = at::randn({2, 4, 40, 12});
  const auto got = gradients(o, dout, {c.q, c.k, c.v}), expected = gradients(want, dout, {c.q, c.k, c.v});
  for (size_t i = 0; i < 3; ++i) CHECK(worst(got[i], expected[i]) < 1e-4);
}

TEST_CASE("a mechanism without lse gives an empty one") {
  const Case c({1, 2, 2, 16, 16, 8, 8});
  CHECK(attend(c.q, c.k, c.v, {.mechanism = "davit:kind=channel,grid=4x4"}).lse.numel() == 0);
  CHECK(attend(c.q, c.k, c.v, {.mechanism = "davit:kind=window,grid=4x4,window=2"}).lse.numel() == 32);
}
