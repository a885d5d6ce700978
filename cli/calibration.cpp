#include "cli/calibration.h"

#include <fmt/format.h>

#include "cli/terminal.h"

namespace heed::cli {

CLI::App* CalibrateOptions::add(CLI::App& app) {
  CLI::App* command =
      app.add_subcommand("calibrate", "Let a mechanism learn from a model's attention over a text, or from tensors");
  model.add(*command, false, "The mechanism that learns: NAME or NAME:parameter=value,…");
  command->get_option("--mechanism")->required();
  command->remove_option(command->get_option("--calibration"));
  command->add_option("-o,--out", out, "The safetensors file to write; --calibration F uses it")
      ->required()
      ->type_name("F");
  command->add_option("--skip", skip, "Leave out this many tokens of the text first")
      ->check(whole_number(0))
      ->type_name("N");
  command
      ->add_option("--pieces", pieces,
                   "seer-attention, dhsa, moa: read this many pieces, spread over the text, of --tokens tokens (4096; "
                   "dhsa and moa "
                   "2048) [8]")
      ->check(whole_number(1))
      ->type_name("N");
  command->add_option("--steps", steps, "seer-attention: steps of AdamW a layer [300]; dhsa: in all [400]")
      ->check(whole_number(1))
      ->type_name("N");
  command->add_option("--lr", lr, "seer-attention, dhsa: rate of these steps, at most [0.001; dhsa 0.003]")
      ->check(real_number(1e-9, 10))
      ->type_name("X");
  command->add_option("--density", density, "moa: share of the keys that heads may keep, on average [0.5]")
      ->check(real_number(1e-6, 1))
      ->type_name("X");
  command->add_flag("--causal", causal, "With tensors: key j is hidden from earlier queries");
  command->add_flag("--json", json, "Print what was learned as one object");
  command->footer(
      "Examples:\n"
      "  heed calibrate model.gguf --mechanism proxy-attn --file book.txt --tokens 2000 -o proxy.safetensors\n"
      "  heed run model.gguf --file book.txt --mechanism proxy-attn --calibration proxy.safetensors\n\n"
      "seer-attention's gate, dhsa's boundary predictor and moa's spans are fitted, which takes a heed that was built "
      "with libtorch:\n"
      "  heed calibrate model.gguf --mechanism seer-attention --file book.txt --skip 8000 -o gate.safetensors\n"
      "  heed compare model.gguf --file book.txt --tokens 8000 --mechanism dense \\\n"
      "    --mechanism seer-attention:density=0.15 --calibration gate.safetensors\n\n"
      "MODEL may be a safetensors file with q, k and v instead:\n"
      "  heed calibrate video.safetensors --mechanism paro:grid=13x30x45 -o paro.safetensors\n"
      "  heed attend video.safetensors out.safetensors --mechanism paro:grid=13x30x45 --calibration paro.safetensors");
  return command;
}

bool CalibrateOptions::fits() const {
  return !from_tensors() && find_mechanism(model.mechanism.calls({"dense"}).front().name).fitted;
}

MechanismCall CalibrateOptions::call() const {
  const MechanismCall named = model.mechanism.calls({"dense"}).front();
  const bool spans = named.name == "moa", steps_of = named.name == "seer-attention" || named.name == "dhsa";
  if (!fits()) check_calibrates(find_mechanism(named.name));
  if (from_tensors()) {
    if (!model.file.empty()) fail_usage("calibrate: --file, expected only with a model");
    if (skip > 0) fail_usage("calibrate: --skip, expected only with a model");
  } else {
    if (model.file.empty()) fail_usage("calibrate: --file is missing, expected a text for the model to read");
    if (causal) fail_usage("calibrate: --causal, expected only with tensors");
  }
  const auto only = [&](bool given, const char* option, bool fitting, const char* owners) {
    if (given && !(fits() && fitting)) fail_usage("calibrate: {}, expected only with {} and a model", option, owners);
  };
  only(pieces.has_value(), "--pieces", steps_of || spans, "seer-attention, dhsa or moa");
  only(steps.has_value(), "--steps", steps_of, "seer-attention or dhsa");
  only(lr.has_value(), "--lr", steps_of, "seer-attention or dhsa");
  only(density.has_value(), "--density", spans, "moa");
  return named;
}

Json calibration_json(const model::Calibration& c, Index tokens) {
  const auto shapes = [](const NamedTensors& named) {
    Json tensors = Json::object();
    for (const auto& [name, tensor] : named) tensors[name] = tensor.shape();
    return tensors;
  };
  Json params = Json::object(), layers = Json::array();
  for (const auto& [name, value] : c.params) params[name] = value;
  for (const auto& [layer, named] : c.layers) layers.push_back({{"layer", layer}, {"tensors", shapes(named)}});
  return {{"mechanism", c.mechanism}, {"model", c.model}, {"tokens", tokens},
          {"params", params},         {"layers", layers}, {"all", shapes(c.all)}};
}

std::string calibration_text(const model::Calibration& c) {
  Index bytes = 0;
  const auto count = [&](const NamedTensors& named) {
    for (const auto& [name, tensor] : named) bytes += tensor.bytes();
  };
  for (const auto& [layer, named] : c.layers) count(named);
  count(c.all);
  std::string params;
  for (const auto& [name, value] : c.params) params += fmt::format(" {}={}", name, value);
  return fmt::format("{}, {}{}{}", c.all.empty() ? fmt::format("{} layers", c.layers.size()) : "one for all layers",
                     bytes_text(bytes), params.empty() ? "" : ", parameters", params);
}

}  // namespace heed::cli
