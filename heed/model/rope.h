// Rotary position embedding from tables.
#pragma once

#include "heed/model/buffer.h"

namespace heed::model {

/// Which features turn together.
enum class RopePairs : std::uint8_t {
  adjacent,  // (2i, 2i+1): the rows of q and k in llama-type files are permuted for this
  halves,    // (i, i + D/2)
};

/// Position p turns pair i of a head by the angle p · base^(-2i/D); computed in f64, kept as f32.
class Rope {
 public:
  Rope() = default;
  Rope(Index head_size, double base, RopePairs pairs) : half_(head_size / 2), base_(base), pairs_(pairs) {}

  /// Makes the table hold positions [0, positions); it grows by doubling, at most to `limit`.
  void reach(Index positions, Index limit);
  /// Turns `heads` heads of one row in place. The position must be inside the table.
  void turn(float* row, Index heads, Index position) const;
  Index bytes() const { return table_.bytes(); }

 private:
  Index half_ = 0, positions_ = 0;
  double base_ = 1;
  RopePairs pairs_ = RopePairs::halves;
  Buffer<float> table_;  // per position: half_ cosines, half_ sines
};

}  // namespace heed::model
