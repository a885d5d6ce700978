#include "heed/nn/attention.h"

#include <ATen/ops/conv1d.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/pad.h>
#include <ATen/ops/silu.h>

#include <cmath>

#include "heed/nn/config.h"
#include "heed/torch/attend.h"

namespace heed::nn {
namespace {

// FlashMoBA's keys: k + silu(y), y_t = Σ over l < W of w_l·k_(t-l). k [B, H, N, D], w [H, D, W].
at::Tensor convolve_keys(const at::Tensor& k, const at::Tensor& w) {
  const Index b = k.size(0), n = k.size(2), channels = k.size(1) * k.size(3), taps = w.size(2);
  const at::Tensor x = at::pad(k.transpose(2, 3).reshape({b, channels, n}), {taps - 1, 0});
  // conv1d correlates: tap l of it stands W - 1 - l tokens back.
  const at::Tensor y = at::conv1d(x, w.reshape({channels, 1, taps}).flip(-1).to(k.dtype()), {}, at::IntArrayRef{1},
                                  at::IntArrayRef{0}, at::IntArrayRef{1}, channels);
  return k + at::silu(y).reshape({b, k.size(1), k.size(3), n}).transpose(2, 3);
}

}  // namespace

std::vector<LearnedPart> learned_parts(const AttentionOptions& o) {
  const std::string& name = o.mechanism.name;
  if (name == "flash-moba" && o.key_conv > 0) return {{"kconv_w", {o.kv_heads, o.head_size, o.key_conv}, 0}};
  if (name == "seer-attention") {
    const Params p("seer-attention", find_mechanism(name).params, o.mechanism.params);
    const Index pooled = 3 * o.head_size;
    if (!p.boolean("oracle"))
      return {{"wk", {o.heads, pooled, o.head_size}, 1 / std::sqrt(static_cast<double>(pooled))}};
  }
  return {};
}

Attention::Attention(const AttentionOptions& options)
    : options_(options), call_(options.mechanism.text()), learned_(learned_parts(options)),
      rotary_(options.head_size, options.rope_base, options.rope_pairs) {
  check_trains(options.mechanism);
  const Index d = options.head_size, q_width = options.heads * d, kv_width = options.kv_heads * d;
  const auto add = [&](const char* name, std::vector<Index> shape) {
    return register_parameter(name, at::empty(shape, at::kFloat));
  };
  q_ = add("q", {q_width, options.width});
  k_ = add("k", {kv_width, options.width});
  v_ = add("v", {kv_width, options.width});
  output_ = add("output", {options.width, q_width});
  if (options.head_norms) q_norm_ = add("q_norm", {d}), k_norm_ = add("k_norm", {d});
  for (const LearnedPart& part : learned_) {
    const at::Tensor parameter = add(part.name.c_str(), part.shape);
    if (part.name == "kconv_w") key_conv_ = parameter;
    else extras_.emplace(part.name, parameter);
  }
}

at::Tensor Attention::forward(const at::Tensor& x, at::ScalarType arithmetic) {
  const Index b = x.size(0), n = x.size(1), d = options_.head_size;
  const auto heads = [&](const at::Tensor& w) { return product(x, w, arithmetic).view({b, n, -1, d}).transpose(1, 2); };
  const auto placed = [&](const at::Tensor& w, const at::Tensor& gain) {
    const at::Tensor wide = heads(w).to(at::kFloat);
    return rotary_.turn(gain.defined() ? rms_norm(wide, gain, options_.rms_eps) : wide).to(arithmetic);
  };
  const at::Tensor q = placed(q_, q_norm_);
  at::Tensor k = placed(k_, k_norm_);
  // The router and attention both read the convolved keys, so to them these are the keys.
  if (key_conv_.defined()) k = convolve_keys(k, key_conv_);
  aten::AttendOptions how;
  how.mechanism = call_, how.causal = true, how.extra = extras_;
  const at::Tensor o = aten::attend(q, k, heads(v_), how).o;
  return product(o.transpose(1, 2).reshape({b, n, options_.heads * d}), output_, arithmetic);
}

}  // namespace heed::nn
