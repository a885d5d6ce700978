#include "heed/nn/trainer.h"

#include <ATen/ops/mean.h>
#include <ATen/ops/zeros.h>
#include <c10/core/GradMode.h>
#include <c10/util/Exception.h>

#include <charconv>
#include <cmath>
#include <limits>

#include "heed/base/file.h"
#include "heed/model/safetensors.h"
#include "heed/nn/gguf.h"
#include "heed/nn/tensors.h"

namespace heed::nn {
namespace {

constexpr const char* format = "heed checkpoint 1";

// Settings that describe the model: a file that holds one has settled them.
void check_model_stays(const TrainConfig& before, const TrainConfig& after, const std::string& path) {
  const Params a = settings_of(before), b = settings_of(after);
  for (const char* name : {"layers", "width", "ffn", "heads", "kv_heads", "head_size", "context", "rope_base", "tied",
                           "bos", "key_conv", "gate", "optimizer"})
    if (a.text(name) != b.text(name))
      fail_usage("{}: {} = {}, expected {}, as the run began", path, name, b.text(name), a.text(name));
  if (before.from != after.from)
    fail_usage("{}: from = {}, expected {}, as the run began", path, after.from, before.from);
}

}  // namespace

Trainer::Trainer(const TrainConfig& config)
    : config_(config), settings_(settings_of(config)), steps_(settings_.integer("steps")),
      batch_(settings_.integer("batch")), length_(settings_.integer("length")) {
  if (config.file.empty()) fail_usage("train: file is missing, expected a text to train on");
  const LayerOptions layers{.key_conv = settings_.integer("key_conv"),
                            .headwise_gate = settings_.text("gate") == "headwise"};
  std::vector<model::Token> tokens;
  std::optional<model::Token> bos;
  if (config.from.empty()) {
    const model::ModelInfo info = info_of(settings_);
    model_ = std::make_shared<LanguageModel>(info, mixers_of(config.mechanisms, info), layers);
    model_->initialise(static_cast<std::uint64_t>(settings_.integer("seed")));
    vocabulary_ = model::Vocabulary::bytes();
    if (settings_.boolean("bos")) vocabulary_.bos = bos = vocabulary_.eos, vocabulary_.add_bos = true;
    // Byte for byte: a text need not even be UTF-8.
    for (const char c : read_file(config.file)) tokens.push_back(static_cast<unsigned char>(c));
  } else {
    for (const char* name :
         {"layers", "width", "ffn", "heads", "kv_heads", "head_size", "context", "rope_base", "tied", "bos"})
      if (settings_.given(name))
        fail_usage("train: {} = {}, expected none: {} says it", name, settings_.text(name), config.from);
    const model::Gguf file = model::Gguf::open(config.from);
    model_ = read_model(file, config.mechanisms, layers);
    vocabulary_ = model::Vocabulary::from(file);
    chat_template_ = file.text_or("tokenizer.chat_template", "");
    if (length_ > model_->info().context)
      fail_usage("train: length = {}, expected at most the model's context, {}", length_, model_->info().context);
    const auto tokenizer = model::Tokenizer::make(vocabulary_);
    tokens = tokenizer->encode(read_file(config.file), false);
    bos = tokenizer->bos();
  }
  model_->set_arithmetic(settings_.text("dtype") == "bf16" ? at::kBFloat16 : at::kFloat);
  text_ = std::make_unique<TrainingText>(std::move(tokens), settings_.number("held_out"), length_, bos, config.file);
  OptimizerOptions options;
  options.muon = settings_.text("optimizer") == "muon";
  options.weight_decay = settings_.number("weight_decay");
  optimizer_ = std::make_unique<Optimizer>(parameters_of(*model_), options);
}

double Trainer::step() {
  const auto seed = static_cast<std::uint64_t>(settings_.integer("seed"));
  const Windows w = text_->batch(seed, step_, batch_);
  const at::Tensor loss = model_->losses(w.tokens, w.targets).mean();
  const double value = loss.item<double>();
  if (!std::isfinite(value))
    fail("train: loss = {} at step {}, expected a finite number; a smaller lr or clip may help", value, step_);
  const at::Tensor auxiliary = model_->auxiliary();
  try {
    (auxiliary.defined() ? loss + auxiliary : loss).backward();
  } catch (const c10::Error& e) {  // what heed said inside, without torch's frames
    throw Error(e.what_without_backtrace());
  }
  optimizer_->clip(settings_.number("clip"));
  const double share = rate_share(step_, steps_, settings_.integer("warmup"), settings_.number("final_lr"));
  optimizer_->step(settings_.number("lr") * share);
  ++step_;
  return value;
}

std::vector<Windows> Trainer::held_out_windows() const {
  return text_->held_out(settings_.integer("eval_tokens"), batch_);
}

std::vector<double> Trainer::held_out_by_position() const {
  const c10::NoGradGuard frozen;
  at::Tensor sum = at::zeros({length_}, at::kDouble);
  Index windows = 0;
  for (const Windows& w : held_out_windows()) {
    sum += model_->losses(w.tokens, w.targets).to(at::kDouble).sum(0);
    windows += w.tokens.size(0);
  }
  if (windows == 0) return {};
  sum /= windows;
  return {sum.const_data_ptr<double>(), sum.const_data_ptr<double>() + length_};
}

double Trainer::held_out() const {
  const std::vector<double> losses = held_out_by_position();
  if (losses.empty()) return std::numeric_limits<double>::quiet_NaN();
  double sum = 0;
  for (const double x : losses) sum += x;
  return sum / static_cast<double>(losses.size());
}

void Trainer::save(const std::string& path) const {
  std::vector<std::pair<std::string, TensorView>> tensors;
  for (const auto& [name, parameter] : parameters_of(*model_))
    tensors.emplace_back("model." + name, view_of(parameter));
  for (const auto& [name, momentum] : optimizer_->state()) tensors.emplace_back("optimizer." + name, view_of(momentum));
  // Batches follow from seed and step, so the step is all the state that random numbers have.
  model::write_safetensors(path, tensors,
                           {{"format", format}, {"step", fmt::format("{}", step_)}, {"config", json_of(config_)}});
}

std::unique_ptr<Trainer> Trainer::resume(const std::string& path, const std::function<void(TrainConfig&)>& change) {
  const model::SafetensorsFile file = model::SafetensorsFile::open(path);
  const auto text = [&](const char* key) -> const std::string& {
    const auto found = file.metadata().find(key);
    if (found == file.metadata().end())
      fail("{}: no \"{}\" in its metadata, expected a checkpoint of heed train", path, key);
    return found->second;
  };
  if (text("format") != format) fail("{}: format = \"{}\", expected \"{}\"", path, text("format"), format);
  const std::string& step = text("step");
  Index done = -1;
  const auto [end, error] = std::from_chars(step.data(), step.data() + step.size(), done);
  if (error != std::errc() || end != step.data() + step.size() || done < 0)
    fail("{}: step = \"{}\", expected a number of steps", path, step);

  TrainConfig config = parse_config(text("config"), path);
  const TrainConfig before = config;
  if (change) change(config);
  check_model_stays(before, config, path);
  auto trainer = std::make_unique<Trainer>(config);
  if (done > trainer->steps_)
    fail_usage("train: steps = {}, expected at least the {} that {} has done", trainer->steps_, done, path);
  const c10::NoGradGuard frozen;
  for (const auto& [name, parameter] : parameters_of(*trainer->model_))
    copy_into(parameter, file.tensor("model." + name), path + ": model." + name);
  for (const auto& [name, momentum] : trainer->optimizer_->state())
    copy_into(momentum, file.tensor("optimizer." + name), path + ": optimizer." + name);
  trainer->optimizer_->set_steps(done);
  trainer->step_ = done;
  return trainer;
}

std::vector<std::string> Trainer::export_model(const std::string& path) const {
  const std::optional<model::Calibration> learned = calibration_of(*model_);
  write_model(path, *model_, vocabulary_, chat_template_);
  std::vector<std::string> files{path};
  if (learned) {
    files.push_back(path + ".calibration.safetensors");
    model::write_calibration(files.back(), *learned);
  }
  return files;
}

}  // namespace heed::nn
