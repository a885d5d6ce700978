#include "heed/nn/attention.h"

#include <ATen/ops/empty.h>

#include <algorithm>
#include <cmath>

#include "heed/nn/config.h"
#include "heed/nn/predictor.h"
#include "heed/torch/attend.h"

namespace heed::nn {

std::vector<LearnedPart> learned_parts(const AttentionOptions& o) {
  const std::string& name = o.mechanism.name;
  const Params p(name, find_mechanism(name).params, o.mechanism.params);
  if (name == "flash-moba" && o.key_conv > 0) return {{"kconv_w", {o.kv_heads, o.head_size, o.key_conv}, 0}};
  if (name == "seer-attention" && !p.boolean("oracle")) {
    const Index pooled = 3 * o.head_size;
    return {{"wk", {o.heads, pooled, o.head_size}, 1 / std::sqrt(static_cast<double>(pooled))}};
  }
  // As the authors begin: every key is about as important as any other, so a window of the newest is kept.
  if (name == "dma") return {{"w_dt", {o.kv_heads, o.kv_heads * o.head_size}, 0.02}, {"a", {o.kv_heads}, 0.02}};
  if (name == "gated-attention") {
    const std::string& position = p.text("position");
    const Index heads = position == "g1" || position == "g4" ? o.heads : o.kv_heads;
    const Index outputs = o.headwise_gate ? heads : heads * o.head_size;
    return {{"gate", {outputs, o.width}, 1 / std::sqrt(static_cast<double>(o.width))}};  // as q
  }
  if (name == "routing-transformer") {
    const CentroidOptions c = centroid_options(o.mechanism, o.kv_heads, o.head_size);
    return {{"mu", {c.kv_heads, c.clusters, c.head_size}, 1},
            {"mu_sum", {c.kv_heads, c.clusters, c.head_size}, 0},
            {"mu_count", {c.kv_heads, c.clusters}, 0}};
  }
  if (name == "biformer" && o.lepe > 0) {
    const Index channels = o.kv_heads * o.head_size;
    return {{"lepe_w", {channels, o.lepe, o.lepe}, 1 / static_cast<double>(o.lepe)}, {"lepe_b", {channels}, 0}};
  }
  if (name == "sparsifiner") {
    if (o.tokens < 6) fail_usage("sparsifiner: {} tokens, expected at least 6, as its weights are theirs", o.tokens);
    const Index d = o.head_size, c = std::max<Index>(1, d / 2), r = o.tokens / 6;
    const double inward = 1 / std::sqrt(static_cast<double>(d));
    return {{"p_q", {c, d}, inward},
            {"p_q_b", {c}, 0},
            {"p_k", {c, d}, inward},
            {"p_k_b", {c}, 0},
            {"w_dn", {o.tokens, r}, 1 / std::sqrt(static_cast<double>(o.tokens))},
            {"w_up", {o.tokens, r}, 0.02}};
  }
  return {};
}

Attention::Attention(const AttentionOptions& options)
    : options_(options), call_(options.mechanism.text()),
      rotary_(options.head_size, options.rope_base, options.rope_pairs) {
  check_trains(options.mechanism, options.causal);
  learned_ = learned_parts(options);
  const Index d = options.head_size, q_width = options.heads * d, kv_width = options.kv_heads * d;
  const auto add = [&](const char* name, std::vector<Index> shape, bool gradient = true) {
    return register_parameter(name, at::empty(shape, at::kFloat), gradient);
  };
  q_ = add("q", {q_width, options.width});
  k_ = add("k", {kv_width, options.width});
  v_ = add("v", {kv_width, options.width});
  output_ = add("output", {options.width, q_width});
  if (options.head_norms) q_norm_ = add("q_norm", {d}), k_norm_ = add("k_norm", {d});
  const bool centroids = options.mechanism.name == "routing-transformer";
  std::vector<at::Tensor> parts;
  for (const LearnedPart& part : learned_) parts.push_back(add(part.name.c_str(), part.shape, !centroids));
  if (centroids)
    centroids_.emplace(centroid_options(options.mechanism, options.kv_heads, d), parts[0], parts[1], parts[2]);
  else if (options.mechanism.name == "gated-attention") gate_ = parts[0];
  else
    for (size_t i = 0; i < parts.size(); ++i) extras_.emplace(learned_[i].name, parts[i]);
}

void Attention::initialise_learned(Random& random) const {
  const auto parameters = named_parameters(false);
  for (const LearnedPart& part : learned_) {
    const at::Tensor& tensor = parameters[part.name];
    for (Index i = 0; i < tensor.numel(); ++i)
      tensor.data_ptr<float>()[i] = static_cast<float>(part.deviation * random.normal());
  }
  if (centroids_) centroids_->initialise();
}

void Attention::imitate(bool on) {
  if (options_.mechanism.name != "sparsifiner")
    fail_usage("{}: it has no predictor to train, expected sparsifiner", options_.mechanism.name);
  imitating_ = on, auxiliary_ = at::Tensor();
}

at::Tensor Attention::forward(const at::Tensor& x, at::ScalarType arithmetic) {
  const Index b = x.size(0), n = x.size(1), d = options_.head_size;
  const auto split = [&](const at::Tensor& w, Index each) {
    return product(x, w, arithmetic).view({b, n, -1, each}).transpose(1, 2);
  };
  const auto placed = [&](const at::Tensor& w, const at::Tensor& gain) {
    const at::Tensor wide = split(w, d).to(at::kFloat);
    const at::Tensor normed = gain.defined() ? rms_norm(wide, gain, options_.rms_eps) : wide;
    return (options_.rope_base > 0 ? rotary_.turn(normed) : normed).to(arithmetic);
  };
  const at::Tensor q = placed(q_, q_norm_), k = placed(k_, k_norm_);
  aten::AttendOptions how;
  how.causal = options_.causal;
  if (imitating_) auxiliary_ = imitation_loss(q, k, predictor_of(options_.mechanism, extras_));
  else how.mechanism = call_, how.extra = extras_;
  if (gate_.defined()) how.extra["gate"] = split(gate_, options_.headwise_gate ? 1 : d);
  if (centroids_) how.extra["mu"] = centroids_->now(), auxiliary_ = centroids_->follow(q, k);
  const at::Tensor v = split(v_, d);
  const auto [o, lse] = aten::attend(q, k, v, how);
  if (observer_) observer_({q, k, v, o, lse});
  return product(o.transpose(1, 2).reshape({b, n, options_.heads * d}), output_, arithmetic);
}

}  // namespace heed::nn
