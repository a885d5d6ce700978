// Windows on grids as tiles of a plan: rows and columns are taken box by box, so that what a window
// holds lies close together.
#pragma once

#include <memory>
#include <span>
#include <vector>

#include "heed/plan/axis_window.h"
#include "heed/plan/permute.h"

namespace heed {

/// The rows of every lane in the order `tokens`, with row blocks between `cuts`.
void order_rows(Plan& plan, const std::vector<std::int32_t>& tokens, const std::vector<Index>& cuts);

/// Queries that see a window of the grid around them. A row block is a box of queries; its tiles are
/// the boxes of keys that one of them sees, full where all see all, with bits elsewhere.
class SlidingTiles {
 public:
  explicit SlidingTiles(const GridWindow& window);

  /// Orders the plan's rows, and adds the keys in box order as a source.
  void prepare(Plan& plan, const KeyValues& kv);
  void emit(const RowBlock& rows, Tiles& tiles) const;
  /// What emit gives, counted beforehand: the tiles of one head.
  TileVisits visits() const { return count_tile_visits(window_, shape_); }

 private:
  struct Along;  // what one axis of a row block sees
  Along look_along(size_t axis, const AxisBox& queries, Scratch& scratch) const;

  GridWindow window_;
  TileShape shape_;
  Boxes queries_, keys_;
  Index source_ = 0, columns_ = 0;
  Index words_ = 1;                                   // 64-bit words with a bit per slot of a key box
  std::array<std::vector<std::uint64_t>, 3> before_;  // [axis][x, words]: the slots whose member is below x
};

/// Boxes as columns, one after the other, so that each touches as few panels as it can: one that would reach
/// over the end of a panel starts a new one, and so does the one after a box of more than a panel.
struct BoxColumns {
  std::vector<std::int32_t> tokens;  // -1 where a panel is left unfilled
  std::vector<Index> begins;         // the first column of each box
};
BoxColumns lay_out(const Boxes& boxes);

/// Tokens that see their own box of the grid and nothing else. Small boxes share a row block and a panel
/// of columns, so that tiles stay large.
class OwnBoxTiles {
 public:
  explicit OwnBoxTiles(const Boxes& boxes);

  /// Orders the plan's rows, and adds the keys in box order as a source.
  void prepare(Plan& plan, const KeyValues& kv);
  void emit(const RowBlock& rows, Tiles& tiles) const;

 private:
  std::vector<std::int32_t> tokens_;  // row order
  std::vector<Index> row_begins_;     // per box, and the end
  BoxColumns columns_;
  std::vector<Index> cuts_;
  Index source_ = 0;
};

}  // namespace heed
