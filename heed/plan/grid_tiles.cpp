#include "heed/plan/grid_tiles.h"

#include <algorithm>

namespace heed {
namespace {

Extents lengths(const GridWindow& w) { return {w[0].length, w[1].length, w[2].length}; }
Extents dilations(const GridWindow& w) { return {w[0].dilation, w[1].dilation, w[2].dilation}; }

std::uint64_t low_bits(Index n) { return n >= 64 ? ~std::uint64_t{0} : (std::uint64_t{1} << n) - 1; }

}  // namespace

void order_rows(Plan& plan, const std::vector<std::int32_t>& tokens, const std::vector<Index>& cuts) {
  const Index heads = plan.lanes == Lanes::per_query_head ? plan.problem.Hq : plan.problem.Hk;
  bool as_is = true;
  for (size_t i = 0; i < tokens.size(); ++i) as_is = as_is && tokens[i] == static_cast<std::int32_t>(i);
  plan.cuts = cuts;
  plan.row_tokens.clear();
  if (!as_is) plan.row_tokens.assign(static_cast<size_t>(plan.problem.B * heads), tokens);
}

SlidingTiles::SlidingTiles(const GridWindow& window)
    : window_(window), shape_(choose_tile_shape(window)), queries_(lengths(window), dilations(window), shape_.query),
      keys_(lengths(window), dilations(window), shape_.key) {
  const Extents& size = shape_.key;
  const Extents step{size[1] * size[2], size[2], 1};
  words_ = ceil_div(volume(size), 64);
  for (size_t a = 0; a < 3; ++a) {
    before_[a].assign(static_cast<size_t>((size[a] + 1) * words_), 0);
    for (Index x = 0; x <= size[a]; ++x)
      for (Index slot = 0; slot < volume(size); ++slot)
        if (slot / step[a] % size[a] < x)
          before_[a][static_cast<size_t>(x * words_ + slot / 64)] |= std::uint64_t{1} << (slot % 64);
  }
}

void SlidingTiles::prepare(Plan& plan, const KeyValues& kv) {
  order_rows(plan, queries_.tokens(), queries_.begins());
  source_ = add_permuted(plan, kv, keys_.slots());
  columns_ = plan.sources[static_cast<size_t>(source_)].views[0].columns;
}

struct SlidingTiles::Along {
  Index first = 0, boxes = 0;  // places of the key boxes that are seen
  Index queries = 0;
  std::uint64_t* slots = nullptr;  // [queries, boxes, words]: which slots of a box lie in the query's window
  std::span<bool> whole;           // [boxes]: all of them, for every query
};

SlidingTiles::Along SlidingTiles::look_along(size_t axis, const AxisBox& queries, Scratch& scratch) const {
  const AxisWindow& window = window_[axis];
  const Index size = shape_.key[axis], members = window.members(queries.group);
  const Span seen = window.keys(queries);
  const Index first = seen.begin / size;  // in the group
  Along along;
  along.first = keys_.group_begin(axis, queries.group) + first;
  along.boxes = ceil_div(seen.end, size) - first;
  along.queries = queries.size();
  along.slots = scratch.take<std::uint64_t>(along.queries * along.boxes * words_).data();
  along.whole = scratch.take<bool>(along.boxes);
  std::fill(along.whole.begin(), along.whole.end(), true);
  std::uint64_t* slots = along.slots;
  for (Index i = 0; i < along.queries; ++i) {
    const Span keys = window.keys(queries.begin + i, members);
    for (Index b = 0; b < along.boxes; ++b) {
      const Index start = (first + b) * size;
      const Index from = std::clamp<Index>(keys.begin - start, 0, size),
                  to = std::clamp<Index>(keys.end - start, 0, size);
      const auto below = [&](Index x) { return before_[axis].data() + x * words_; };
      for (Index w = 0; w < words_; ++w) *slots++ = below(to)[w] & ~below(from)[w];
      bool& whole = along.whole[static_cast<size_t>(b)];
      whole = whole && from == 0 && to == size;
    }
  }
  return along;
}

void SlidingTiles::emit(const RowBlock& rows, Tiles& tiles) const {
  const Extents place = queries_.place(queries_.box_at(rows.first));
  const auto look = [&](size_t a) {
    return look_along(a, queries_.axis(a)[static_cast<size_t>(place[a])], tiles.scratch());
  };
  const Along x = look(0), y = look(1), z = look(2);
  const Set all = Set::range(0, rows.rows);
  const Index slots = volume(shape_.key);
  for (Index bx = 0; bx < x.boxes; ++bx)
    for (Index by = 0; by < y.boxes; ++by)
      for (Index bz = 0; bz < z.boxes; ++bz) {
        const Index begin = keys_.box({x.first + bx, y.first + by, z.first + bz}) * slots;
        const Set columns = Set::range(begin, std::min(begin + slots, columns_));
        if (x.whole[static_cast<size_t>(bx)] && y.whole[static_cast<size_t>(by)] && z.whole[static_cast<size_t>(bz)]) {
          tiles.add(all, columns, Mask::full(), source_);
          continue;
        }
        // A key is seen when it is in the window on every axis.
        std::uint64_t* const words = tiles.take<std::uint64_t>(rows.rows * words_).data();
        std::uint64_t* word = words;
        for (Index i = 0; i < x.queries; ++i)
          for (Index j = 0; j < y.queries; ++j)
            for (Index k = 0; k < z.queries; ++k)
              for (Index w = 0; w < words_; ++w)
                *word++ = x.slots[(i * x.boxes + bx) * words_ + w] & y.slots[(j * y.boxes + by) * words_ + w] &
                          z.slots[(k * z.boxes + bz) * words_ + w];
        tiles.add(all, columns, Mask::bits(words, words_), source_);
      }
}

BoxColumns lay_out(const Boxes& boxes) {
  BoxColumns out;
  const std::vector<std::int32_t> tokens = boxes.tokens();
  const auto fill_panel = [&] {
    out.tokens.resize(static_cast<size_t>(round_up(static_cast<Index>(out.tokens.size()), panel_columns)), -1);
  };
  for (Index b = 0; b < boxes.count(); ++b) {
    const Index begin = boxes.begins()[static_cast<size_t>(b)], end = boxes.begins()[static_cast<size_t>(b) + 1];
    const Index used = static_cast<Index>(out.tokens.size()) % panel_columns;
    if (used + end - begin > panel_columns) fill_panel();
    out.begins.push_back(static_cast<Index>(out.tokens.size()));
    out.tokens.insert(out.tokens.end(), tokens.begin() + begin, tokens.begin() + end);
    if (end - begin > panel_columns) fill_panel();
  }
  return out;
}

OwnBoxTiles::OwnBoxTiles(const Boxes& boxes)
    : tokens_(boxes.tokens()), row_begins_(boxes.begins()), columns_(lay_out(boxes)) {
  for (size_t b = 0; b < columns_.begins.size(); ++b)  // boxes that share a panel share a row block
    if (columns_.begins[b] % panel_columns == 0) cuts_.push_back(row_begins_[b]);
  cuts_.push_back(static_cast<Index>(tokens_.size()));
}

void OwnBoxTiles::prepare(Plan& plan, const KeyValues& kv) {
  order_rows(plan, tokens_, cuts_);
  source_ = add_permuted(plan, kv, columns_.tokens);
}

void OwnBoxTiles::emit(const RowBlock& rows, Tiles& tiles) const {
  const auto box_at = [&](Index row) {
    return static_cast<size_t>(std::upper_bound(row_begins_.begin(), row_begins_.end(), row) - row_begins_.begin() - 1);
  };
  const size_t first = box_at(rows.first), last = box_at(rows.first + rows.rows - 1);
  const auto size = [&](size_t b) { return row_begins_[b + 1] - row_begins_[b]; };
  const Index begin = columns_.begins[first], end = columns_.begins[last] + size(last);
  const Set all = Set::range(0, rows.rows), columns = Set::range(begin, end);
  if (first == last) {
    tiles.add(all, columns, Mask::full(), source_);
    return;
  }
  std::uint64_t* words = tiles.take<std::uint64_t>(rows.rows).data();  // several boxes lie in one panel
  for (size_t b = first; b <= last; ++b) {
    const std::uint64_t own = low_bits(size(b)) << (columns_.begins[b] - begin);
    std::fill_n(words + row_begins_[b] - rows.first, size(b), own);
  }
  tiles.add(all, columns, Mask::bits(words, 1), source_);
}

}  // namespace heed
