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
  const double huge = std::numeric_limits<double>::max();
  command.add_option("--scale", scale, "Factor of the scores [D^-1/2]")
      ->check(real_number(-huge, huge))
      ->type_name("X");
  command.add_option("--dtype", dtype, "Arithmetic: f32, or bf16 (f32 tensors are rounded first)")
      ->check(one_of({"f32", "bf16"}))
      ->type_name("T")
      ->capture_default_str();
}

AttendInput TensorOptions::input(const model::SafetensorsFile& file) const {
  AttendInput in_;
  in_.q = file.tensor("q"), in_.k = file.tensor("k"), in_.v = file.tensor("v");
  for (const std::string& name : file.names())
    if (name != "q" && name != "k" && name != "v") in_.extra.emplace(name, file.tensor(name));
  in_.causal = causal;
  if (!scale.empty()) in_.scale = std::stof(scale);
  in_.arithmetic = dtype_named(dtype);
  return in_;
}

}  // namespace heed::cli
