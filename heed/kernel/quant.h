// The weight formats of GGUF files: block sizes, and widening of whole blocks to f32.
#pragma once

#include <string>
#include <string_view>

#include "heed/base/types.h"

namespace heed {

/// GGUF's tensor types that heed reads. The numbers are those of the file format.
enum class WeightFormat : std::uint32_t {
  f32 = 0,
  f16 = 1,
  q4_0 = 2,
  q4_1 = 3,
  q5_0 = 6,
  q5_1 = 7,
  q8_0 = 8,
  q4_k = 12,
  q5_k = 13,
  q6_k = 14,
  bf16 = 30,
};

/// "F32", "Q4_K", … as the format's own tools print them.
std::string_view name_of(WeightFormat format);

/// "F32, F16, …": every supported format, for messages.
std::string supported_weight_formats();

/// True and the format, when heed reads GGUF type number `type`.
bool weight_format(std::uint32_t type, WeightFormat& format);

/// Elements per block (1 for plain floats, 32 or 256) and bytes per block.
struct BlockLayout {
  Index elements, bytes;
};
BlockLayout block_layout(WeightFormat format);

/// Widens `count` elements to f32; `blocks` may stand at any address. The values are those of the
/// format's definition rounded once. Throws Error when count is not a multiple of the block's elements.
void dequantize(WeightFormat format, const void* blocks, Index count, float* out);

}  // namespace heed
