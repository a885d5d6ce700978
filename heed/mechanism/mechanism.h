// What every mechanism says of itself, and how it makes its plan.
#pragma once

#include <any>
#include <functional>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "heed/base/tensor.h"
#include "heed/exec/attend.h"
#include "heed/exec/backward.h"
#include "heed/mechanism/params.h"
#include "heed/plan/plan.h"

namespace heed {

/// Whether the caller may say `causal`.
enum class Causality : std::uint8_t { either, implied, refused };
/// Whether a model must be trained with it.
enum class Training : std::uint8_t { none, continued, required };

/// An extra tensor that a mechanism reads. Axes are names of sizes (B Hq Hk N M D Dv), numbers,
/// alternatives "B|1", or "*" for any.
struct ExtraSpec {
  std::string name;
  std::vector<DType> dtypes;  // accepted; {f32, f16, bf16} for real-valued ones
  std::vector<std::string> axes;
  bool required = false;
  std::string help;
  bool differentiable = false;  // attend_backward gives its gradient
};

/// What a plan is made from: checked sizes, queries, packed keys and values, extra tensors.
struct Inputs {
  Problem problem;
  Rule rule;  // scale set
  bool scale_given = false;  // by the caller; else it is D^-1/2
  Queries q;
  const KeyValues* kv = nullptr;  // heads = B · Hk
  /// Tokens of the whole prompt of which these queries are a part (a chunk of it, or a step after it). M when the
  /// call stands alone.
  Index prompt = 0;
  /// What the mechanism chose to remember of this layer of this sequence: empty at first and after tokens were
  /// taken back, nullptr when the call stands alone.
  std::any* memory = nullptr;
  std::map<std::string, TensorView, std::less<>> extra;
  /// nullptr when the caller did not give it.
  const TensorView* find(std::string_view name) const {
    const auto it = extra.find(name);
    return it == extra.end() ? nullptr : &it->second;
  }
};

/// Tensors of one layer, by name.
using NamedTensors = std::map<std::string, Tensor, std::less<>>;
/// Parameters as the command line spells them.
using ParamTexts = std::vector<std::pair<std::string, std::string>>;

struct AttendOutput {
  Tensor o;    // [B, Hq, N, Dv] f32
  Tensor lse;  // [B, Hq, N] f32; empty for mechanisms that have none
  NamedTensors extra;
  AttendStats stats;
  double density = 0;  // pairs attended / pairs of dense attention with the same causality
};

/// Gradients of what a call read, f32.
struct AttendGradients {
  Tensor dq, dk, dv;   // [B, Hq, N, D], [B, Hk, M, D], [B, Hk, M, Dv]
  NamedTensors extra;  // of the differentiable extra tensors that were given, by their names
  AttendStats stats;   // of the backward pass
};

/// A plan that was carried out and differentiated, for Mechanism::finish_gradient.
struct Differentiated {
  const Plan& plan;
  const TensorView& o;       // [B, Hq, R, Dv] f32, as the plan gave it
  const TensorView& dout;    // [B, Hq, N, Dv] of the finished o; f32, f16 or bf16
  PlanGradients& gradients;  // of the plan; its dq is in AttendGradients already
};

struct Mechanism {
  std::string name, title, paper;  // paper: "arXiv:2502.13189"
  int year = 0;
  std::string stage;               // "summarize, select, attend"
  Training training = Training::none;
  std::string idea;                // a few lines
  std::string equations;           // plain text
  std::string cost;                // one line
  Causality causality = Causality::either;
  bool square = false;             // M = N required
  /// A square one may have a rule of its own for a step of decoding, one query after all keys (N = 1 < M): whether it
  /// has with these parameters. Null or false: such steps are dense attention's.
  bool (*decodes)(const Params& params) = nullptr;
  std::vector<ParamSpec> params;
  std::vector<ExtraSpec> extras;
  /// Why it cannot replace attention in a causal language model, or empty.
  std::string not_on_models;
  Plan (*plan)(const Params& params, const Inputs& in) = nullptr;
  /// Whether no single softmax stands behind a row, so that lse is empty. Null: one always does.
  bool (*without_lse)(const Params& params) = nullptr;
  // Backward, the gradient is that of its plan, what was selected taken as constant, and from there on what unfinish()
  // and finish_gradient() say.
  /// Whether, with these inputs, finish() changes o or lse: what attend() gave is then not what the plan gave, and the
  /// backward pass attends again. Null: never.
  bool (*finishes)(const Params& params, const Inputs& in) = nullptr;
  /// The gradient of the plan's o [B, Hq, R, Dv] from that of the finished one, dout [B, Hq, N, Dv]. Null: the same.
  Tensor (*unfinish)(const Params& params, const Inputs& in, const Plan& plan, const TensorView& dout) = nullptr;
  /// Takes the plan's gradients home to what it was made of: queries, keys and values that are not the input's as they
  /// stand, extra tensors, what finish() mixed in. `out` holds dq, dk and dv of the plan's queries, of source 0 and of
  /// all sources with Members, for it to change. Null: nothing is left to do.
  void (*finish_gradient)(const Params& params, const Inputs& in, const Differentiated& done,
                          AttendGradients& out) = nullptr;
  /// What is left to do after the plan was carried out (a mean over clusters, a transposition, an
  /// extra output), or null. `out` holds o [B, Hq, R, Dv] and lse [B, Hq, R] of the plan's own problem.
  void (*finish)(const Params& params, const Inputs& in, const Plan& plan, AttendOutput& out) = nullptr;
  /// What it learns from one layer's queries, keys and values over a calibration text (M = N): tensors to be given
  /// back as extra tensors, and others for the record. null: there is nothing to learn.
  NamedTensors (*calibrate)(const Params& params, const Inputs& in) = nullptr;
  /// Whether what it learns from a model is fitted by gradients, which heed/nn does.
  bool fitted = false;
  /// Parameters that the tensors of all layers decide together, or null.
  ParamTexts (*settle)(const Params& params, const std::vector<NamedTensors>& layers) = nullptr;
};

/// Every mechanism, in the order of the documentation.
const std::vector<const Mechanism*>& mechanisms();

/// Throws UsageError for an unknown name, with the nearest known ones.
const Mechanism& find_mechanism(std::string_view name);

}  // namespace heed
