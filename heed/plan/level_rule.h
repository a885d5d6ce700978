// Ranked blocks fall into levels: the best ones into the first, the next into the second, the last into none.
#pragma once

#include <vector>

#include "heed/base/scratch.h"

namespace heed {

/// Blocks ranked behind the previous level's belong to `level` until the cumulative share is reached.
struct LevelBound {
  Index level = 0;
  double share = 0;
};

/// What the shares are of: the number of blocks, or their cumulated importance, where a level ends with the first block
/// that goes beyond its share (it ends where it began if the best block alone exceeds the share).
enum class ShareOf : std::uint8_t { blocks, importance };

struct LevelRule {
  std::vector<LevelBound> bounds;  // shares do not fall
  ShareOf of = ShareOf::blocks;
  double least_first =
      0;  // of importance: the first level has more than this share of the blocks; of blocks: at least 1

  /// levels[b] of `n` blocks with importance score[b], or of its logarithm; 0 beyond the last bound. Equal scores: the
  /// lower block ranks first.
  void assign(const float* score, Index n, bool logarithms, std::int32_t* levels, Scratch& scratch) const;
};

}  // namespace heed
