#include "heed/plan/stretches.h"

#include <algorithm>
#include <tuple>

namespace heed {
namespace {

// Joins what touches inside a panel; returns how many stretches are left, at the front.
Index join(std::span<Stretch> all) {
  std::sort(all.begin(), all.end(), [](const Stretch& a, const Stretch& b) {
    return std::tie(a.row_begin, a.begin) < std::tie(b.row_begin, b.begin);
  });
  Index n = 0;
  for (const Stretch& s : all) {
    if (n > 0) {
      Stretch& last = all[static_cast<size_t>(n) - 1];
      if (last.row_begin == s.row_begin && last.end == s.begin &&
          last.begin / panel_columns == (s.end - 1) / panel_columns) {
        last.end = s.end;
        continue;
      }
    }
    all[static_cast<size_t>(n++)] = s;
  }
  return n;
}

}  // namespace

void add_stretches(std::span<const Stretch> stretches, Index source, Tiles& tiles) {
  auto all = tiles.take<Stretch>(static_cast<Index>(stretches.size()));
  std::copy(stretches.begin(), stretches.end(), all.begin());
  all = all.first(static_cast<size_t>(join(all)));
  std::sort(all.begin(), all.end(), [](const Stretch& a, const Stretch& b) {
    return std::tie(a.begin, a.end, a.row_begin) < std::tie(b.begin, b.end, b.row_begin);
  });
  for (size_t i = 0, next; i < all.size(); i = next) {
    Index rows = 0;
    for (next = i; next < all.size() && all[next].begin == all[i].begin && all[next].end == all[i].end; ++next)
      rows += all[next].row_end - all[next].row_begin;
    const Set columns = Set::range(all[i].begin, all[i].end);
    if (all[next - 1].row_end - all[i].row_begin == rows) {
      tiles.add(Set::range(all[i].row_begin, all[next - 1].row_end), columns, Mask::full(), source);
      continue;
    }
    const auto list = tiles.take<std::int32_t>(rows);
    auto at = list.begin();
    for (size_t s = i; s < next; ++s)
      for (Index row = all[s].row_begin; row < all[s].row_end; ++row) *at++ = static_cast<std::int32_t>(row);
    tiles.add(Set::list(list), columns, Mask::full(), source);
  }
}

}  // namespace heed
