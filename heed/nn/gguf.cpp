#include "heed/nn/gguf.h"

#include <c10/core/GradMode.h>

#include "heed/model/weights.h"
#include "heed/nn/config.h"
#include "heed/nn/tensors.h"

namespace heed::nn {
namespace {

// Calls visit(layer, attention) for the layers whose mechanism learned something.
template <class Visit>
void for_learned(const LanguageModel& model, const Visit& visit) {
  for (Index i = 0; i < model.info().layers; ++i)
    if (const Attention& attention = model.layer(i).attention(); !attention.learned().empty()) visit(i, attention);
}

bool is_learned(const LanguageModel& model, const std::string& parameter) {
  bool found = parameter == "landmark";
  for_learned(model, [&](Index i, const Attention& attention) {
    for (const LearnedPart& part : attention.learned())
      found = found || parameter == fmt::format("blk.{}.attn.{}", i, part.name);
  });
  return found;
}

}  // namespace

std::string gguf_name(const std::string& parameter) {
  std::string name = parameter + ".weight";
  for (const std::string_view part : {".attn.", ".ffn."})
    if (const size_t at = name.find(part); at != std::string::npos) name[at + part.size() - 1] = '_';
  return name;
}

std::shared_ptr<LanguageModel> read_model(const model::Gguf& file, const std::vector<std::string>& mixers,
                                          const LayerOptions& options) {
  const model::ModelInfo info = model::read_info(file);
  model::check_tensors(file, info);
  const std::vector<MechanismCall> calls = mixers_of(mixers, info);
  for (const MechanismCall& call : calls)
    if (call.name == "gated-attention")
      fail_usage("mechanism = {}: {} holds no gates, expected a new model: a gate must be there from the start",
                 call.name, file.name());
  auto model = std::make_shared<LanguageModel>(info, calls, options);
  model->initialise(0);  // what mechanisms learn has to begin somewhere
  const c10::NoGradGuard frozen;
  for (const auto& [name, parameter] : parameters_of(*model)) {
    if (is_learned(*model, name)) continue;
    const model::GgufTensor& tensor = *file.find(gguf_name(name));
    for (Index r = 0; r < tensor.rows(); ++r) tensor.read_row(r, parameter.data_ptr<float>() + r * tensor.columns());
  }
  if (const auto named = model->named_parameters(); named.contains("landmark"))
    at::Tensor(named["landmark"]).copy_(named["token_embd"].mean(0));
  return model;
}

void write_model(const std::string& path, const LanguageModel& model, const model::Vocabulary& vocabulary,
                 const std::string& chat_template) {
  if (const std::string why = why_not_exported(model.mixers()); !why.empty())
    fail("{}: {}, expected mechanisms that heed run takes", path, why);
  model::GgufMetadata metadata = model::metadata_of(model.info());
  metadata.merge(model::metadata_of(vocabulary));
  std::vector<std::string> mixers;
  for (const MechanismCall& call : model.mixers()) mixers.push_back(call.text());
  metadata["heed.mechanisms"] = std::move(mixers);
  if (!chat_template.empty()) metadata["tokenizer.chat_template"] = chat_template;

  std::vector<model::GgufTensor> tensors;
  for (const auto& [name, parameter] : parameters_of(model)) {
    if (is_learned(model, name)) continue;
    const TensorView view = view_of(parameter);
    const auto* data = static_cast<const std::byte*>(view.data);
    tensors.push_back({gguf_name(name),
                       WeightFormat::f32,
                       view.shape,
                       {data, static_cast<size_t>(elements(view.shape) * size_of(view.dtype))}});
  }
  model::write_gguf(path, metadata, tensors);
}

std::optional<model::Calibration> calibration_of(const LanguageModel& model) {
  std::optional<model::Calibration> calibration;
  for_learned(model, [&](Index i, const Attention& attention) {
    const MechanismCall& call = attention.options().mechanism;
    if (!calibration) {
      calibration.emplace();
      calibration->mechanism = call.name, calibration->params = call.params;
      calibration->model = model.info().architecture + " " + model.info().name;
    }
    if (calibration->mechanism != call.name)
      fail("calibration: layers learned for {} and {}, expected one mechanism", calibration->mechanism, call.name);
    const auto parameters = attention.named_parameters(false);
    for (const LearnedPart& part : attention.learned())
      calibration->layers[i].emplace(part.name, heed_copy(parameters[part.name]));
  });
  return calibration;
}

}  // namespace heed::nn
