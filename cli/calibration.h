// What `heed calibrate` of both programs shares: its options, and what it says at the end.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "cli/command_line.h"
#include "cli/models.h"
#include "heed/model/calibration.h"

namespace heed::cli {

struct CalibrateOptions {
  ModelOptions model;
  std::string out;
  bool causal = false, json = false;
  Index skip = 0;
  // Of mechanisms that are fitted alone.
  std::optional<Index> pieces, steps;
  std::optional<double> lr, density;

  /// Adds `calibrate` to a program; whoever calls gives it a callback.
  CLI::App* add(CLI::App& app);
  bool from_tensors() const { return model.path.ends_with(".safetensors"); }
  /// The one mechanism. Throws UsageError for one that learns nothing, and for options that do not go with it.
  MechanismCall call() const;
  /// Whether gradients of a model are needed: what libtorch is for.
  bool fits() const;
};

/// What was learned as one object.
Json calibration_json(const model::Calibration& c, Index tokens);
/// "30 layers, 12.7 MiB, parameters block=64", or "one for all layers, …".
std::string calibration_text(const model::Calibration& c);

}  // namespace heed::cli
