// AdamW and Muon, with a state that can be written down.
#pragma once

#include <string>
#include <vector>

#include "heed/nn/language_model.h"

namespace heed::nn {

struct OptimizerOptions {
  bool muon = false;  // for matrices inside layers; embedding, output and vectors stay with AdamW
  double beta1 = 0.9, beta2 = 0.95, eps = 1e-8;  // AdamW
  double momentum = 0.95;                        // Muon
  double weight_decay = 0.1;                     // of matrices
};

/// Five Newton–Schulz steps (a, b, c = 3.4445, -4.7750, 2.0315) towards the nearest matrix with orthonormal rows or
/// columns: singular values in [0.01, 1]·‖u‖ go to [0.68, 1.14], singular vectors stay. u [m, n] f32. Zero stays zero.
at::Tensor orthogonalise(const at::Tensor& u);

/// Steps of one rate, for parameters that share their memory with a model. Parameters without a gradient stay.
class Optimizer {
 public:
  Optimizer(const NamedParameters& parameters, const OptimizerOptions& options);

  /// Length of all gradients as one vector; scales them so that it is at most `most` (0: as they are).
  double clip(double most);
  /// AdamW (Loshchilov and Hutter): m ← β₁m + (1-β₁)g, v ← β₂v + (1-β₂)g², w ← (1-ηλ)w - η·m̂/(√v̂ + ε).
  /// Muon: m ← βm + g, w ← (1-ηλ)w - η·0.2·sqrt(max(rows, columns))·orthogonalise(g + βm), which moves weights about
  /// as far as AdamW does with the same rate.
  /// Gradients are forgotten after.
  void step(double rate);

  Index steps() const { return steps_; }
  /// Momenta by name: "m.blk.0.attn.q", "v.…". They share memory with the optimizer.
  NamedParameters state() const;
  void set_steps(Index steps) { steps_ = steps; }

 private:
  struct Slot {
    std::string name;
    at::Tensor w, m, v;  // v: AdamW alone
  };
  void adamw(Slot& slot, const at::Tensor& g, double rate) const;
  void muon(Slot& slot, const at::Tensor& g, double rate) const;
  void decay(Slot& slot, double rate) const;

  OptimizerOptions options_;
  std::vector<Slot> slots_;
  Index steps_ = 0;
};

/// Share of the full rate at step 0 … steps - 1: rises over `warmup` steps, then falls to `last` along half a cosine.
double rate_share(Index step, Index steps, Index warmup, double last);

}  // namespace heed::nn
