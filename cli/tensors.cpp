#include "cli/tensors.h"

#include <limits>

namespace heed::cli {

void TensorOptions::add(CLI::App& command) {
  command
      .add_option("IN", in,
                  "A safetensors file with q [B,Hq,N,D], k [B,Hk,M,D], v [B,Hk,M,Dv] (f32, f16 or bf16) and the "
                  "mechanism's extra tensors")
      ->required();
  mechanism.add(command, false, "The mechanism: NAME or NAME:parameter=value,…");
  command.get_option("--mechanism")->required();
  command.add_flag("--causal", causal,
                   "Key j is hidden from earlier queries; the queries are the last N of M positions");
  command
      .add_option("--calibration", calibration,
                  "More of the mechanism's extra tensors: what it learned from tensors (heed calibrate wrote it)")
      ->type_name("F");
  const double huge = std::numeric_limits<double>::max();
  command.add_option("--scale", scale, "Factor of the scores [D^-1/2]")
      ->check(real_number(-huge, huge))
      ->type_name("X");
  command.add_option("--dtype", dtype, "Arithmetic: f32, or bf16 (f32 tensors are rounded first)")
      ->check(one_of({"f32", "bf16"}))
      ->type_name("T")
      ->capture_default_str();
}

OpenedTensors TensorOptions::open() const {
  OpenedTensors opened{.file = model::SafetensorsFile::open(in), .learned = {}, .input = {}};
  AttendInput& input = opened.input;
  input.q = opened.file.tensor("q"), input.k = opened.file.tensor("k"), input.v = opened.file.tensor("v");
  for (const std::string& name : opened.file.names())
    if (name != "q" && name != "k" && name != "v") input.extra.emplace(name, opened.file.tensor(name));
  if (!calibration.empty()) {
    opened.learned = model::SafetensorsFile::open(calibration);
    for (const std::string& name : opened.learned->names()) input.extra[name] = opened.learned->tensor(name);
  }
  input.causal = causal;
  if (!scale.empty()) input.scale = std::stof(scale);
  input.arithmetic = dtype_named(dtype);
  return opened;
}

}  // namespace heed::cli
