// A learned gate that predicts, from pooled queries and keys, which blocks of the attention map matter.
#pragma once

#include <optional>
#include <vector>

#include "heed/mechanism/mechanism.h"

namespace heed::mechanism {

/// wk, wq, gate_q and gate_k. None is required, so that their owner can do without a gate.
std::vector<ExtraSpec> gate_extras();

/// What a gate sees of one call, pooled block by block: queries and keys before RoPE where gate_q and gate_k give
/// these, else those that attend. Both the gate and what it learns from read them here.
class GateView {
 public:
  /// Packs gate_k, if there is one. `in` must outlive this.
  GateView(const Inputs& in, Index block);
  /// [max; min; mean] of the keys of blocks first … first + count - 1 of one of the B·Hk heads, over the tokens that
  /// each block has: out [count, 3D].
  void keys(Index head, Index first, Index count, float* out) const;
  const Queries& queries() const { return q_; }

 private:
  const KeyValues* kv_;
  std::optional<KeyValues> own_;
  Queries q_;
  Index tokens_, block_;
};

/// The mean of a row block's queries: out [D].
void mean_query(const Queries& q, Index d, const RowBlock& rows, float* out, Scratch& scratch);

/// SeerAttention's gate of one call. Two forms: W_k alone, per query head, where mean queries are taken as they are
/// (G = D); or W_q per query head and W_k per KV head.
class BlockGate {
 public:
  /// `rope_base` 0: no positions inside the gate. Pools and projects the keys. Throws Error for a missing wk and for
  /// shapes that do not fit each other, UsageError for positions in an odd width.
  BlockGate(const Inputs& in, Index block, double rope_base);
  /// The checks alone: nothing else may be called.
  static void check(const Inputs& in, double rope_base);

  /// Logits of blocks 0 … a for a row block that is query block a of its head; room for a + 1 rounded up to 64.
  void score(const RowBlock& rows, float* logits, Scratch& scratch) const;

 private:
  void project_keys(const GateView& view, const TensorView& wk, Index unit);
  Index key_heads() const { return wq_.empty() ? problem_.Hq : problem_.Hk; }  // of wk

  Problem problem_;
  Queries q_;
  Index block_, width_;                       // width: G
  double rope_base_;
  std::vector<std::vector<float>> wq_;         // [Hq]: [D, G] as panels, or none
  std::vector<std::vector<float>> gate_keys_;  // [B · heads of wk]: [blocks, G] as key panels
};

}  // namespace heed::mechanism
