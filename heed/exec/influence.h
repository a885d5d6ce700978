// What a loss would suffer if a query did not see a key, block by block: from one backward pass, without any N×N.
#pragma once

#include "heed/base/tensor.h"

namespace heed {

/// What dense causal attention read and gave, and the loss's gradient: q [B, Hq, N, D], k [B, Hk, N, D],
/// v [B, Hk, N, Dv], o and dout [B, Hq, N, Dv], lse [B, Hq, N] (natural log). f32, f16 or bf16, any strides.
struct InfluenceInput {
  TensorView q, k, v, o, dout, lse;
  float scale = 1;
};

/// [B, Hq, n, n] f32, n = ceil(N / block): the sums over blocks of |E_ij|, 0 above the diagonal. E_ij is how the loss
/// changes, to first order in the row's output, when row i is hidden key j and its other weights grow to one again:
///   E_ij = A_ij / (1 - A_ij + ε) · (Σ_l G_il A_il - G_ij),  G_ij = <dout_i, v_j>,  A = exp(scale·q·k - lse);
///   E_00 = -G_00 A_00, as that row has one key.
/// The sum over l is <dout_i, o_i>. ε = 1e-6. Source: MoA (arXiv:2406.14909), section 4.1. N²/2·(D + Dv) multiply-adds
/// and N²/2 exponentials a head; O(N·(D + Dv)) memory beside the map. The same bits for any number of threads. Throws
/// Error for shapes that do not fit each other.
Tensor influence_map(const InfluenceInput& in, Index block);

}  // namespace heed
