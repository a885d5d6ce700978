// The Attention module against torch's own operators in f64 with autograd: masks, key convolution, rotary positions.
#include "support/doctest_with_torch.h"

#include <ATen/ATen.h>

#include <cmath>
#include <functional>

#include "heed/base/error.h"
#include "heed/base/random.h"
#include "heed/nn/attention.h"

using namespace heed;

namespace {

at::Tensor random_tensor(at::IntArrayRef shape, std::uint64_t seed, double deviation = 1) {
  const at::Tensor x = at::zeros(shape, at::kFloat);
  Random random(seed);
  for (Index i = 0; i < x.numel(); ++i) x.data_ptr<float>()[i] = static_cast<float>(deviation * random.normal());
  return x;
}

// Pair (2i, 2i+1) by a rotation matrix a token.
at::Tensor rotated(const at::Tensor& x, double base) {
  const Index n = x.size(2), d = x.size(3);
  std::vector<at::Tensor> rows;
  for (Index t = 0; t < n; ++t) {
    const at::Tensor turn = at::zeros({d, d}, at::kDouble);
    for (Index i = 0; i < d; i += 2) {
      const double angle = static_cast<double>(t) * std::pow(base, -static_cast<double>(i) / static_cast<double>(d));
      turn[i][i] = std::cos(angle), turn[i][i + 1] = -std::sin(angle);
      turn[i + 1][i] = std::sin(angle), turn[i + 1][i + 1] = std::cos(angle);
    }
    rows.push_back(at::matmul(x.select(2, t), turn.t()));
  }
  return at::stack(rows, 2);
}

using Sees = std::function<bool(Index t, Index j)>;
using Parameters = std::map<std::string, at::Tensor>;  // f64

at::Tensor reference(const Parameters& p, const at::Tensor& x, const nn::AttentionOptions& o, const Sees& sees) {
  const Index b = x.size(0), n = x.size(1), d = o.head_size;
  const auto heads = [&](const char* name, Index count) {
    return at::matmul(x, p.at(name).t()).view({b, n, count, d}).permute({0, 2, 1, 3});
  };
  const at::Tensor q = rotated(heads("q", o.heads), o.rope_base);
  at::Tensor k = rotated(heads("k", o.kv_heads), o.rope_base), v = heads("v", o.kv_heads);
  if (const auto w = p.find("kconv_w"); w != p.end()) {
    at::Tensor y = at::zeros_like(k);
    for (Index lag = 0; lag < o.key_conv; ++lag) {
      const at::Tensor earlier = at::cat({at::zeros({b, o.kv_heads, lag, d}, at::kDouble), k.narrow(2, 0, n - lag)}, 2);
      y = y + earlier * w->second.select(2, lag).view({1, o.kv_heads, 1, d});
    }
    k = k + y * at::sigmoid(y);
  }
  at::Tensor output_gate;
  at::Tensor turned = q;
  if (const auto w = p.find("gate"); w != p.end()) {
    std::string position = "g1";
    for (const auto& [name, value] : o.mechanism.params)
      if (name == "position") position = value;
    const bool of_queries = position == "g1" || position == "g4";
    const at::Tensor gate = at::sigmoid(at::matmul(x, w->second.t())
                                            .view({b, n, of_queries ? o.heads : o.kv_heads, o.headwise_gate ? 1 : d})
                                            .permute({0, 2, 1, 3}));
    if (position == "g1") output_gate = gate;
    if (position == "g2") v = v * gate;
    if (position == "g3") k = k * gate;
    if (position == "g4") turned = q * gate;
  }
  at::Tensor importance = at::zeros({b, o.kv_heads, 1, n}, at::kDouble);
  if (const auto w = p.find("w_dt"); w != p.end()) {
    const at::Tensor dt = at::matmul(v.permute({0, 2, 1, 3}).reshape({b, n, o.kv_heads * d}), w->second.t());
    importance = at::exp(p.at("a") * at::log1p(at::exp(dt))).permute({0, 2, 1}).unsqueeze(2);
  }
  const Index group = o.heads / o.kv_heads;
  importance = importance.repeat_interleave(group, 1);
  k = k.repeat_interleave(group, 1), v = v.repeat_interleave(group, 1);
  const at::Tensor hidden = at::zeros({n, n}, at::kDouble);
  for (Index t = 0; t < n; ++t)
    for (Index j = 0; j < n; ++j)
      if (!sees(t, j)) hidden[t][j] = -INFINITY;
  const at::Tensor weights =
      at::softmax(at::matmul(turned, k.transpose(2, 3)) / std::sqrt(static_cast<double>(d)) + importance + hidden, -1);
  at::Tensor out = at::matmul(weights, v);
  if (output_gate.defined()) out = out * output_gate;
  return at::matmul(out.permute({0, 2, 1, 3}).reshape({b, n, o.heads * d}), p.at("output").t());
}

void check_close(const std::string& name, const at::Tensor& got, const at::Tensor& want, double tolerance) {
  CAPTURE(name);
  REQUIRE(got.defined());
  const double largest = std::max(want.abs().max().item<double>(), 1e-2);  // one token: queries have no gradient
  CHECK((got.to(at::kDouble) - want).abs().max().item<double>() <= tolerance * largest);
}

void compare(const nn::AttentionOptions& options, const Sees& sees, Index n) {
  CAPTURE(options.mechanism.text());
  nn::Attention module(options);
  Parameters wide;
  std::uint64_t seed = 1;
  for (const auto& item : module.named_parameters()) {
    at::Tensor w = item.value();
    w.data().copy_(
        random_tensor(w.sizes(), ++seed, w.dim() == 2 ? 1 / std::sqrt(static_cast<double>(w.size(1))) : 0.5));
    wide[item.key()] = w.detach().to(at::kDouble).requires_grad_();
  }
  const at::Tensor x = random_tensor({2, n, options.width}, 77).requires_grad_(), y = module.forward(x);
  const at::Tensor x_wide = x.detach().to(at::kDouble).requires_grad_();
  const at::Tensor want = reference(wide, x_wide, options, sees);
  check_close("y", y, want, 2e-5);
  const at::Tensor dy = random_tensor(y.sizes(), 99);
  y.backward(dy);
  want.backward(dy.to(at::kDouble));
  check_close("x", x.grad(), x_wide.grad(), 1e-4);
  for (const auto& item : module.named_parameters())
    check_close(item.key(), item.value().grad(), wide.at(item.key()).grad(), 1e-4);

  const at::Tensor rounded = module.forward(x, at::kBFloat16);
  CHECK((rounded.scalar_type() == at::kBFloat16));
  check_close("bf16", rounded, want, 3e-2);
}

nn::AttentionOptions options(const char* call, Index key_conv = 0) {
  nn::AttentionOptions o;
  o.width = 24, o.heads = 4, o.kv_heads = 2, o.head_size = 12, o.key_conv = key_conv;
  o.mechanism = MechanismCall::parse(call);
  return o;
}

}  // namespace

