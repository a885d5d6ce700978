// Gradients of attention straight from its definition, in f64, row by row, over pairs that the caller names.
// Nothing here uses heed's arithmetic.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "support/naive.h"

namespace heed::test {

/// What one query meets: the mean of some of its head's tokens, or a key and value of their own.
struct Met {
  std::vector<Index> tokens;
  Index other = -1;       // >= 0: column of `others`, and no tokens
  double log_weight = 0;
  Index weight_of = -1;   // element of dlog_weight, or -1
};
/// Calls visit(met) for all that query t of head h meets, each once; a query may come in several rows.
using MetBy = std::function<std::vector<Met>(Index b, Index h, Index t)>;

struct GradientOptions {
  double scale = 0, softcap = 0;                 // scale 0: D^-1/2
  std::vector<double> alibi, sinks;              // per query head
  const Sample* bias = nullptr;                  // [B|1, Hq|1, N, M]
  Index bias_batches = 1, bias_heads = 1;
  const Sample *other_k = nullptr, *other_v = nullptr;  // [B, Hk, E, D], [B, Hk, E, Dv]
  Index log_weights = 0;
};

/// Row-major, shaped as what they belong to.
struct Gradients {
  std::vector<double> o, dq, dk, dv, dbias, dsinks, dother_k, dother_v, dlog_weight;
  double loss = 0;  // sum of o times dout
};

/// Of sum(o·dout); dout [B, Hq, N, Dv].
Gradients naive_gradients(const Case& c, const MetBy& met, const Sample& dout, const GradientOptions& options = {});

/// All keys that `sees` lets through.
MetBy met_keys(const Case& c, const Sees& sees);
/// All that a plan's tiles name. Columns of sources without members are `others`.
MetBy met_by_plan(const Plan& plan);

/// "" when all are within tolerance · max|want|, else where they are not. Nothing may be NaN.
std::string gradient_difference(const char* name, const Tensor& got, const std::vector<double>& want, double tolerance);

/// 1e-4 in f32, 2e-2 in bf16.
inline double gradient_tolerance(DType arithmetic) { return arithmetic == DType::bf16 ? 2e-2 : 1e-4; }

/// What a loss might send back to an output of these sizes.
inline Sample random_dout(const Sizes& s, DType dtype = DType::f32, Layout layout = Layout::packed) {
  return Sample(dtype, s.B, s.Hq, s.N, s.Dv, layout, 77);
}

/// A plan forward and backward, folded.
PlanGradients backward(const Plan& plan, const TensorView& dout);
AttendGradients gradients(const std::string& call, const AttendInput& in, const Sample& dout);

/// Forward and backward in one call. Checks that o is what attend() gives, and that o and lse are enough for the same
/// dq, dk and dv.
struct ForwardBackward {
  AttendOutput out;
  AttendGradients gradients;
};
ForwardBackward forward_backward(const std::string& call, const AttendInput& in, const Sample& dout);

/// dq, dk and dv agree.
void check_gradients(const Case& c, const AttendGradients& got, const Gradients& want);
void check_gradients(const Case& c, const PlanGradients& got, const Gradients& want);

/// True when both hold the same bits; of gradients, when dq, dk and dv do.
bool same_bits(const Tensor& a, const Tensor& b);
bool same_bits(const AttendGradients& a, const AttendGradients& b);

}  // namespace heed::test

#define CHECK_GRADIENT(name, got, want, tolerance)                                            \
  do {                                                                                        \
    const std::string differs_ = heed::test::gradient_difference(name, got, want, tolerance); \
    CHECK_MESSAGE(differs_.empty(), differs_);                                                \
  } while (false)
