// Which blocks of keys some queries' softmax weights fall on: flash attention without values.
#pragma once

#include <vector>

#include "heed/kernel/kernels.h"
#include "heed/plan/plan.h"

namespace heed {

/// Keys of one head: those of an input, or panels of f32 keys made for the purpose.
struct ScoreKeys {
  PackedKeys packed;
  Index columns = 0;  // keys

  static ScoreKeys of(const KeyValues& kv, Index head);
  static ScoreKeys of(const float* panels, Index d, Index columns) {
    return {{{DType::f32, d, 0, d, 0}, panels}, columns};
  }
};

/// Softmax weights of queries over the keys that each sees, p_ij = softmax_j(scale · <q_i, k_j>), seen block by block
/// of keys: block b holds keys [b·block, (b+1)·block), of which the last may be short.
struct BlockScores {
  ScoreKeys keys;
  float scale = 1;  // natural units, as in Rule
  Index block = 64;
  Index mass_stride = 0;  // row i's mass is added to mass + i·mass_stride: 0 adds up all rows

  Index blocks(Index columns) const { return ceil_div(columns, block); }

  /// For rows q [rows, d] (f32; must be exact in bf16 where the keys are bf16), row i seeing keys 0 … ends[i]-1
  /// (null: all keys), and every block b that a row sees:
  ///   largest[b] = max(largest[b], max over rows i and keys j of b of p_ij),  mass[b] += sum over both of p_ij,
  /// or, with a mass_stride, over j alone into a row of masses for each i.
  /// Either may be null. Both are folded into what the caller put there (zeros, to begin with), and hold blocks(largest
  /// end) rounded up to 16 floats; what stands beyond the last block is left as it is up to adding zero.
  /// A row that sees nothing adds nothing. Scores and weights are f32 in every arithmetic; a call takes twice
  /// rows · keys · d flops, one exponential a pair, and min(rows, 48) · blocks · 8 bytes of scratch (12 rows where
  /// blocks are many), never rows · keys. block = 1 gives single keys. Results do not depend on how rows are grouped
  /// into calls, except for the order in which `mass` is added up: that of the rows.
  void weigh(const float* q, Index rows, const std::int32_t* ends, float* largest, float* mass, Scratch& scratch) const;

  /// The same for rows 0, stride, 2·stride, … of a row block of one query head; causal rows see keys up to their
  /// own position.
  void weigh(const Queries& queries, const RowBlock& rows, Index stride, bool causal, float* largest, float* mass,
             Scratch& scratch) const;
};

/// What a gate that predicts blocks is to learn of one row block and query head: targets[b], the largest weight that
/// any of its rows gives to a key of block b, divided by the sum of these over all blocks (SeerAttention's ground
/// truth). Blocks 0 … scores.blocks(last position + 1) - 1, with room for that rounded up to 16; causal.
void block_targets(const BlockScores& scores, const Queries& queries, const RowBlock& rows, float* targets,
                   Scratch& scratch);

/// The mean of the keys of `heads` heads from `first` on, as f32 key panels (see ScoreKeys). f32 sums in head order.
std::vector<float> mean_head_panels(const KeyValues& kv, Index first, Index heads);

}  // namespace heed
