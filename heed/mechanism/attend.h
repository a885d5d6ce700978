// Attention by name on tensors: the library's front door.
#pragma once

#include <map>
#include <optional>
#include <string>

#include "heed/mechanism/mechanism.h"

namespace heed {

struct AttendInput {
  TensorView q, k, v;  // [B, Hq, N, D], [B, Hk, M, D], [B, Hk, M, Dv]; f32, f16 or bf16, any strides
  std::map<std::string, TensorView, std::less<>> extra;
  bool causal = false;
  std::optional<float> scale;    // default D^-1/2
  DType arithmetic = DType::f32;  // f32 or bf16; with bf16, f32 inputs are rounded first
};

/// o = the mechanism's attention of q over k, v. Throws UsageError for an unknown mechanism or
/// parameter value, Error for shapes, dtypes, missing or unknown extra tensors, NaN or infinity.
AttendOutput attend(const MechanismCall& call, const AttendInput& in);
/// As above with the call as text: attend("moba:block=64,top_k=8", in).
AttendOutput attend(std::string_view call, const AttendInput& in);

/// The plan alone, with what it points to kept alive by Plan::keep: for pictures and analysis.
Plan plan_of(const MechanismCall& call, const AttendInput& in);

/// The rule that a mechanism is causal by: `causal` checked against what it allows.
bool resolve_causality(const Mechanism& m, bool asked);

}  // namespace heed
