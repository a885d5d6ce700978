// heed calibrate: a mechanism learns from a model's own attention over a text.

#include <fmt/format.h>

#include <memory>

#include "cli/become.h"
#include "cli/calibration.h"
#include "cli/commands.h"
#include "cli/interrupt.h"
#include "cli/tensors.h"
#include "cli/terminal.h"
#include "heed/base/file.h"

namespace heed::cli {
namespace {

// From tensors of a file instead of a model's: what is learned stands under the names that `heed attend` reads.
void calibrate_tensors(const CalibrateOptions& options, const MechanismCall& call) {
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

void calibrate_model(const CalibrateOptions& options, const MechanismCall& call) {
  const OpenedModel opened(options.model);
  const model::MechanismUse use = options.model.uses({call}, opened.info()).front();
  const std::vector<model::Token> tokens = opened.read(read_file(options.model.file), options.skip);
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
  if (options.json) print(json_text(calibration_json(c, count)));
  else
    print(fmt::format("{}: {} learned from {} tokens: {}\n", options.out, c.mechanism, count_text(count),
                      calibration_text(c)));
}

}  // namespace

void add_calibrate(CLI::App& app, Job& job, char** argv) {
  const auto options = std::make_shared<CalibrateOptions>();
  options->add(app)->callback([&job, options, argv] {
    job = [options, argv] {
      const MechanismCall call = options->call();
      if (options->from_tensors()) calibrate_tensors(*options, call);
      else if (options->fits()) become_torch(fmt::format("calibrate --mechanism {}", call.name), argv);
      else calibrate_model(*options, call);
    };
  });
}

}  // namespace heed::cli
