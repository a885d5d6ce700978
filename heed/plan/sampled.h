// A few queries of a row block score single keys for all of it.
#pragma once

#include <span>

#include "heed/plan/plan.h"

namespace heed {

/// Key blocks of `size` tokens from `begin` on, of which every `stride`-th key is looked at; the last
/// block ends at `end`.
struct KeyBlocks {
  Index begin = 0, end = 0, size = 1, stride = 1;
};

/// The sampled queries of a row block, packed so that one product scores a key against all of them.
class SampledQueries {
 public:
  /// Rows stride - 1, 2·stride - 1, … and the last. Memory is the scratch's.
  SampledQueries(const Queries& queries, const RowBlock& rows, Index stride, const PanelLayout& layout,
                 Scratch& scratch);

  /// scores[i] = the largest <q, k> over sampled queries q and keys k of block blocks[i] that stand at
  /// least `distance` positions before q; -inf where there is no such pair. Not scaled.
  void score(const KeyRows& keys, Index head, const KeyBlocks& geometry, std::span<const std::int32_t> blocks,
             Index distance, float* scores) const;

 private:
  PanelLayout layout_;
  Scratch& scratch_;
  Index padded_ = 0;                     // columns: queries rounded up to 16, the last one repeated
  const void* panels_ = nullptr;         // queries packed like keys
  std::span<std::int32_t> positions_;    // of the sampled queries, ascending
};

}  // namespace heed
