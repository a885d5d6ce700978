#include "heed/plan/axis_window.h"

#include <algorithm>
#include <bit>
#include <vector>

namespace heed {

Span AxisWindow::keys(Index i, Index members) const {
  if (causal) {
    const Index leader = std::min(i / stride * stride + stride - 1, members - 1);
    return {std::max<Index>(0, leader - kernel + 1), i + 1};
  }
  const Index left = kernel / 2, right = kernel / 2 + kernel % 2 - 1;
  const Index leader = std::min(i / stride * stride + stride / 2, members - 1);
  const Index centre = std::clamp(leader, left, members - 1 - right);
  return {centre - left, centre + right + 1};
}

Span AxisWindow::queries(Index j, Index members) const {
  if (causal) {
    const Index last_group = (j + kernel) / stride + (j + kernel >= members ? 1 : 0);
    return {j, std::min(members, stride * last_group)};
  }
  const Index left = kernel / 2, right = kernel / 2 + kernel % 2 - 1;
  // A group's leader stands stride / 2 after its first query, so stride - stride / 2 - 1 before its last.
  const Index after = stride - stride / 2 - 1;
  const Index begin = j < kernel ? 0 : (j - right + after) / stride * stride;
  return {begin, j >= members - kernel ? members : std::min(members, (j + left + after + 1) / stride * stride)};
}

Span AxisWindow::keys(const AxisBox& box) const {
  const Index n = members(box.group);
  return {keys(box.begin, n).begin, keys(box.end - 1, n).end};
}

namespace {

// One axis cut into query tiles, each with the number of key tiles that it visits.
struct AxisVisits {
  Index visits = 0, row_visits = 0;  // row_visits: each visit times the queries of the tile
  bool perfectly_sparse = true;
};

AxisVisits visits_along(const AxisWindow& w, Index query, Index key, Tiling tiling) {
  AxisVisits sum;
  for (Index group = 0; group < std::min(w.dilation, w.length); ++group) {
    const Index n = w.members(group);
    for (Index begin = 0; begin < n; begin += query) {
      const AxisBox box{group, begin, std::min(begin + query, n)};
      const Span seen = w.keys(box);
      const Index visits =
          tiling == Tiling::fixed ? ceil_div(seen.end, key) - seen.begin / key : ceil_div(seen.size(), key);
      sum.visits += visits;
      sum.row_visits += visits * box.size();
      const bool one_window = w.keys(begin, n) == seen && w.keys(box.end - 1, n) == seen;
      const bool whole = tiling == Tiling::fixed ? seen.begin % key == 0 && (seen.end % key == 0 || seen.end == n)
                                                 : seen.size() % key == 0 || seen.end == n;
      sum.perfectly_sparse = sum.perfectly_sparse && one_window && whole;
    }
  }
  return sum;
}

// Powers of two, one per axis, whose product is the largest <= `tokens` that the groups can fill.
std::vector<Extents> shapes_of(const GridWindow& window, Index tokens) {
  Extents most;
  for (size_t a = 0; a < 3; ++a)
    most[a] = static_cast<Index>(std::bit_ceil(static_cast<std::uint64_t>(window[a].members(0))));
  const Index target = std::min(tokens, volume(most));
  std::vector<Extents> shapes;
  for (Index x = 1; x <= std::min(most[0], target); x *= 2)
    for (Index y = 1; y <= std::min(most[1], target / x); y *= 2)
      if (const Index z = target / x / y; z <= most[2]) shapes.push_back({x, y, z});
  return shapes;
}

}  // namespace

TileVisits count_tile_visits(const GridWindow& window, const TileShape& tile, Tiling tiling) {
  TileVisits total;
  for (size_t a = 0; a < 3; ++a) {
    const AxisWindow& w = window[a];
    const AxisVisits axis = visits_along(w, tile.query[a], tile.key[a], tiling);
    total.visited *= axis.visits;
    total.dense *= ceil_div(w.length, tile.query[a]) * ceil_div(w.length, tile.key[a]);
    total.flop_bound *= static_cast<double>(w.length) / static_cast<double>(w.kernel);
    total.perfectly_sparse = total.perfectly_sparse && axis.perfectly_sparse;
  }
  return total;
}

Index count_line_tile_visits(const GridWindow& window, Index query, Index key) {
  const Index tokens = window[0].length * window[1].length * window[2].length;
  std::vector<Index> last_visitor(static_cast<size_t>(ceil_div(tokens, key)), -1);
  Index visits = 0;
  const auto seen = [&](size_t a, Index x) {
    return window[a].keys(x / window[a].dilation, window[a].members(x % window[a].dilation));
  };
  const auto coordinate = [&](size_t a, Index x, Index member) {
    return x % window[a].dilation + window[a].dilation * member;
  };
  for (Index t = 0; t < tokens; ++t) {
    const Index z = t % window[2].length, y = t / window[2].length % window[1].length,
                x = t / window[2].length / window[1].length;
    const Span sx = seen(0, x), sy = seen(1, y), sz = seen(2, z);
    for (Index i = sx.begin; i < sx.end; ++i)
      for (Index j = sy.begin; j < sy.end; ++j)
        for (Index k = sz.begin; k < sz.end; ++k) {
          const Index token =
              (coordinate(0, x, i) * window[1].length + coordinate(1, y, j)) * window[2].length + coordinate(2, z, k);
          Index& last = last_visitor[static_cast<size_t>(token / key)];
          if (last == t / query) continue;
          last = t / query;
          ++visits;
        }
  }
  return visits;
}

TileShape choose_tile_shape(const GridWindow& window) {
  // Steps of a visit in pairs: packed keys are read once for all rows, a row's state once for all keys.
  constexpr double rows_of_a_key = 8, keys_of_a_row = 32;
  constexpr Index tokens[] = {64, 128, 256};
  constexpr size_t sizes = 9;  // 1, 2, 4 … 256
  std::array<std::array<std::array<AxisVisits, sizes>, sizes>, 3> known{};
  const auto along = [&](size_t a, Index q, Index k) -> const AxisVisits& {
    AxisVisits& axis = known[a][static_cast<size_t>(std::countr_zero(static_cast<std::uint64_t>(q)))]
                            [static_cast<size_t>(std::countr_zero(static_cast<std::uint64_t>(k)))];
    if (axis.visits == 0) axis = visits_along(window[a], q, k, Tiling::fixed);
    return axis;
  };
  std::vector<Extents> queries, keys;
  for (const Index n : tokens)
    for (const Extents& shape : shapes_of(window, n)) queries.push_back(shape), keys.push_back(shape);
  TileShape best;
  double least = -1;
  for (const Extents& k : keys)
    for (const Extents& q : queries) {
      double visits = 1, row_visits = 1;
      for (size_t a = 0; a < 3; ++a) {
        const AxisVisits& axis = along(a, q[a], k[a]);
        visits *= static_cast<double>(axis.visits), row_visits *= static_cast<double>(axis.row_visits);
      }
      const double columns = static_cast<double>(volume(k));
      const double cost = (row_visits + rows_of_a_key * visits) * columns + keys_of_a_row * row_visits;
      if (least >= 0 && cost >= least) continue;
      least = cost;
      best = {q, k};
    }
  return best;
}

}  // namespace heed
