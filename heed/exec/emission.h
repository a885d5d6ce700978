// Tiles of row blocks that are carried out in splits: emitted once, read by every split.
#pragma once

#include <mutex>
#include <vector>

#include "heed/plan/plan.h"

namespace heed {

/// A block's tiles, with the lists and bits that they point to in memory of their own.
class KeptTiles {
 public:
  /// Emits the block's tiles at the first call, from whichever thread it comes; others wait for that and find them.
  const std::vector<Tile>& emit(const Plan& plan, const RowBlock& block, Scratch& scratch);

 private:
  void keep(const std::vector<Tile>& tiles);

  std::once_flag once_;
  std::vector<Tile> tiles_;
  std::vector<std::int32_t> pages_;
  std::vector<std::uint64_t> words_;
};

/// The block's tiles in scratch; valid until this thread asks for others.
const std::vector<Tile>& emit_tiles(const Plan& plan, const RowBlock& block, Scratch& scratch);

}  // namespace heed
