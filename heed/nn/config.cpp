#include "heed/nn/config.h"

#include <nlohmann/json.hpp>

#include <algorithm>

#include "heed/base/text.h"

namespace heed::nn {
namespace {

using Json = nlohmann::ordered_json;

std::string text_of(const Json& value, const std::string& where) {
  if (value.is_string()) return value.get<std::string>();
  if (value.is_number() || value.is_boolean()) return value.dump();
  fail_usage("{} is {}, expected a number, a boolean or text", where, value.type_name());
}

std::vector<std::string> texts_of(const Json& value, const std::string& where) {
  if (!value.is_array()) return {text_of(value, where)};
  std::vector<std::string> texts;
  for (const Json& item : value) texts.push_back(text_of(item, where));
  return texts;
}

}  // namespace

const std::vector<ParamSpec>& train_settings() {
  static const std::vector<ParamSpec> settings{
      integer("steps", 1000, 1, "steps of the whole run"),
      integer("batch", 8, 1, "sequences of a step"),
      integer("length", 512, 2, "tokens of a sequence"),
      choice("optimizer", "adamw", {"adamw", "muon"}, "adamw, or muon for the matrices of the layers"),
      number("lr", 1e-3, 0, 1e300, "learning rate after warming up"),
      number("final_lr", 0.1, 0, 1, "share of it that is left at the last step, along half a cosine"),
      integer("warmup", 50, 0, "steps over which the learning rate rises"),
      number("weight_decay", 0.1, 0, 1e300, "decoupled, of matrices alone"),
      number("clip", 1, 0, 1e300, "longest gradient, as one vector; 0: any"),
      choice("dtype", "f32", {"f32", "bf16"}, "arithmetic of products and attention; weights are kept in f32"),
      number("held_out", 0.05, 0, 0.5, "share of the text, its end, that is not trained on but scored"),
      integer("eval_every", 100, 1, "steps between scores of the held-out text"),
      integer("eval_tokens", 16384, 1, "most held-out tokens of a score"),
      integer("save_every", 200, 1, "steps between checkpoints"),
      integer("seed", 0, 0, "of weights and of the order of the text"),
      integer("layers", 6, 1, 1024, "a new model's layers"),
      integer("width", 256, 2, 1 << 16, "features of a token"),
      integer("ffn", 704, 1, 1 << 18, "features inside the feed-forward"),
      integer("heads", 4, 1, 1024, "query heads"),
      integer("kv_heads", 2, 1, 1024, "heads of keys and values, a divisor of heads"),
      integer("head_size", 64, 2, 512, "features of a head, an even number"),
      integer("context", 4096, 2, 1 << 24, "most tokens that the model is said to read"),
      number("rope_base", 1e4, 1, 1e300, "base of the rotary positions"),
      boolean("tied", true, "the output's weights are the embedding's"),
      boolean("bos", false, "a new model's sequences all begin with the end mark, which is not predicted"),
      integer("key_conv", 0, 0, 5, "width of flash-moba's learned convolution of keys, 3 or 5; 0: none"),
      choice("gate", "elementwise", {"elementwise", "headwise"},
             "gated-attention: a gate for every feature, or one for every head")};
  return settings;
}

Params settings_of(const TrainConfig& config) {
  Params p("train", train_settings(), config.settings);
  if (const Index w = p.integer("key_conv"); w != 0 && w != 3 && w != 5)
    fail_usage("train: key_conv = {}, expected 0, 3 or 5", w);
  return p;
}

void set(ParamTexts& settings, const std::string& name, const std::string& value) {
  std::erase_if(settings, [&](const auto& s) { return s.first == name; });
  settings.emplace_back(name, value);
}

TrainConfig parse_config(const std::string& text, const std::string& name) {
  const Json json = Json::parse(text, nullptr, false, true);
  if (!json.is_object()) fail_usage("{}: not a JSON object, expected one such as {{\"file\": \"book.txt\"}}", name);
  TrainConfig config;
  for (const auto& [key, value] : json.items()) {
    const std::string where = fmt::format("{}: {}", name, printable(key));
    if (key == "file") config.file = text_of(value, where);
    else if (key == "from") config.from = text_of(value, where);
    else if (key == "mechanism") config.mechanisms = texts_of(value, where);
    else set(config.settings, key, text_of(value, where));
  }
  return config;
}

std::string json_of(const TrainConfig& config) {
  Json json = Json::object();
  json["file"] = config.file;
  if (!config.from.empty()) json["from"] = config.from;
  json["mechanism"] = config.mechanisms;
  for (const auto& [name, value] : config.settings) json[name] = value;
  return json.dump(2);
}

namespace {

// Those that are no replacement in a model trained without them, while here a model is trained with them: Attention and
// LanguageModel have what they need.
bool made_here(const std::string& mechanism) {
  for (const char* name : {"combiner", "dma", "gated-attention", "landmark", "routing-transformer"})
    if (mechanism == name) return true;
  return false;
}

}  // namespace

void check_trains(const MechanismCall& call, bool causal) {
  const Mechanism& m = find_mechanism(call.name);
  if (!causal && m.causality == Causality::implied)
    fail_usage("mechanism = {}: it is causal, expected one whose tokens see each other both ways", m.name);
  if (causal && (m.causality == Causality::refused || (!m.not_on_models.empty() && !made_here(m.name))))
    fail_usage("mechanism = {}: {}, expected one that a causal language model can be trained with", m.name,
               m.not_on_models.empty() ? std::string("it is not causal") : m.not_on_models);
  Params(m.name, m.params, call.params);
}

std::string why_not_exported(const std::vector<MechanismCall>& mixers) {
  for (const MechanismCall& call : mixers)
    if (const Mechanism& m = find_mechanism(call.name); !m.not_on_models.empty())
      return fmt::format("layers with {} run only where they are trained", m.name);
  return "";
}

std::vector<MechanismCall> mixers_of(const std::vector<std::string>& texts, const model::ModelInfo& info) {
  std::vector<MechanismCall> mixers(static_cast<size_t>(info.layers), MechanismCall{"dense", {}});
  for (const std::string& text : texts) {
    // "0-2=moba:block=64": an equals sign before the colon ends a list of layers.
    const size_t equals = text.find('='), named = equals < text.find(':') ? equals : std::string::npos;
    const MechanismCall call = MechanismCall::parse(named == std::string::npos ? text : text.substr(named + 1));
    check_trains(call);
    if (named == std::string::npos) std::fill(mixers.begin(), mixers.end(), call);
    else
      for (const Index layer : model::parse_layers(text.substr(0, named), info))
        mixers[static_cast<size_t>(layer)] = call;
  }
  for (size_t i = 0; i < mixers.size(); ++i)
    if (info.local[i])
      mixers[i] = MechanismCall{"streaming", {{"sink", "0"}, {"window", fmt::format("{}", info.window)}}};
  return mixers;
}

model::ModelInfo info_of(const Params& p) {
  model::ModelInfo info;
  info.architecture = "llama", info.name = "heed train";
  info.layers = p.integer("layers"), info.width = p.integer("width"), info.ffn = p.integer("ffn");
  info.heads = p.integer("heads"), info.kv_heads = p.integer("kv_heads"), info.head_size = p.integer("head_size");
  info.context = p.integer("context");
  info.vocabulary = static_cast<Index>(model::Vocabulary::bytes().tokens.size());
  info.rms_eps = 1e-5, info.rope_base = p.number("rope_base");
  info.tied_output = p.boolean("tied");
  info.local.assign(static_cast<size_t>(info.layers), false);
  if (info.heads % info.kv_heads != 0)
    fail_usage("train: kv_heads = {}, expected a divisor of heads = {}", info.kv_heads, info.heads);
  if (info.head_size % 2 != 0) fail_usage("train: head_size = {}, expected an even number", info.head_size);
  if (const Index length = p.integer("length"); length > info.context)
    fail_usage("train: length = {}, expected at most context = {}", length, info.context);
  return info;
}

}  // namespace heed::nn
