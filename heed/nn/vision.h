// A small vision transformer, each layer with a mechanism that sees both ways, and pictures to learn from.
#pragma once

#include "heed/nn/language_model.h"

namespace heed::nn {

struct VisionOptions {
  Index side = 16, patch = 2, channels = 1;  // pixels; a patch is a token
  Index classes = 4;
  Index layers = 2, width = 32, ffn = 64, heads = 4, kv_heads = 4, head_size = 8;
  std::vector<MechanismCall> mechanisms{{"dense", {}}};  // of the layers in turn, over and over
  bool class_token = false;  // token 0, which the classes are read from; else from the mean of all
  Index lepe = 0;            // see AttentionOptions
  /// Patches along a side, and all tokens.
  Index grid() const { return side / patch; }
  Index tokens() const { return grid() * grid() + (class_token ? 1 : 0); }
};

/// Linear patches with learned positions, layers as the language model's but not causal and without rotary positions,
/// an RMS norm, and a linear map to classes.
class VisionTransformer : public torch::nn::Module {
 public:
  /// Weights are not set: initialise() them. Throws UsageError for sizes that do not fit each other, as Attention
  /// does, and for sparsifiner without a class token, which its first row is.
  explicit VisionTransformer(const VisionOptions& options);
  /// Normal numbers as LanguageModel::initialise() has them.
  void initialise(std::uint64_t seed);
  /// images [B, channels, side, side] f32 → [B, classes] f32.
  at::Tensor forward(const at::Tensor& images);

  /// sparsifiner's first phase in all layers (Attention::imitate).
  void imitate(bool on);
  /// What the layers' mechanisms add to the loss of the last forward pass, or undefined.
  at::Tensor auxiliary() const { return auxiliary_of(layers_); }

  const VisionOptions& options() const { return options_; }

 private:
  VisionOptions options_;
  std::vector<std::shared_ptr<Layer>> layers_;
  at::Tensor patches_, positions_, class_, output_norm_, head_;
};

/// Pictures [count, 1, side, side] of one figure each, at a random place in noise, and which it is (i64 0 … 3): a line
/// across, a line down, a cross, a ring, of 5 pixels a side. Seed and number alone decide. side >= 5.
struct Pictures {
  at::Tensor images, labels;
};
Pictures draw_pictures(std::uint64_t seed, Index count, Index side);

}  // namespace heed::nn
