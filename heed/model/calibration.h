// What a mechanism learned of a model from a text: parameters, and tensors by layer, kept in a safetensors file.
#pragma once

#include "heed/model/model.h"

namespace heed::model {

/// Tensor NAME of layer L is called layers.L.NAME in the file, one that all layers share all.NAME; mechanism, model and
/// parameters stand in its metadata.
struct Calibration {
  std::string mechanism, model;  // model: its architecture and name
  ParamTexts params;  // given to the mechanism where the user says nothing else
  std::map<Index, NamedTensors> layers;
  NamedTensors all;  // given to every layer that has no tensor of that name itself

  /// `call` with the parameters it leaves open. Throws UsageError when this was made for another mechanism.
  MechanismCall complete(const MechanismCall& call) const;
};

/// Throws Error for a file that is no calibration.
Calibration read_calibration(const std::string& path);
/// The file appears only when it is complete.
void write_calibration(const std::string& path, const Calibration& calibration);

/// Reads `tokens` with dense attention and lets the mechanism learn from every layer that `use` replaces. Throws
/// UsageError for a mechanism that learns nothing from a text.
Calibration calibrate(const Model& model, const MechanismUse& use, const std::vector<Token>& tokens, Index chunk,
                      DType kv, const Progress& progress = {});

}  // namespace heed::model
