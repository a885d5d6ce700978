// heed calibrate of mechanisms that are fitted by gradients.

#include <ATen/Parallel.h>
#include <fmt/format.h>

#include <memory>

#include "cli/calibration.h"
#include "cli/interrupt.h"
#include "cli/terminal.h"
#include "cli/torch/commands.h"
#include "heed/base/file.h"
#include "heed/base/threads.h"
#include "heed/nn/fit_boundaries.h"
#include "heed/nn/fit_gate.h"
#include "heed/nn/fit_spans.h"

namespace heed::cli {
namespace {

constexpr Index usual_pieces = 8;
constexpr double usual_density = 0.5;

std::string share_text(double x) { return fmt::format("{:.4g}", x); }

void report(const CalibrateOptions& options, const nn::Fitted& fitted, const nn::Pieces& pieces) {
  const Index tokens = static_cast<Index>(pieces.size() * pieces.front().size());
  double before = 0, after = 0;
  for (const nn::Fitted::Layer& l : fitted.layers) before += l.before, after += l.after;
  const auto count = static_cast<double>(fitted.layers.size());
  if (options.json) {
    Json json = calibration_json(fitted.calibration, tokens);
    json["measure"] = fitted.measure;
    for (size_t i = 0; i < fitted.layers.size(); ++i) {  // what all layers share has no layers of its own
      Json& layer = json["layers"][i];
      layer["layer"] = fitted.layers[i].layer;
      layer["before"] = fitted.layers[i].before, layer["after"] = fitted.layers[i].after;
    }
    print(json_text(json));
    return;
  }
  print(fmt::format("{}: {} fitted to {} pieces of {} tokens: {}\n{}: {} before, {} after (mean of layers)\n",
                    options.out, fitted.calibration.mechanism, pieces.size(),
                    count_text(tokens / static_cast<Index>(pieces.size())), calibration_text(fitted.calibration),
                    fitted.measure, share_text(before / count), share_text(after / count)));
}

void calibrate(const CalibrateOptions& options) {
  at::set_num_threads(threads());
  const MechanismCall call = options.call();
  if (!options.fits()) fail_usage("calibrate: {}, expected a mechanism that is fitted to a model", call.name);
  const OpenedModel opened(options.model);
  const model::MechanismUse use = options.model.uses({call}, opened.info()).front();
  const bool spans = call.name == "moa", boundaries = call.name == "dhsa";
  // Gradients keep every layer's activations; boundaries the keys of all pieces and layers.
  const Index usual = std::min<Index>(spans || boundaries ? 2048 : 4096, opened.context());
  const Index length = options.model.tokens > 0 ? options.model.tokens : usual;
  const nn::Pieces pieces =
      opened.pieces(read_file(options.model.file), options.skip, options.pieces.value_or(usual_pieces), length);
  nn::FitOptions how = boundaries ? nn::boundary_fit_options() : nn::FitOptions{};
  how.steps = options.steps.value_or(how.steps), how.lr = options.lr.value_or(how.lr);

  const HoldInterrupts hold;
  ProgressLine line;
  const nn::FitProgress progress = [&](const std::string& step, Index done, Index total) {
    line.show(fmt::format("{}: {}", call.name, step), done, total);
    return interrupted() == 0;
  };
  const auto fit = [&]() -> nn::Fitted {
    if (spans) return nn::fit_spans(opened.file(), use, pieces, options.density.value_or(usual_density), progress);
    const auto loaded = opened.load(length, 4 * length * opened.info().width * static_cast<Index>(sizeof(float)));
    const auto learn = boundaries ? nn::fit_boundaries : nn::fit_gates;
    return learn(*loaded, use, pieces, options.model.chunk, dtype_named(options.model.kv), how, progress);
  };
  const nn::Fitted fitted = fit();
  line.clear();
  stop_if_interrupted();
  model::write_calibration(options.out, fitted.calibration);
  report(options, fitted, pieces);
}

}  // namespace

void add_calibrate(CLI::App& app, Job& job) {
  const auto options = std::make_shared<CalibrateOptions>();
  options->add(app)->callback([&job, options] { job = [options] { calibrate(*options); }; });
}

}  // namespace heed::cli
