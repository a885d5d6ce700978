// One stretch of tokens through the layers of a model.
#pragma once

#include <chrono>
#include <vector>

#include "heed/model/calibration.h"
#include "heed/model/weights.h"

namespace heed::model {

/// Adds the wall seconds of its life to a sum.
class Stopwatch {
 public:
  explicit Stopwatch(double& sum) : sum_(sum), start_(clock::now()) {}
  ~Stopwatch() { sum_ += std::chrono::duration<double>(clock::now() - start_).count(); }
  Stopwatch(const Stopwatch&) = delete;
  Stopwatch& operator=(const Stopwatch&) = delete;

 private:
  using clock = std::chrono::steady_clock;
  double& sum_;
  clock::time_point start_;
};

/// A mechanism with its parameters checked, and what it learned of each layer.
struct Chosen {
  const Mechanism* mechanism;
  Params params;
  std::map<Index, std::map<std::string, TensorView, std::less<>>> extra;  // by layer
  explicit Chosen(const MechanismCall& call, const Calibration* calibration = nullptr);
};

/// A model's arithmetic for rows of tokens that stand one after the other, with its KV cache.
/// Rows of every buffer are padded to 16 floats.
class Forward {
 public:
  Forward(const Model& model, DType kv, Index context);

  Index width() const { return width_; }  // of a row of hidden states, padded
  Index query_width() const { return query_width_; }
  Index size() const { return keys_.front().size(); }
  void truncate(Index size);
  /// Tells mechanisms that a prompt is about to be read, and how many tokens the cache will hold after it.
  void begin_prompt(Index size);
  /// The steps that follow decode single tokens: their linear layers read the weights in the file's own format,
  /// unrounded, where it is at hand.
  void begin_decode();

  /// Residual streams of `n` tokens: x [n, width()].
  void embed(const Token* tokens, Index n, float* x);
  /// Norm, projections and RoPE of the rows at positions position … position + n - 1: queries into
  /// q [n, query_width()], keys and values into the cache.
  void project(Index layer, const float* x, Index n, Index position, float* q);
  /// Attention of the last n tokens of the layer's cache; out [n, query_width()].
  void attend(Index layer, const Chosen& how, const float* q, Index n, float* out, bool counted);
  /// Output projection, feed-forward and both residual sums, into x [n, width()].
  void finish(Index layer, const float* mixed, Index n, float* x);
  /// out = output norm of x, both [n, width()].
  void output_norm(const float* x, Index n, float* out);
  /// Logits of one normed row: [vocabulary].
  void logits(const float* normed, std::vector<float>& out);

  /// Bytes of the KV cache, and of activations and tables.
  Index kv_bytes() const;
  Index activation_bytes() const;

  SessionStats stats;  // times and counts since the owner reset them
  std::function<void(Index, const Plan&)> observer;
  std::function<void(Index, const Inputs&)> inputs_observer;

 private:
  void norm(const float* x, const std::vector<float>& weight, float* out) const;
  void add(float* x, const std::vector<float>& weight, float* sum) const;
  void multiply(std::initializer_list<Linear::Job> jobs);
  void scatter(const Plan& plan, Index n, float* out);

  const Model::Weights& w_;
  const ModelInfo& info_;
  DType kv_, arithmetic_;  // arithmetic_: of the linear layers, now
  bool by_file_ = false;
  Index prompt_ = 0;  // tokens of the prompt that is being read, or was
  Index context_, width_, query_width_, kv_width_, ffn_width_;
  Rope global_, local_;
  std::vector<KeyValues> keys_;      // per layer
  std::vector<std::any> memories_;   // per layer: what its mechanism remembers of the tokens held
  Activations activations_;
  Buffer<float> k_, v_, projected_, gate_, up_, lanes_, logits_;
};

}  // namespace heed::model
