#include "heed/nn/vision.h"

#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <c10/core/GradMode.h>

#include <algorithm>

namespace heed::nn {

VisionTransformer::VisionTransformer(const VisionOptions& o) : options_(o) {
  if (o.patch < 1 || o.side < o.patch || o.side % o.patch != 0)
    fail_usage("vision: patch = {}, expected a divisor of side = {}", o.patch, o.side);
  if (o.kv_heads < 1 || o.heads % o.kv_heads != 0)
    fail_usage("vision: kv_heads = {}, expected a divisor of heads = {}", o.kv_heads, o.heads);
  if (o.mechanisms.empty()) fail_usage("vision: no mechanisms, expected one or more");
  for (const MechanismCall& call : o.mechanisms)
    if (call.name == "sparsifiner" && !o.class_token)
      fail_usage("sparsifiner: class_token = false, expected true: its first row is the class token's");
  const auto add = [&](const char* name, std::vector<Index> shape) {
    return register_parameter(name, at::empty(shape, at::kFloat));
  };
  patches_ = add("patches", {o.width, o.channels * o.patch * o.patch});
  positions_ = add("positions", {o.tokens(), o.width});
  if (o.class_token) class_ = add("class", {o.width});
  const auto blocks = register_module("blk", std::make_shared<torch::nn::Module>());
  for (Index i = 0; i < o.layers; ++i) {
    const AttentionOptions attention{.width = o.width,
                                     .heads = o.heads,
                                     .kv_heads = o.kv_heads,
                                     .head_size = o.head_size,
                                     .mechanism = o.mechanisms[static_cast<size_t>(i) % o.mechanisms.size()],
                                     .causal = false,
                                     .rope_base = 0,
                                     .lepe = o.lepe,
                                     .tokens = o.tokens()};
    layers_.push_back(std::make_shared<Layer>(attention, o.ffn, false));
    blocks->register_module(fmt::format("{}", i), layers_.back());
  }
  output_norm_ = add("output_norm", {o.width});
  head_ = add("head", {o.classes, o.width});
}

void VisionTransformer::initialise(std::uint64_t seed) {
  const c10::NoGradGuard frozen;
  Random random(seed);
  initialise_weights(*this, options_.width, options_.layers, random);
  for (const auto& layer : layers_) layer->attention().initialise_learned(random);
}

at::Tensor VisionTransformer::forward(const at::Tensor& images) {
  const VisionOptions& o = options_;
  const Index b = images.size(0);
  if (images.sizes() != at::IntArrayRef({b, o.channels, o.side, o.side}))
    fail("images: shape = {}, expected {}", to_string({images.sizes().begin(), images.sizes().end()}),
         to_string({b, o.channels, o.side, o.side}));
  const at::Tensor pixels = images.unfold(2, o.patch, o.patch)
                                .unfold(3, o.patch, o.patch)  // [B, channels, grid, grid, patch, patch]
                                .permute({0, 2, 3, 1, 4, 5})
                                .reshape({b, o.grid() * o.grid(), -1});
  at::Tensor x = product(pixels, patches_, at::kFloat);
  if (o.class_token) x = at::cat({class_.expand({b, 1, o.width}), x}, 1);
  x = x + positions_;
  for (const auto& layer : layers_) x = layer->forward(x, at::kFloat);
  x = rms_norm(x, output_norm_, 1e-5);
  return product(o.class_token ? x.select(1, 0) : x.mean(1), head_, at::kFloat);
}

void VisionTransformer::imitate(bool on) {
  for (const auto& layer : layers_) layer->attention().imitate(on);
}

Pictures draw_pictures(std::uint64_t seed, Index count, Index side) {
  constexpr Index size = 5;
  Pictures all{at::empty({count, 1, side, side}, at::kFloat), at::empty({count}, at::kLong)};
  Random random(seed);
  float* image = all.images.data_ptr<float>();
  for (Index i = 0; i < count; ++i, image += side * side) {
    for (Index p = 0; p < side * side; ++p) image[p] = static_cast<float>(0.2 * random.normal());
    const Index kind = random.below(4), top = random.below(side - size + 1), left = random.below(side - size + 1);
    for (Index y = 0; y < size; ++y)
      for (Index x = 0; x < size; ++x) {
        const bool across = y == size / 2, down = x == size / 2;
        const bool edge = y == 0 || x == 0 || y == size - 1 || x == size - 1;
        const bool inked = kind == 0 ? across : kind == 1 ? down : kind == 2 ? across || down : edge;
        if (inked) image[(top + y) * side + left + x] += 1;
      }
    all.labels.data_ptr<std::int64_t>()[i] = kind;
  }
  return all;
}

}  // namespace heed::nn
