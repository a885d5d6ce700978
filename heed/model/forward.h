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
  using Extra = std::map<std::string, TensorView, std::less<>>;
  const Mechanism* mechanism;
  Params params;
  Extra shared;                   // of layers that have nothing of their own
  std::map<Index, Extra> own;     // by layer, with what is shared
  const Extra& extra(Index layer) const {
    const auto it = own.find(layer);
    return it == own.end() ? shared : it->second;
  }
  explicit Chosen(const MechanismCall& call, const Calibration* calibration = nullptr);
};

/// A model's arithmetic for rows of tokens that stand one after the other, with its KV cache.
/// Rows of every buffer are padded to 16 floats.
class Forward {
 public:
  /// kv: what keys and values are stored as.
  /// rewind: as in SessionOptions.
  Forward(const Model& model, DType kv, Index context, Index rewind);

  Index width() const { return width_; }  // of a row of hidden states, padded
  Index query_width() const { return query_width_; }
  Index size() const { return keys_.front().size(); }
  /// Forgets all tokens from `size` on; throws Error where those that follow would miss some that were dropped.
  void truncate(Index size);
  /// Tells mechanisms that a prompt is about to be read, and how many tokens the cache will hold after it.
  void begin_prompt(Index size);
  /// The steps that follow decode single tokens: their linear layers read the weights in the file's own format,
  /// unrounded, where it is at hand.
  void begin_decode();

  /// What was begun last is as if it had not been: its tokens are forgotten, an earlier prompt is the prompt again.
  void give_up();

  /// Residual streams of `n` tokens: x [n, width()].
  void embed(const Token* tokens, Index n, float* x);
  /// Norm, projections and RoPE of the rows at positions position … position + n - 1: queries into
  /// q [n, query_width()], keys and values into the cache.
  void project(Index layer, const float* x, Index n, Index position, float* q);
  /// Attention of the last n tokens of the layer's cache; out [n, query_width()]. counted: into stats. drop: `how` is
  /// what attends in this layer from here on, so keys and values that it can no longer see need not be kept.
  struct Attending {
    bool counted = false, drop = false;
  };
  void attend(Index layer, const Chosen& how, const float* q, Index n, float* out, Attending now);
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
  using Reaches = decltype(Plan::reaches);
  void check_held(Index layer, const Reaches& reaches, Index position) const;
  void drop_unreachable(Index layer);

  const Model::Weights& w_;
  const ModelInfo& info_;
  DType arithmetic_;  // of the linear layers, now
  bool by_file_ = false;
  Index prompt_ = 0, earlier_prompt_ = 0;  // tokens of the prompt that is being read, or was, and of the one before
  Index context_, width_, query_width_, kv_width_, ffn_width_;
  Rope global_, local_;
  std::vector<KeyValues> keys_;  // per layer
  std::vector<std::any> memories_;  // per layer: what its mechanism remembers of the tokens held
  // Per layer: who says what may be dropped (Plan::reaches), whether that is to be held against what was dropped
  // before, and how many panels a head had when that was last looked through.
  struct Dropping {
    Reaches reaches;
    bool unchecked = false;
    Index panels = 0;
  };
  std::vector<Dropping> dropping_;
  Index rewind_, floor_ = 0;  // floor_: tokens that were held before those that are being fed
  Activations activations_;
  Buffer<float> k_, v_, projected_, gate_, up_, lanes_, logits_;
};

}  // namespace heed::model
