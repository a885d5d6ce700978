#include "heed/nn/gate_layout.h"

#include "heed/base/error.h"
#include "heed/base/tensor.h"

namespace heed::nn {

GatedProjection split_gated(const at::Tensor& weight, GateLayout layout, Index heads, Index kv_heads, Index head_size) {
  if (kv_heads < 1 || heads < kv_heads || heads % kv_heads != 0)
    fail_usage("gate: kv_heads = {}, expected a divisor of heads = {}", kv_heads, heads);
  const Index d = head_size, each = weight.dim() == 2 ? weight.size(0) / heads - d : 0;  // gate rows of a head
  if (weight.dim() != 2 || weight.size(0) % heads != 0 || (each != d && each != 1))
    fail("gate: shape = {}, expected [{}, width], or [{}, width] with a gate for every head",
         to_string({weight.sizes().begin(), weight.sizes().end()}), 2 * heads * d, heads * (d + 1));
  const Index together = layout == GateLayout::per_head ? 1 : heads / kv_heads, width = weight.size(1);
  const at::Tensor runs = weight.view({heads / together, together * (d + each), width});
  return {runs.narrow(1, 0, together * d).reshape({heads * d, width}),
          runs.narrow(1, together * d, together * each).reshape({heads * each, width})};
}

}  // namespace heed::nn
