// The input of commands that work on tensors: q, k, v and what else a mechanism reads.
#pragma once

#include <CLI/CLI.hpp>

#include <optional>
#include <string>

#include "cli/options.h"
#include "heed/mechanism/attend.h"
#include "heed/model/safetensors.h"

namespace heed::cli {

/// The files of a call, open, and views into them.
struct OpenedTensors {
  model::SafetensorsFile file;
  std::optional<model::SafetensorsFile> learned;
  AttendInput input;
};

struct TensorOptions {
  std::string in, calibration, dtype = "f32", scale;
  bool causal = false;
  MechanismOptions mechanism;

  void add(CLI::App& command);
  MechanismCall call() const { return mechanism.calls({}).front(); }
  /// q, k, v, and every other tensor as an extra one. Throws Error for a missing one.
  OpenedTensors open() const;
};

}  // namespace heed::cli
