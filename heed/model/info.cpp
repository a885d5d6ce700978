// From a file's metadata to the sizes of a model, and the tensors that it must then hold.

#include <cmath>

#include "heed/model/weights.h"

namespace heed::model {
namespace {

constexpr const char* supported = "gemma3, llama";

// Reads keys of one architecture; "heads" is asked as "llama.heads".
class Keys {
 public:
  Keys(const Gguf& file, std::string prefix) : file_(file), prefix_(std::move(prefix)) {}

  std::string key(const char* name) const { return prefix_ + "." + name; }
  bool has(const char* name) const { return file_.has(key(name)); }

  Index size(const char* name, Index most) const { return checked(name, file_.integer(key(name)), most); }
  Index size_or(const char* name, Index otherwise, Index most) const {
    return checked(name, file_.integer_or(key(name), otherwise), most);
  }
  double positive(const char* name, double x) const {
    if (!(x > 0) || !std::isfinite(x)) fail("{}: {} = {}, expected a number > 0", file_.name(), key(name), x);
    return x;
  }
  double positive(const char* name) const { return positive(name, file_.number(key(name))); }
  double positive_or(const char* name, double otherwise) const {
    return positive(name, file_.number_or(key(name), otherwise));
  }
  /// The key must be absent, 0, or `neutral`.
  void refuse_unless(const char* name, double neutral) const {
    const double x = file_.number_or(key(name), neutral);
    if (x != neutral && x != 0)
      fail("{}: {} = {} is not supported, expected {} or no such key", file_.name(), key(name), x, neutral);
  }

 private:
  Index checked(const char* name, Index n, Index most) const {
    if (n < 1 || n > most) fail("{}: {} = {}, expected 1 … {}", file_.name(), key(name), n, most);
    return n;
  }
  const Gguf& file_;
  std::string prefix_;
};

// Numbers that leave a model as it is unless they say otherwise, and features that heed lacks.
void refuse_unsupported(const Gguf& file, const Keys& keys) {
  const std::string scaling = file.text_or(keys.key("rope.scaling.type"), "none");
  if (scaling != "none")
    fail("{}: {} = {} is not supported, expected none", file.name(), keys.key("rope.scaling.type"), scaling);
  for (const char* name :
       {"rope.scaling.factor", "rope.scale_linear", "logit_scale", "residual_scale", "embedding_scale"})
    keys.refuse_unless(name, 1);
  for (const char* name : {"expert_count", "expert_used_count", "attention.scale", "attention.clamp_kqv",
                           "attention.max_alibi_bias", "attn_logit_softcapping", "final_logit_softcapping"})
    keys.refuse_unless(name, 0);
  if (!file.boolean_or(keys.key("attention.causal"), true))
    fail("{}: {} = false is not supported, expected true", file.name(), keys.key("attention.causal"));
}

}  // namespace

ModelInfo read_info(const Gguf& file) {
  ModelInfo info;
  info.architecture = file.text("general.architecture");
  if (info.architecture != "llama" && info.architecture != "gemma3")
    fail("{}: general.architecture = {} is not supported, expected one of: {}", file.name(), info.architecture,
         supported);
  const bool gemma = info.architecture == "gemma3";
  info.name = file.text_or("general.name", "");

  const Keys keys(file, info.architecture);
  refuse_unsupported(file, keys);
  // Every layer has tensors of its own, so their number bounds the layers.
  constexpr Index large = Index{1} << 20;
  info.layers = keys.size("block_count", static_cast<Index>(file.tensors().size()));
  info.width = keys.size("embedding_length", large);
  info.ffn = keys.size("feed_forward_length", large);
  info.heads = keys.size("attention.head_count", 1 << 14);
  info.kv_heads = keys.size_or("attention.head_count_kv", info.heads, 1 << 14);
  info.context = keys.size("context_length", Index{1} << 30);
  if (info.heads % info.kv_heads != 0)
    fail("{}: {} = {}, expected a divisor of {} = {}", file.name(), keys.key("attention.head_count_kv"), info.kv_heads,
         keys.key("attention.head_count"), info.heads);

  constexpr Index largest_head = 1024;
  if (keys.has("attention.key_length")) {
    info.head_size = keys.size("attention.key_length", largest_head);
  } else {
    if (info.width % info.heads != 0)
      fail("{}: {} = {}, expected a divisor of {} = {}", file.name(), keys.key("attention.head_count"), info.heads,
           keys.key("embedding_length"), info.width);
    info.head_size = info.width / info.heads;
  }
  if (info.head_size % 2 != 0 || info.head_size > largest_head)
    fail("{}: head size = {}, expected an even number up to {}", file.name(), info.head_size, largest_head);
  for (const char* name : {"attention.value_length", "rope.dimension_count"})
    if (const Index n = keys.size_or(name, info.head_size, largest_head); n != info.head_size)
      fail("{}: {} = {} is not supported, expected the head size, {}", file.name(), keys.key(name), n, info.head_size);

  info.rms_eps = keys.positive("attention.layer_norm_rms_epsilon");
  info.rope_base = keys.positive_or("rope.freq_base", gemma ? 1e6 : 1e4);
  info.local.assign(static_cast<size_t>(info.layers), false);
  if (gemma) {
    info.rope_base_local = keys.positive_or("rope.freq_base_swa", 1e4);
    info.window = keys.size("attention.sliding_window", Index{1} << 30);
    // The last of every six layers attends globally.
    const Index period = keys.size_or("attention.sliding_window_pattern", 6, 1 << 20);
    for (Index i = 0; i < info.layers; ++i) info.local[static_cast<size_t>(i)] = i % period < period - 1;
    info.embedding_scale = std::sqrt(static_cast<float>(info.width));
  } else {
    keys.refuse_unless("attention.sliding_window", 0);
  }

  info.vocabulary = static_cast<Index>(file.texts("tokenizer.ggml.tokens").size());
  if (info.vocabulary < 1) fail("{}: tokenizer.ggml.tokens is empty, expected at least one token", file.name());
  if (const Index n = keys.size_or("vocab_size", info.vocabulary, Index{1} << 30); n != info.vocabulary)
    fail("{}: {} = {}, expected the number of tokens, {}", file.name(), keys.key("vocab_size"), n, info.vocabulary);
  info.tied_output = file.find("output.weight") == nullptr;
  return info;
}

std::vector<TensorSpec> expected_tensors(const ModelInfo& info) {
  const Index q = info.heads * info.head_size, kv = info.kv_heads * info.head_size;
  std::vector<TensorSpec> list{{"token_embd.weight", {info.vocabulary, info.width}},
                               {"output_norm.weight", {info.width}}};
  if (!info.tied_output) list.push_back({"output.weight", {info.vocabulary, info.width}});
  for (Index i = 0; i < info.layers; ++i) {
    const auto add = [&](const char* name, Shape shape) {
      list.push_back({fmt::format("blk.{}.{}.weight", i, name), std::move(shape)});
    };
    add("attn_norm", {info.width});
    add("attn_q", {q, info.width});
    add("attn_k", {kv, info.width});
    add("attn_v", {kv, info.width});
    add("attn_output", {info.width, q});
    add("ffn_norm", {info.width});
    add("ffn_gate", {info.ffn, info.width});
    add("ffn_up", {info.ffn, info.width});
    add("ffn_down", {info.width, info.ffn});
    if (info.architecture == "gemma3") {
      add("attn_q_norm", {info.head_size});
      add("attn_k_norm", {info.head_size});
      add("post_attention_norm", {info.width});
      add("post_ffw_norm", {info.width});
    }
  }
  return list;
}

}  // namespace heed::model
