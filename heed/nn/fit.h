// What fitting a mechanism to a model has in common: how long, how fast, and what came of it.
#pragma once

#include <functional>
#include <initializer_list>
#include <string>
#include <vector>

#include "heed/model/calibration.h"

namespace heed::nn {

/// Steps of AdamW whose rate rises over `warmup` steps to `lr` and then falls along half a cosine to 0.
struct FitOptions {
  Index steps = 300, warmup = 20;
  double lr = 1e-3;
  Index batch = 4;  // pieces of text a step
  std::uint64_t seed = 1;
};

/// What a model is fitted on: pieces of text, all of one length, each beginning with the BOS where the model has one.
using Pieces = std::vector<std::vector<model::Token>>;

/// Called with what is being done; returning false stops, and model::Interrupted is thrown.
using FitProgress = std::function<bool(const std::string& step, Index done, Index total)>;

/// What was learned, and how much it helped.
struct Fitted {
  model::Calibration calibration;
  struct Layer {
    Index layer = 0;
    double before = 0, after = 0;  // of `measure`
  };
  std::string measure;  // what the numbers are, with their unit
  std::vector<Layer> layers;
};

/// Throws Interrupted when `progress` says stop.
inline void say(const FitProgress& progress, const std::string& step, Index done, Index total) {
  if (progress && !progress(step, done, total)) throw model::Interrupted{};
}

/// Reads every piece with dense attention and hands over what the mechanism of `use` saw of each layer, `seen(piece,
/// layer, tensors)`. What is returned has everything but layers.
model::Calibration read_pieces(const model::Model& model, const model::MechanismUse& use, const Pieces& pieces,
                               Index chunk, DType kv, const FitProgress& progress,
                               const std::function<void(Index, Index, NamedTensors)>& seen);

/// Adds those of `names` that the call left open to the calibration's parameters, as `params` has them: what was fitted
/// with them holds for no others.
void keep_params(model::Calibration& calibration, const Params& params, std::initializer_list<const char*> names);

}  // namespace heed::nn
