#include "heed/plan/panel_tiles.h"

#include <algorithm>
#include <bit>

namespace heed {
namespace {

// What the rows from row_begin on see of one panel.
struct Part {
  Index panel, row_begin, row_end;
  std::uint64_t word;
};

std::uint64_t low_bits(Index n) { return n >= 64 ? ~std::uint64_t{0} : (std::uint64_t{1} << n) - 1; }

// The tile of parts that lie in one panel, ascending by row.
void add_panel(std::span<const Part> parts, Index source, Tiles& tiles) {
  Index rows = 0;
  std::uint64_t any = 0;
  for (size_t i = 0; i < parts.size(); ++i) {
    if (i == 0 || parts[i].row_begin != parts[i - 1].row_begin) rows += parts[i].row_end - parts[i].row_begin;
    any |= parts[i].word;
  }
  const auto words = tiles.take<std::uint64_t>(rows);
  const auto list = tiles.take<std::int32_t>(rows);
  Index at = 0;
  for (size_t i = 0, next; i < parts.size(); i = next) {
    std::uint64_t word = 0;
    for (next = i; next < parts.size() && parts[next].row_begin == parts[i].row_begin; ++next) word |= parts[next].word;
    for (Index row = parts[i].row_begin; row < parts[i].row_end; ++row, ++at) {
      list[static_cast<size_t>(at)] = static_cast<std::int32_t>(row);
      words[static_cast<size_t>(at)] = word;
    }
  }
  const Index first = parts[0].row_begin, begin = parts[0].panel * panel_columns;
  const bool run = list.back() - list.front() + 1 == rows;
  tiles.add(run ? Set::range(first, first + rows) : Set::list(list),
            Set::range(begin, begin + static_cast<Index>(std::bit_width(any))), Mask::bits(words.data(), 1), source);
}

}  // namespace

void add_by_panel(std::span<const Stretch> stretches, Index source, Tiles& tiles) {
  Index count = 0;
  for (const Stretch& s : stretches)
    if (s.end - s.begin < panel_columns) count += (s.end - 1) / panel_columns - s.begin / panel_columns + 1;
  const auto parts = tiles.take<Part>(count);
  size_t n = 0;
  for (const Stretch& s : stretches) {
    if (s.end - s.begin >= panel_columns) {
      tiles.add(Set::range(s.row_begin, s.row_end), Set::range(s.begin, s.end), Mask::full(), source);
      continue;
    }
    for (Index begin = s.begin, end; begin < s.end; begin = end) {
      end = std::min(s.end, round_up(begin + 1, panel_columns));
      const std::uint64_t word = low_bits(end - begin) << (begin % panel_columns);
      parts[n++] = {begin / panel_columns, s.row_begin, s.row_end, word};
    }
  }
  std::sort(parts.begin(), parts.end(), [](const Part& a, const Part& b) {
    return a.panel != b.panel ? a.panel < b.panel : a.row_begin < b.row_begin;
  });
  for (size_t i = 0, next; i < parts.size(); i = next) {
    for (next = i; next < parts.size() && parts[next].panel == parts[i].panel;) ++next;
    add_panel(parts.subspan(i, next - i), source, tiles);
  }
}

}  // namespace heed
