// Checkpoints of gated models keep the rows of the query projection and of its gate in one matrix; taken apart here.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

#include "heed/base/types.h"

namespace heed::nn {

/// Whose query rows stand together, with their gate rows after them.
enum class GateLayout : std::uint8_t {
  per_head,    // one head's: Qwen3-Next and Qwen3.5
  kv_grouped,  // those of the heads that share a KV head: the code of "Gated Attention", arXiv:2505.06708
};

/// The parameters `q` and `gate` of an Attention with gated-attention.
struct GatedProjection {
  at::Tensor q, gate;  // [heads·D, width]; [heads·D, width], or headwise [heads, width]
};

/// weight [rows, width]: 2·heads·D rows hold a gate for every feature, heads·(D + 1) one for every head. Both layouts
/// have as many rows, and with as many KV heads as heads they are one; else nothing but `layout` tells them apart.
/// Throws Error for another number of rows, UsageError for kv_heads that do not divide heads.
GatedProjection split_gated(const at::Tensor& weight, GateLayout layout, Index heads, Index kv_heads, Index head_size);

}  // namespace heed::nn
