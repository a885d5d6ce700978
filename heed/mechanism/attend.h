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

/// Gradients of sum(o∘dout) for o = attend(call, in).o, what the mechanism selects taken as constant; dout is shaped as
/// o, f32, f16 or bf16, any strides. `forward`, unless null, becomes what attend() returns. Throws as attend() does,
/// Error also for a dout of another shape or with NaN or infinity.
AttendGradients attend_backward(const MechanismCall& call, const AttendInput& in, const TensorView& dout,
                                AttendOutput* forward = nullptr);
/// The same from what attend() gave, without attending again: o [B, Hq, N, Dv] and lse [B, Hq, N], f32, any strides.
AttendGradients attend_backward(const MechanismCall& call, const AttendInput& in, const TensorView& dout,
                                const TensorView& o, const TensorView& lse);

/// A call whose input was checked, with its keys and values packed: what plans are made from.
struct CheckedCall {
  const Mechanism& mechanism;
  Params params;
  std::shared_ptr<KeyValues> kv;
  Inputs inputs;
  Plan plan() const;
};
/// Throws as attend() does.
CheckedCall check(const MechanismCall& call, const AttendInput& in);

/// The plan alone, with what it points to kept alive by Plan::keep: for pictures and analysis.
Plan plan_of(const MechanismCall& call, const AttendInput& in);

/// What a mechanism learns from these tensors: Mechanism::calibrate with its input checked. Throws UsageError for a
/// mechanism that learns nothing this way, else as attend().
NamedTensors calibrate(const MechanismCall& call, const AttendInput& in);
/// UsageError for a mechanism without Mechanism::calibrate: one that learns nothing from a text, or only by gradients.
void check_calibrates(const Mechanism& m);

/// Throws Error for an extra tensor that the mechanism does not read, of another type or shape than it says, or
/// that holds NaN or infinity, and for a required one that is missing.
void check_extras(const Mechanism& m, const std::map<std::string, TensorView, std::less<>>& extra, const Problem& p);

/// The rule that a mechanism is causal by: `causal` checked against what it allows.
bool resolve_causality(const Mechanism& m, bool asked);

}  // namespace heed
