// Builds one instruction set's table. A translation unit defines HEED_ISA (the namespace's and the
// table's name) and includes this file; its compiler flags decide what vec.h and product.h become.
// Nothing here uses the standard library's templates: an inline function compiled for a wide
// instruction set must not become the copy that the linker keeps for everyone.

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "heed/kernel/group_scales.h"
#include "heed/kernel/kernels.h"

#define HEED_TEXT_OF(name) #name
#define HEED_NAME_OF(name) HEED_TEXT_OF(name)

namespace heed::HEED_ISA {

#include "heed/kernel/isa/vec.h"
#include "heed/kernel/isa/words.h"
#include "heed/kernel/isa/product.h"
#include "heed/kernel/isa/widen.h"

#include "heed/kernel/isa/attend.h"
#if defined(HEED_TILES)
#include "heed/kernel/isa/attend_tiles.h"
#endif
#include "heed/kernel/isa/backward.h"
#include "heed/kernel/isa/blocks.h"
#include "heed/kernel/isa/gemm.h"
#include "heed/kernel/isa/row_product.h"
#include "heed/kernel/isa/select.h"
#include "heed/kernel/isa/peak.h"

#if defined(HEED_TILES) || defined(__AVX512BF16__)
inline constexpr bool has_bf16_product = true;
#define bf16_kernel(f) f
#define wide_bf16_kernel(f) nullptr
#else
inline constexpr bool has_bf16_product = false;
#define bf16_kernel(f) nullptr
#define wide_bf16_kernel(f) f
#endif

extern const Kernels table;
const Kernels table = {
    .name = HEED_NAME_OF(HEED_ISA),
    .bf16_dot = has_bf16_product,
#if defined(HEED_TILES)
    .key_step = 32,
    .row_step = tiled_rows,
    .task_rows = 4 * tiled_rows,  // tiles work ahead from group to group
#else
    .key_step = 2,
    .row_step = tile_rows,
    .task_rows = 48,
#endif
    .attend_f32 = attend_rows<float>,
#if defined(HEED_TILES)
    .attend_bf16 = attend_tiled,
#else
    .attend_bf16 = bf16_kernel(attend_rows<bf16>),
#endif
    .attend_wide_bf16 = wide_bf16_kernel((attend_rows<float, bf16>)),
    .attend_wide_i8 = attend_rows<float, std::int8_t>,
    .attend_backward = attend_backward,
    .gemm_f32 = gemm<float>,
    .gemm_bf16 = bf16_kernel(gemm<bf16>),
    .gemm_wide_bf16 = wide_bf16_kernel((gemm<float, bf16>)),
    .gemm_wide_i8 = gemm<float, std::int8_t>,
    .pack_keys_f32 = pack_keys_f32,
    .pack_keys_bf16 = pack_keys_bf16,
    .fold_blocks = fold_blocks,
    .weigh_blocks = weigh_blocks,
    .widen_pairs = widen_pairs,
    .widen_bytes = widen_bytes,
    .round_bf16 = round_bf16,
    .row_product = row_product,
    .round_row = round_row,
    .rms_norm = rms_norm,
    .silu_mul = silu_mul,
    .gelu_mul = gelu_mul,
    .log_sum_exp = log_sum_exp,
    .dot = dot,
    .choose_top = choose_top,
    .peak_f32 = peak_f32,
    .peak_bf16 = bf16_kernel(peak_bf16),
    .peak_int8 = peak_int8,
    .read_all = read_all,
};

}  // namespace heed::HEED_ISA
