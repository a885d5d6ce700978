#include "heed/plan/grid.h"

#include <algorithm>

namespace heed {
namespace {

// The tokens of a cube of 2^m a side that starts at `at`, without those beyond the grid.
void append_morton(const Extents& length, const Extents& at, Index side, std::vector<std::int32_t>& order) {
  if (at[0] >= length[0] || at[1] >= length[1] || at[2] >= length[2]) return;
  if (side == 1) {
    order.push_back(static_cast<std::int32_t>((at[0] * length[1] + at[1]) * length[2] + at[2]));
    return;
  }
  const Index half = side / 2;
  for (Index corner = 0; corner < 8; ++corner)
    append_morton(length, {at[0] + (corner >> 2) * half, at[1] + (corner >> 1 & 1) * half, at[2] + (corner & 1) * half},
                  half, order);
}

}  // namespace

std::vector<std::int32_t> morton_order(const Extents& length) {
  Index side = 1;
  while (side < std::max({length[0], length[1], length[2]})) side *= 2;
  std::vector<std::int32_t> order;
  order.reserve(static_cast<size_t>(volume(length)));
  append_morton(length, {0, 0, 0}, side, order);
  return order;
}

std::vector<std::int32_t> tokens_by_axes(const Extents& length, const std::array<size_t, 3>& axes) {
  const Extents step{length[1] * length[2], length[2], 1};
  std::vector<std::int32_t> tokens;
  tokens.reserve(static_cast<size_t>(volume(length)));
  for (Index x = 0; x < length[axes[0]]; ++x)
    for (Index y = 0; y < length[axes[1]]; ++y)
      for (Index z = 0; z < length[axes[2]]; ++z)
        tokens.push_back(static_cast<std::int32_t>(x * step[axes[0]] + y * step[axes[1]] + z * step[axes[2]]));
  return tokens;
}

Boxes::Boxes(const Extents& length, const Extents& dilation, const Extents& size)
    : length_(length), dilation_(dilation), size_(size) {
  for (size_t a = 0; a < 3; ++a)
    for (Index group = 0; group < std::min(dilation[a], length[a]); ++group) {
      group_begins_[a].push_back(places(a));
      const Index members = ceil_div(length[a] - group, dilation[a]);
      for (Index begin = 0; begin < members; begin += size[a])
        axes_[a].push_back({group, begin, std::min(begin + size[a], members)});
    }
  begins_.reserve(static_cast<size_t>(places(0) * places(1) * places(2) + 1));
  begins_.push_back(0);
  for (const AxisBox& x : axes_[0])
    for (const AxisBox& y : axes_[1])
      for (const AxisBox& z : axes_[2]) begins_.push_back(begins_.back() + x.size() * y.size() * z.size());
}

Index Boxes::box_at(Index first) const {
  return std::upper_bound(begins_.begin(), begins_.end(), first) - begins_.begin() - 1;
}

// The token of members t0, t1, t2 of the box at a place.
std::int32_t Boxes::token(const Extents& at, Index t0, Index t1, Index t2) const {
  const Extents member{t0, t1, t2};
  Index token = 0;
  for (size_t a = 0; a < 3; ++a) {
    const AxisBox& box = axes_[a][static_cast<size_t>(at[a])];
    token = token * length_[a] + box.group + dilation_[a] * (box.begin + member[a]);
  }
  return static_cast<std::int32_t>(token);
}

std::vector<std::int32_t> Boxes::tokens() const {
  std::vector<std::int32_t> order;
  order.reserve(static_cast<size_t>(begins_.back()));
  for (const std::int32_t token : slots())
    if (token >= 0) order.push_back(token);
  return order;
}

std::vector<std::int32_t> Boxes::slots() const {
  std::vector<std::int32_t> order;
  order.reserve(static_cast<size_t>(count() * volume(size_)));
  for (Index b = 0; b < count(); ++b) {
    const Extents at = place(b);
    const auto members = [&](size_t a) { return axes_[a][static_cast<size_t>(at[a])].size(); };
    for (Index t0 = 0; t0 < size_[0]; ++t0)
      for (Index t1 = 0; t1 < size_[1]; ++t1)
        for (Index t2 = 0; t2 < size_[2]; ++t2)
          order.push_back(t0 < members(0) && t1 < members(1) && t2 < members(2) ? token(at, t0, t1, t2) : -1);
  }
  return order;
}

}  // namespace heed
