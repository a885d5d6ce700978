// A language model read from a GGUF file: weights packed for the kernels, shared by all sessions.
#pragma once

#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "heed/mechanism/attend.h"
#include "heed/model/gguf.h"
#include "heed/model/tokenizer.h"

namespace heed::model {

/// The sizes and constants of a model, read from its metadata.
struct ModelInfo {
  std::string architecture, name;  // "llama" or "gemma3"
  Index layers = 0, width = 0, ffn = 0, heads = 0, kv_heads = 0, head_size = 0, vocabulary = 0, context = 0;
  double rms_eps = 0, rope_base = 0, rope_base_local = 0;
  Index window = 0;                  // sliding window of local layers in tokens, own included; 0 = none
  std::vector<bool> local;           // per layer: has its own sliding window
  bool tied_output = false;
  float embedding_scale = 1;
  Index weight_bytes = 0;            // packed weights in memory
};

class Model {
 public:
  /// Loads and packs every weight. arithmetic: bf16, or f32. Throws Error for an unsupported
  /// architecture or tensor type (listing those supported), a missing or misshapen tensor, and,
  /// before anything large is allocated, when the estimate exceeds the memory available.
  /// The file stays mapped: embedding rows are read from it, and decoding reads every matrix in its format.
  static std::unique_ptr<Model> load(const std::string& path, DType arithmetic);
  /// As above from an opened file, which need not outlive the call: decoding then reads the packed weights.
  static std::unique_ptr<Model> load(const Gguf& file, DType arithmetic);
  ~Model();

  const ModelInfo& info() const;
  const Tokenizer& tokenizer() const;
  DType arithmetic() const;
  /// The raw chat template text of the file, "" when there is none.
  const std::string& chat_template() const;

  struct Weights;
  const Weights& weights() const { return *weights_; }

 private:
  Model();
  static std::unique_ptr<Model> build(const Gguf& file, DType arithmetic, bool file_stays);
  std::unique_ptr<Weights> weights_;
};

/// Bytes that loading this file takes (packed weights, and the embedding in its own format), and
/// bytes of KV cache per token, for refusing a job before it starts.
Index estimate_weight_bytes(const Gguf& file, DType arithmetic);
Index kv_bytes_per_token(const ModelInfo& info, DType kv);
/// Bytes of KV cache of `tokens` tokens, read `chunk` at a time, where every layer but those with a sliding window of
/// their own sees all of them.
Index estimate_kv_bytes(const ModelInfo& info, DType kv, Index tokens, Index chunk);
/// What a session stores where `kv` is asked for: bf16 would round what f32 arithmetic has, so that keeps f32.
DType stored_kv(DType arithmetic, DType kv);
/// MemAvailable of the machine, or the cgroup's limit where that is smaller.
Index available_memory();

enum class Phase : std::uint8_t { prefill = 1, decode = 2, both = 3 };

struct Calibration;

/// A mechanism in a model: which layers and which phase it replaces. The rest stays dense; a
/// model's own sliding-window layers are left alone.
struct MechanismUse {
  MechanismCall call{"dense", {}};
  /// Layers, ascending; empty = every layer that has global attention.
  std::vector<Index> layers;
  Phase phase = Phase::both;
  /// What it learned before (heed/model/calibration.h), or null.
  std::shared_ptr<const Calibration> calibration = nullptr;
};

/// "0,3,5-9,20-" to layer numbers. Throws UsageError for malformed text, a number >= layers, or a
/// layer that has the model's own sliding window.
std::vector<Index> parse_layers(const std::string& text, const ModelInfo& info);

struct SessionOptions {
  MechanismUse use;
  Index context = 0;  // most tokens the session will hold (0: the model's context); KV memory is touched as tokens come
  Index chunk = 512;  // tokens per prefill step
  // What keys and values are stored as: f32, bf16, or i8 with a scale for each key and each value. With f32 arithmetic
  // bf16 means f32.
  DType kv = DType::bf16;
  /// Whether keys and values are dropped that no later query can see, where a layer's mechanism says which these are
  /// (a sliding window does).
  bool drop = true;
  /// Tokens by which truncate() can go back from what was held, dropped ones notwithstanding, at least 1.
  Index rewind = 64;
};

/// Where the time and the work of a session went since it began or since reset_stats().
struct SessionStats {
  // Wall seconds. attention_s: packing keys and values, planning, attending; plan_s is its share
  // for planning. output_s: last norm and logits. other_s: norms, RoPE, embedding.
  double attention_s = 0, linear_s = 0, plan_s = 0, other_s = 0, output_s = 0;
  AttendStats attend;  // replaced layers only (all global layers under dense)
  Index dense_pairs = 0;  // of the same calls
  Index kv_bytes = 0, scratch_bytes = 0;  // now, what was dropped not counted; most
  Index kv_read_bytes = 0;  // bytes of keys and values, in panels, that attention read, all layers
  Index peak_bytes = 0;  // KV cache, scratch of all threads, activations
};

/// Called after each step with tokens done; returning false stops early (Ctrl-C): the call in
/// progress throws Interrupted and its tokens are forgotten.
using Progress = std::function<bool(Index done, Index total)>;
struct Interrupted {};

/// One sequence through a model: its KV cache and its mechanism.
class Session {
 public:
  /// Throws UsageError when the mechanism cannot run on a model (saying why), or for layers that
  /// do not exist or have their own sliding window; Error when the context exceeds the model's, or a
  /// calibration holds layers that the model lacks.
  Session(const Model& model, const SessionOptions& options);
  ~Session();

  /// Feeds tokens in chunks; returns the logits after the last one, [vocabulary]. Throws Error when
  /// a token is out of range, when they do not fit the context, when the mechanism needs the
  /// whole prompt at once and tokens are held already, and when it sees more in a second prompt than was
  /// kept of the first. After an exception the tokens are forgotten.
  const std::vector<float>& prefill(const std::vector<Token>& tokens, const Progress& progress = {});
  /// Feeds one token (decode phase); returns the logits after it.
  const std::vector<float>& decode(Token token);
  /// Feeds all tokens like prefill and keeps the final hidden states; then score_hidden() gives
  /// -ln p(tokens[i] | tokens before) for i = 1 … n-1 (n-1 values), in slices of <= 256 rows.
  const std::vector<float>& prefill_keeping_hidden(const std::vector<Token>& tokens, const Progress& progress = {});
  std::vector<double> score_hidden(const Progress& progress = {});

  Index size() const;  // tokens held
  /// Forgets all tokens from `size` on. Throws Error where tokens that follow would see some that were dropped, which
  /// cannot be for 0 nor for options.rewind tokens less than are held.
  void truncate(Index size);
  const SessionStats& stats() const;
  void reset_stats();

  /// The plans of every layer's attention, the model's own windows included: called inside prefill
  /// for every chunk while set. Rows are the chunk's.
  using PlanObserver = std::function<void(Index layer, const Plan&)>;
  void observe_plans(PlanObserver observer);
  /// What the attention of every layer that the mechanism may replace is given, whole prompts at once: called
  /// inside prefill while set.
  using InputsObserver = std::function<void(Index layer, const Inputs&)>;
  void observe_inputs(InputsObserver observer);

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace heed::model
