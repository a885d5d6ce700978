// heed calibrate: a mechanism learns from a model's own attention over a text.

#include <fmt/format.h>

#include <memory>

#include "cli/commands.h"
#include "cli/interrupt.h"
#include "cli/models.h"
#include "cli/tensors.h"
#include "cli/terminal.h"
#include "heed/base/file.h"
#include "heed/model/calibration.h"

namespace heed::cli {
namespace {

struct Options {
  ModelOptions model;
  std::string out;
  bool causal = false, json = false;
};

// From tensors of a file instead of a model's: what is learned stands under the names that `heed attend` reads.
void calibrate_tensors(const Options& options, const MechanismCall& call) {
  if (!options.model.file.empty()) fail_usage("calibrate: --file, expected only with a model");
  TensorOptions tensors;
  tensors.in = options.model.path, tensors.causal = options.causal;
  const OpenedTensors opened = tensors.open();
  const NamedTensors learned = calibrate(call, opened.input);
  std::vector<std::pair<std::string, TensorView>> views;
  std::string shapes;
  for (const auto& [name, tensor] : learned) {
    views.emplace_back(name, tensor.view());
    shapes += fmt::format("{}{} {}", shapes.empty() ? "" : ", ", name, to_string(tensor.shape()));
  }
  model::write_safetensors(options.out, views, {{"mechanism", call.name}, {"params", ""}});
  print(fmt::format("{}: {} learned {}\n", options.out, call.name, shapes));
}

Index bytes_of(const model::Calibration& c) {
  Index sum = 0;
  for (const auto& [layer, named] : c.layers)
    for (const auto& [name, tensor] : named) sum += tensor.bytes();
  return sum;
}

Json report(const model::Calibration& c, Index tokens) {
  Json params = Json::object(), layers = Json::array();
  for (const auto& [name, value] : c.params) params[name] = value;
  for (const auto& [layer, named] : c.layers) {
    Json tensors = Json::object();
    for (const auto& [name, tensor] : named) tensors[name] = tensor.shape();
    layers.push_back({{"layer", layer}, {"tensors", tensors}});
  }
  return {{"mechanism", c.mechanism}, {"model", c.model}, {"tokens", tokens}, {"params", params}, {"layers", layers}};
}

void calibrate_model(const Options& options) {
  const MechanismCall call = options.model.mechanism.calls({"dense"}).front();
  check_calibrates(find_mechanism(call.name));
  if (options.model.path.ends_with(".safetensors")) return calibrate_tensors(options, call);
  if (options.model.file.empty()) fail_usage("calibrate: --file is missing, expected a text for the model to read");
  if (options.causal) fail_usage("calibrate: --causal, expected only with tensors");
  const OpenedModel opened(options.model);
  const model::MechanismUse use = options.model.uses({call}, opened.info()).front();
  const std::vector<model::Token> tokens = opened.read(read_file(options.model.file));
  const Index count = static_cast<Index>(tokens.size()), d = opened.info().width;
  const auto loaded = opened.load(count, 4 * count * d * static_cast<Index>(sizeof(float)));

  const HoldInterrupts hold;
  ProgressLine progress;
  const model::Calibration c = model::calibrate(*loaded, use, tokens, options.model.chunk,
                                                dtype_named(options.model.kv), [&](Index done, Index total) {
                                                  progress.show(fmt::format("{}: reading", call.text()), done, total);
                                                  return interrupted() == 0;
                                                });
  progress.clear();
  stop_if_interrupted();
  model::write_calibration(options.out, c);
  if (options.json) {
    print(json_text(report(c, count)));
    return;
  }
  std::string params;
  for (const auto& [name, value] : c.params) params += fmt::format(" {}={}", name, value);
  print(fmt::format("{}: {} learned from {} tokens: {} layers, {}{}{}\n", options.out, c.mechanism, count_text(count),
                    c.layers.size(), bytes_text(bytes_of(c)), params.empty() ? "" : ", parameters", params));
}

}  // namespace

void add_calibrate(CLI::App& app, Job& job) {
  CLI::App* command =
      app.add_subcommand("calibrate", "Let a mechanism learn from a model's attention over a text, or from tensors");
  const auto options = std::make_shared<Options>();
  options->model.add(*command, false, "The mechanism that learns: NAME or NAME:parameter=value,…");
  command->get_option("--mechanism")->required();
  command->remove_option(command->get_option("--calibration"));
  command->add_option("-o,--out", options->out, "The safetensors file to write; --calibration F uses it")
      ->required()
      ->type_name("F");
  command->add_flag("--causal", options->causal, "With tensors: key j is hidden from earlier queries");
  command->add_flag("--json", options->json, "Print what was learned as one object");
  command->callback([&job, options] { job = [options] { calibrate_model(*options); }; });
  command->footer(
      "Examples:\n"
      "  heed calibrate model.gguf --mechanism proxy-attn --file book.txt --tokens 2000 -o proxy.safetensors\n"
      "  heed run model.gguf --file book.txt --mechanism proxy-attn --calibration proxy.safetensors\n\n"
      "MODEL may be a safetensors file with q, k and v instead:\n"
      "  heed calibrate video.safetensors --mechanism paro:grid=13x30x45 -o paro.safetensors\n"
      "  heed attend video.safetensors out.safetensors --mechanism paro:grid=13x30x45 --calibration paro.safetensors");
}

}  // namespace heed::cli
