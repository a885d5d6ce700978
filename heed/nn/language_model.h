// A decoder-only language model of the llama or gemma3 kind, each layer with a mechanism of its own.
#pragma once

#include <torch/nn/module.h>

#include <memory>
#include <vector>

#include "heed/model/model.h"
#include "heed/nn/attention.h"

namespace heed::nn {

/// W_down·(act(W_gate·x) ∘ W_up·x); act is SiLU, or the tanh GELU for gemma3.
class FeedForward : public torch::nn::Module {
 public:
  FeedForward(Index width, Index ffn, bool gelu);
  at::Tensor forward(const at::Tensor& x, at::ScalarType arithmetic) const;

 private:
  bool gelu_;
  at::Tensor gate_, up_, down_;  // [ffn, width] twice, [width, ffn]
};

/// What layers are told beside their sizes and mechanism.
struct LayerOptions {
  Index key_conv = 0;
  bool headwise_gate = false;
};

/// x += attention(norm(x)); x += feed_forward(norm(x)); gemma3 has the GELU and normalises what it adds, too.
class Layer : public torch::nn::Module {
 public:
  Layer(const AttentionOptions& attention, Index ffn, bool gemma);
  at::Tensor forward(at::Tensor x, at::ScalarType arithmetic) const;
  const Attention& attention() const { return *attention_; }
  Attention& attention() { return *attention_; }

 private:
  double eps_;
  std::shared_ptr<Attention> attention_;
  std::shared_ptr<FeedForward> feed_forward_;
  at::Tensor attn_norm_, ffn_norm_, post_attention_norm_, post_ffw_norm_;  // [width]; the last two: gemma3
};

/// Parameters are named as in GGUF files, blk.3.attn.q standing for blk.3.attn_q.weight (gguf_name).
/// Where layers are landmark's, a learned token, `landmark` [width], is put in after every `block` tokens, for all
/// layers to read, and taken out after the last: nothing is predicted there, and positions count it.
class LanguageModel : public torch::nn::Module {
 public:
  /// `mixers`: one a layer. Weights are not set: initialise() or load them. Throws UsageError as Attention does, and
  /// for landmark layers that differ in `block`.
  LanguageModel(const model::ModelInfo& info, const std::vector<MechanismCall>& mixers,
                const LayerOptions& options = {});

  /// Normal numbers of deviation width^-1/2 for matrices, less for those that write to the residual stream
  /// (÷ sqrt(2·layers)); gains 1. The same on every machine.
  void initialise(std::uint64_t seed);

  /// tokens [B, N] i64 → residual stream after the last norm, [B, N, width] f32.
  at::Tensor hidden(const at::Tensor& tokens);
  /// Logits of such rows: [..., width] → [..., vocabulary] f32.
  at::Tensor output(const at::Tensor& hidden) const;
  /// → [B, N, vocabulary] f32.
  at::Tensor logits(const at::Tensor& tokens);
  /// -ln p(targets | tokens up to there), [B, N] f32.
  at::Tensor losses(const at::Tensor& tokens, const at::Tensor& targets);

  /// What the layers' mechanisms add to the loss of the last forward pass, or undefined.
  at::Tensor auxiliary() const;

  /// What products and attention are computed in, f32 (the default) or bf16; weights stay f32.
  void set_arithmetic(at::ScalarType type) { arithmetic_ = type; }
  const model::ModelInfo& info() const { return info_; }
  const std::vector<MechanismCall>& mixers() const { return mixers_; }
  const Layer& layer(Index i) const { return *layers_[static_cast<size_t>(i)]; }
  Layer& layer(Index i) { return *layers_[static_cast<size_t>(i)]; }

 private:
  model::ModelInfo info_;
  std::vector<MechanismCall> mixers_;
  at::ScalarType arithmetic_ = at::kFloat;
  std::vector<std::shared_ptr<Layer>> layers_;
  at::Tensor embedding_, output_norm_, output_;  // [vocabulary, width], [width], [vocabulary, width] or undefined: tied
  Index landmark_block_ = 0;  // tokens between landmarks, 0: none
  at::Tensor landmark_;
};

using NamedParameters = std::vector<std::pair<std::string, at::Tensor>>;
/// Every parameter, in a fixed order. They share memory with the model.
NamedParameters parameters_of(const torch::nn::Module& model);

/// Sets all weights of a model whose residual stream has `width` features, but for what mechanisms learned: as
/// LanguageModel::initialise() says.
void initialise_weights(const torch::nn::Module& model, Index width, Index layers, Random& random);
/// The sum of what layers add to the loss, or undefined.
at::Tensor auxiliary_of(const std::vector<std::shared_ptr<Layer>>& layers);

}  // namespace heed::nn
