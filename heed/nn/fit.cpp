#include "heed/nn/fit.h"

namespace heed::nn {

model::Calibration read_pieces(const model::Model& model, const model::MechanismUse& use, const Pieces& pieces,
                               Index chunk, DType kv, const FitProgress& progress,
                               const std::function<void(Index, Index, NamedTensors)>& seen) {
  const auto count = static_cast<Index>(pieces.size());
  model::Calibration last;
  for (Index i = 0; i < count; ++i) {
    last = model::calibrate(model, use, pieces[static_cast<size_t>(i)], chunk, kv, [&](Index done, Index total) {
      say(progress, "reading", i * total + done, count * total);
      return true;
    });
    for (auto& [layer, tensors] : last.layers) seen(i, layer, std::move(tensors));
    last.layers.clear();
  }
  return last;
}

void keep_params(model::Calibration& calibration, const Params& params, std::initializer_list<const char*> names) {
  for (const char* name : names)
    if (!params.given(name)) calibration.params.emplace_back(name, params.text(name));
}

}  // namespace heed::nn
