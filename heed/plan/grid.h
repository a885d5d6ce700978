// Tokens on a grid of one to three axes, in row-major order, listed box by box.
#pragma once

#include <array>
#include <vector>

#include "heed/base/types.h"

namespace heed {

/// One value per axis. A grid of fewer than three axes has leading ones of length 1.
using Extents = std::array<Index, 3>;

inline Index volume(const Extents& e) { return e[0] * e[1] * e[2]; }

/// Every token of the grid once, in the order that has axis axes[0] as its slowest and axes[2] as its fastest:
/// {0, 1, 2} is the tokens as they stand.
std::vector<std::int32_t> tokens_by_axes(const Extents& length, const std::array<size_t, 3>& axes);

/// Every token of a grid once, in Morton (Z) order: 2^m tokens of each axis that start at multiples of 2^m stand
/// side by side, so that a run of tokens is a compact patch. Lengths need not be powers of two.
std::vector<std::int32_t> morton_order(const Extents& length);

/// Members [begin, end) of a group of an axis: with dilation d, token x is member x / d of group x % d.
struct AxisBox {
  Index group = 0, begin = 0, end = 0;
  Index size() const { return end - begin; }
};

/// A grid cut into boxes. A box lies in one group on every axis; the last box of a group may be cut
/// short. Boxes stand in row-major order of their places, tokens in row-major order of their box.
class Boxes {
 public:
  Boxes(const Extents& length, const Extents& dilation, const Extents& size);

  Index count() const { return static_cast<Index>(begins_.size()) - 1; }
  /// The boxes of one axis, group by group.
  const std::vector<AxisBox>& axis(size_t a) const { return axes_[a]; }
  /// Where the boxes of a group begin in axis(a).
  Index group_begin(size_t a, Index group) const { return group_begins_[a][static_cast<size_t>(group)]; }
  const Extents& size() const { return size_; }

  Index box(const Extents& place) const { return (place[0] * places(1) + place[1]) * places(2) + place[2]; }
  Extents place(Index box) const {
    return {box / (places(1) * places(2)), box / places(2) % places(1), box % places(2)};
  }

  /// Every token once, box by box; box b is tokens()[begins()[b] … begins()[b + 1]).
  std::vector<std::int32_t> tokens() const;
  const std::vector<Index>& begins() const { return begins_; }
  /// The box that begins at rank `first` of tokens().
  Index box_at(Index first) const;

  /// Every box as volume(size()) slots, row-major whatever was cut off; -1 stands for no token.
  std::vector<std::int32_t> slots() const;

 private:
  Index places(size_t a) const { return static_cast<Index>(axes_[a].size()); }
  std::int32_t token(const Extents& at, Index t0, Index t1, Index t2) const;

  Extents length_, dilation_, size_;
  std::array<std::vector<AxisBox>, 3> axes_;
  std::array<std::vector<Index>, 3> group_begins_;
  std::vector<Index> begins_;
};

}  // namespace heed
