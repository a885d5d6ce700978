#include "heed/nn/language_model.h"

#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/cross_entropy_loss.h>
#include <ATen/ops/div.h>
#include <ATen/ops/embedding.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/gelu.h>
#include <ATen/ops/silu.h>
#include <ATen/ops/where.h>
#include <c10/core/GradMode.h>

#include <cmath>

#include "heed/base/random.h"

namespace heed::nn {

FeedForward::FeedForward(Index width, Index ffn, bool gelu) : gelu_(gelu) {
  const auto add = [&](const char* name, Index outputs, Index inputs) {
    return register_parameter(name, at::empty({outputs, inputs}, at::kFloat));
  };
  gate_ = add("gate", ffn, width), up_ = add("up", ffn, width);
  down_ = add("down", width, ffn);
}

at::Tensor FeedForward::forward(const at::Tensor& x, at::ScalarType arithmetic) const {
  const at::Tensor gate = product(x, gate_, arithmetic), up = product(x, up_, arithmetic);
  return product((gelu_ ? at::gelu(gate, "tanh") : at::silu(gate)) * up, down_, arithmetic);
}

Layer::Layer(const AttentionOptions& attention, Index ffn, bool gemma) : eps_(attention.rms_eps) {
  attention_ = register_module("attn", std::make_shared<Attention>(attention));
  feed_forward_ = register_module("ffn", std::make_shared<FeedForward>(attention.width, ffn, gemma));
  const auto gain = [&](const char* name) {
    return register_parameter(name, at::empty({attention.width}, at::kFloat));
  };
  attn_norm_ = gain("attn_norm"), ffn_norm_ = gain("ffn_norm");
  if (gemma) post_attention_norm_ = gain("post_attention_norm"), post_ffw_norm_ = gain("post_ffw_norm");
}

at::Tensor Layer::forward(at::Tensor x, at::ScalarType arithmetic) const {
  const auto added = [&](const at::Tensor& y, const at::Tensor& gain) {
    return gain.defined() ? rms_norm(y, gain, eps_) : y.to(at::kFloat);
  };
  x = x + added(attention_->forward(rms_norm(x, attn_norm_, eps_), arithmetic), post_attention_norm_);
  return x + added(feed_forward_->forward(rms_norm(x, ffn_norm_, eps_), arithmetic), post_ffw_norm_);
}

namespace {

AttentionOptions attention_of(const model::ModelInfo& info, Index layer, const MechanismCall& mechanism,
                              const LayerOptions& options) {
  const bool gemma = info.architecture == "gemma3", local = info.local[static_cast<size_t>(layer)];
  return {.width = info.width,
          .heads = info.heads,
          .kv_heads = info.kv_heads,
          .head_size = info.head_size,
          .mechanism = mechanism,
          .rope_base = local ? info.rope_base_local : info.rope_base,
          .rope_pairs = gemma ? model::RopePairs::halves : model::RopePairs::adjacent,
          .head_norms = gemma,
          .rms_eps = info.rms_eps,
          .key_conv = options.key_conv,
          .headwise_gate = options.headwise_gate};
}

// The tokens between landmarks that layers agree on, or 0.
Index landmark_block(const std::vector<MechanismCall>& mixers) {
  Index block = 0;
  for (const MechanismCall& call : mixers) {
    if (call.name != "landmark") continue;
    const Index own = Params(call.name, find_mechanism(call.name).params, call.params).integer("block");
    if (block != 0 && own != block)
      fail_usage("landmark: block = {}, expected {} in all layers, as they share their landmarks", own, block);
    block = own;
  }
  return block;
}

}  // namespace

LanguageModel::LanguageModel(const model::ModelInfo& info, const std::vector<MechanismCall>& mixers,
                             const LayerOptions& options)
    : info_(info), mixers_(mixers) {
  if (static_cast<Index>(mixers.size()) != info.layers)
    fail("mixers: {} of them, expected {}, one a layer", mixers.size(), info.layers);
  embedding_ = register_parameter("token_embd", at::empty({info.vocabulary, info.width}, at::kFloat));
  const auto blocks = register_module("blk", std::make_shared<torch::nn::Module>());
  for (Index i = 0; i < info.layers; ++i) {
    const MechanismCall& mixer = mixers[static_cast<size_t>(i)];
    layers_.push_back(
        std::make_shared<Layer>(attention_of(info, i, mixer, options), info.ffn, info.architecture == "gemma3"));
    blocks->register_module(fmt::format("{}", i), layers_.back());
  }
  output_norm_ = register_parameter("output_norm", at::empty({info.width}, at::kFloat));
  if (!info.tied_output) output_ = register_parameter("output", at::empty({info.vocabulary, info.width}, at::kFloat));
  landmark_block_ = landmark_block(mixers);
  if (landmark_block_ > 0) landmark_ = register_parameter("landmark", at::empty({info.width}, at::kFloat));
}

void initialise_weights(const torch::nn::Module& model, Index width, Index layers, Random& random) {
  const double deviation = 1 / std::sqrt(static_cast<double>(width));
  const double inward = deviation / std::sqrt(2 * static_cast<double>(layers));
  for (const auto& item : model.named_parameters()) {
    const std::string& name = item.key();
    float* x = item.value().data_ptr<float>();
    const Index count = item.value().numel();
    const auto normal = [&](double sigma) {
      for (Index i = 0; i < count; ++i) x[i] = static_cast<float>(sigma * random.normal());
    };
    if (name.ends_with("_norm")) std::fill_n(x, count, 1.0f);
    else if (name.ends_with("attn.output") || name.ends_with("ffn.down")) normal(inward);
    else normal(deviation);
  }
}

at::Tensor auxiliary_of(const std::vector<std::shared_ptr<Layer>>& layers) {
  at::Tensor sum;
  for (const auto& layer : layers)
    if (const at::Tensor& part = layer->attention().auxiliary(); part.defined())
      sum = sum.defined() ? sum + part : part;
  return sum;
}

void LanguageModel::initialise(std::uint64_t seed) {
  const c10::NoGradGuard frozen;
  Random random(seed);
  initialise_weights(*this, info_.width, info_.layers, random);
  for (const auto& layer : layers_) layer->attention().initialise_learned(random);
}

at::Tensor LanguageModel::hidden(const at::Tensor& tokens) {
  at::Tensor x = at::embedding(embedding_, tokens), places;
  if (landmark_block_ > 0) {
    const Index n = tokens.size(1), b = landmark_block_;
    const at::Tensor all = at::arange(n + n / b), after = at::div(all, b + 1, "floor");
    const at::Tensor marks = (all + 1).remainder(b + 1).eq(0);
    places = marks.logical_not().nonzero().squeeze(1);
    x = at::cat({x, landmark_.expand({x.size(0), 1, -1})}, 1).index_select(1, at::where(marks, n, all - after));
  }
  x = x * static_cast<double>(info_.embedding_scale);
  for (const auto& layer : layers_) x = layer->forward(x, arithmetic_);
  if (places.defined()) x = x.index_select(1, places);
  return rms_norm(x, output_norm_, info_.rms_eps);
}

at::Tensor LanguageModel::auxiliary() const { return auxiliary_of(layers_); }

at::Tensor LanguageModel::output(const at::Tensor& hidden) const {
  return product(hidden, output_.defined() ? output_ : embedding_, arithmetic_).to(at::kFloat);
}

at::Tensor LanguageModel::logits(const at::Tensor& tokens) { return output(hidden(tokens)); }

at::Tensor LanguageModel::losses(const at::Tensor& tokens, const at::Tensor& targets) {
  return at::cross_entropy_loss(logits(tokens).flatten(0, 1), targets.flatten(), {}, at::Reduction::None)
      .view(targets.sizes());
}

NamedParameters parameters_of(const torch::nn::Module& model) {
  NamedParameters list;
  for (const auto& item : model.named_parameters()) list.emplace_back(item.key(), item.value());
  return list;
}

}  // namespace heed::nn
