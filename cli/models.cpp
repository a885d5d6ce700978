#include "cli/models.h"

#include <algorithm>

#include "cli/terminal.h"
#include "heed/base/error.h"
#include "heed/model/calibration.h"
#include "heed/model/weights.h"

namespace heed::cli {

void ModelOptions::add(CLI::App& command, bool several_mechanisms, const std::string& mechanism_help) {
  command.add_option("MODEL", path, "A GGUF file")->required();
  command.add_option("--file", file, "The document, UTF-8 text; - is standard input")->type_name("F");
  command.add_option("--tokens", tokens, "Read this many tokens of it, BOS counted (default: all)")
      ->check(whole_number(1))
      ->type_name("N");
  mechanism.add(command, several_mechanisms, mechanism_help);
  command
      .add_option("--layers", layers,
                  "Layers that the mechanism replaces, such as 0,3,5-9,20- (default: every one with global attention); "
                  "the rest is dense")
      ->type_name("L");
  command.add_option("--phase", phase, "Where it applies: prefill, decode or both")
      ->check(one_of({"prefill", "decode", "both"}))
      ->type_name("P")
      ->capture_default_str();
  command
      .add_option("--calibration", calibrations,
                  "What a mechanism learned from a text (heed calibrate wrote it); may be repeated")
      ->take_all()
      ->type_name("F");
  command.add_option("--chunk", chunk, "Tokens per step of the prefill")
      ->check(whole_number(1))
      ->type_name("N")
      ->capture_default_str();
  command.add_option("--ctx", context, "Most tokens to hold (default: as many as needed, at most the model's context)")
      ->check(whole_number(1))
      ->type_name("N");
  command.add_option("--kv,--kv-type", kv, "Numbers of the KV cache: bf16, f32, or q8_0 (bytes and scales)")
      ->check(one_of({"f32", "bf16", "q8_0"}))
      ->type_name("T")
      ->capture_default_str();
  command.add_option("--dtype", dtype, "Arithmetic: bf16 or f32 (which keeps the KV cache in f32 instead of bf16)")
      ->check(one_of({"f32", "bf16"}))
      ->type_name("T")
      ->capture_default_str();
}

std::vector<model::MechanismUse> ModelOptions::uses(const std::vector<MechanismCall>& calls,
                                                    const model::ModelInfo& info) const {
  std::vector<std::shared_ptr<const model::Calibration>> learned;
  for (const std::string& name : calibrations) {
    learned.push_back(std::make_shared<const model::Calibration>(model::read_calibration(name)));
    const std::string& owner = learned.back()->mechanism;
    if (std::none_of(calls.begin(), calls.end(), [&](const MechanismCall& call) { return call.name == owner; }))
      fail_usage("--calibration: {} was made for {}, expected one for {}", name, owner, calls.front().name);
  }
  std::vector<model::MechanismUse> list;
  for (const MechanismCall& call : calls) {
    model::MechanismUse& use = list.emplace_back();
    use.call = call;
    if (!layers.empty()) use.layers = model::parse_layers(layers, info);
    use.phase = phase == "prefill"  ? model::Phase::prefill
                : phase == "decode" ? model::Phase::decode
                                    : model::Phase::both;
    for (const auto& calibration : learned)
      if (calibration->mechanism == call.name) use.calibration = calibration;
  }
  return list;
}

OpenedModel::OpenedModel(const ModelOptions& options)
    : options_(options), file_(model::Gguf::open(options.path)), info_(model::read_info(file_)),
      context_(info_.context) {
  if (options.context > info_.context)
    fail("--ctx = {}, expected at most the model's context, {}", options.context, info_.context);
  if (options.context > 0) context_ = options.context;
  if (options.tokens > context_) fail("--tokens = {}, expected at most the context, {}", options.tokens, context_);
  tokenizer_ = model::Tokenizer::make(model::Vocabulary::from(file_));
}

std::vector<model::Token> OpenedModel::ids_from(const std::string& text, Index skip) const {
  std::vector<model::Token> ids = tokenizer_->encode(text, false);
  const Index held = static_cast<Index>(ids.size());
  if (skip > 0 && skip >= held) fail("{}: holds {} tokens, expected more than --skip = {}", text_name(), held, skip);
  ids.erase(ids.begin(), ids.begin() + skip);
  return ids;
}

std::vector<model::Token> OpenedModel::read(const std::string& text, Index skip) const {
  std::vector<model::Token> ids = ids_from(text, skip);
  if (const auto bos = tokenizer_->bos()) ids.insert(ids.begin(), *bos);
  const Index held = static_cast<Index>(ids.size());
  if (options_.tokens > held)
    fail("{}: holds {} tokens{}, expected at least --tokens = {}", text_name(), held,
         skip > 0 ? fmt::format(" after {}", skip) : "", options_.tokens);
  if (options_.tokens > 0) ids.resize(static_cast<size_t>(options_.tokens));
  else if (held > context_)
    fail("{}: holds {} tokens, expected at most the context, {}; --tokens N reads the first N", text_name(), held,
         context_);
  return ids;
}

std::vector<std::vector<model::Token>> OpenedModel::pieces(const std::string& text, Index skip, Index count,
                                                           Index length) const {
  const std::vector<model::Token> ids = ids_from(text, skip);
  const auto bos = tokenizer_->bos();
  const Index held = static_cast<Index>(ids.size()), own = length - (bos ? 1 : 0);
  if (own < 1 || held / count < own)
    fail("{}: holds {} tokens{}, expected at least {}: {} pieces of {}", text_name(), held,
         skip > 0 ? fmt::format(" after {}", skip) : "", count * own, count, length);
  std::vector<std::vector<model::Token>> list;
  for (Index i = 0; i < count; ++i) {
    const auto first = ids.begin() + (count == 1 ? 0 : i * (held - own) / (count - 1));
    std::vector<model::Token>& piece = list.emplace_back(first, first + own);
    if (bos) piece.insert(piece.begin(), *bos);
  }
  return list;
}

std::unique_ptr<model::Model> OpenedModel::load(Index tokens, Index more) const {
  const DType arithmetic = dtype_named(options_.dtype);
  const DType kv = model::stored_kv(arithmetic, dtype_named(options_.kv));
  const Index weights = model::estimate_weight_bytes(file_, arithmetic);
  const Index cache = model::estimate_kv_bytes(info_, kv, tokens, options_.chunk);
  const Index available = model::available_memory();
  if (weights + cache + more > available)
    fail("{}: {} of memory for weights, {} for {} tokens, expected at most the {} that are available", file_.name(),
         bytes_text(weights), bytes_text(cache + more), tokens, bytes_text(available));
  return model::Model::load(options_.path, arithmetic);
}

}  // namespace heed::cli