TEST_CASE("dense, windows and static blocks") {
  compare(options("dense"), [](Index t, Index j) { return j <= t; }, 21);
  compare(options("dense"), [](Index t, Index j) { return j <= t; }, 1);
  compare(options("streaming:sink=2,window=5"), [](Index t, Index j) { return j <= t && (j < 2 || j > t - 5); }, 33);
  // One block a query, its own.
  compare(options("moba:block=7,top_k=1"), [](Index t, Index j) { return j <= t && j / 7 == t / 7; }, 40);
  compare(
      options("power:block=4,window_blocks=1,sink_blocks=1"),
      [](Index t, Index j) {
        const Index apart = t / 4 - j / 4;
        return j <= t && (apart < 1 || j / 4 == 0 || (apart & (apart - 1)) == 0);
      },
      45);
}

TEST_CASE("pbs-attn: all blocks, sorted, are all of the past") {
  compare(options("pbs-attn:block=4,segment=8,mass=1"), [](Index t, Index j) { return j <= t; }, 45);
  compare(options("pbs-attn:block=4,segment=8,mass=1"), [](Index t, Index j) { return j <= t; }, 7);
}

TEST_CASE("flash-moba's key convolution, three and five wide") {
  for (const Index width : {3, 5})
    compare(options("flash-moba:block=6,top_k=99", width), [](Index t, Index j) { return j <= t; }, 29);
}

TEST_CASE("gated-attention's gates are projections of the same token, for every position and granularity") {
  for (const char* position : {"g1", "g2", "g3", "g4"})
    for (const bool headwise : {false, true}) {
      nn::AttentionOptions o = options((std::string("gated-attention:position=") + position).c_str());
      o.headwise_gate = headwise;
      compare(o, [](Index t, Index j) { return j <= t; }, 23);
    }
}

TEST_CASE("gates that say nothing halve dense attention") {
  nn::Attention dense(options("dense")), gated(options("gated-attention"));
  for (const auto& item : gated.named_parameters())
    item.value().data().copy_(item.key() == "gate" ? at::zeros_like(item.value())
                                                   : random_tensor(item.value().sizes(), 8, 0.2));
  for (const auto& item : dense.named_parameters()) item.value().data().copy_(gated.named_parameters()[item.key()]);
  const at::Tensor x = random_tensor({1, 19, 24}, 4);
  check_close("y", gated.forward(x) * 2, dense.forward(x).to(at::kDouble), 1e-6);
}

TEST_CASE("dma's gate learns through the importance of keys") {
  compare(options("dma:budget=99"), [](Index t, Index j) { return j <= t; }, 26);
}

TEST_CASE("learned parts are parameters; a gate is a constant for the loss") {
  nn::Attention conv(options("flash-moba:block=6,top_k=2", 3)), plain(options("flash-moba:block=6,top_k=2"));
  CHECK(conv.named_parameters().contains("kconv_w"));
  CHECK(!plain.named_parameters().contains("kconv_w"));
  nn::Attention seer(options("seer-attention:block=8,density=0.5"));
  REQUIRE(seer.named_parameters().contains("wk"));
  CHECK((seer.named_parameters()["wk"].sizes() == at::IntArrayRef({4, 36, 12})));
  for (const auto& item : seer.named_parameters())
    item.value().data().copy_(random_tensor(item.value().sizes(), 5, 0.2));
  seer.forward(random_tensor({1, 40, 24}, 6)).sum().backward();
  CHECK(!seer.named_parameters()["wk"].grad().defined());
  CHECK(seer.named_parameters()["v"].grad().abs().max().item<double>() > 0);
}

TEST_CASE("mechanisms that a causal language model cannot be trained with are refused by name") {
  const auto refusal = [](const char* call) -> std::string {
    try {
      nn::Attention module(options(call));
    } catch (const UsageError& e) {
      return e.what();
    }
    return "accepted";
  };
  CHECK(refusal("vmoba") ==
        "mechanism = vmoba: it is not causal: queries of a whole video compete for blocks, expected one that a causal "
        "language model can be trained with");
  CHECK(refusal("sparsifiner").starts_with("mechanism = sparsifiner: it is made for images"));
  CHECK(refusal("routing-transformer") == "routing-transformer: clusters = 0, expected >= 1 where a model learns them");
  CHECK(refusal("nonesuch").find("nonesuch") != std::string::npos);
  CHECK(refusal("moba:top_k=0") == "moba: top_k = 0, expected >= 1");
}
