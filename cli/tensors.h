// The input of commands that work on tensors: q, k, v and what else a mechanism reads.
#pragma once

#include <CLI/CLI.hpp>

#include <optional>
#include <string>

#include "cli/options.h"
#include "heed/mechanism/attend.h"
#include "heed/model/safetensors.h"

namespace heed::cli {

struct TensorOptions {
  std::string in, dtype = "f32", scale;
  bool causal = false;
  MechanismOptions mechanism;

  void add(CLI::App& command);
  MechanismCall call() const { return mechanism.calls({}).front(); }
  /// Views into the file: q, k, v, and every other tensor as an extra one. Throws Error for a missing one.
  AttendInput input(const model::SafetensorsFile& file) const;
};

}  // namespace heed::cli
