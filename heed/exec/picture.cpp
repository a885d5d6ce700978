#include "heed/exec/picture.h"

#include <algorithm>
#include <limits>
#include <numeric>

#include "heed/base/error.h"
#include "heed/exec/attend.h"

namespace heed {
namespace {

// Calls run(begin, end) for intervals of key positions that one row of a tile sees, together all of
// them. Ranges and pages of plain columns are cut by arithmetic; everything else is asked pair by pair.
template <class Run>
void visible_runs(const Plan& plan, const RowBlock& rows, const Tile& tile, Index row_rank, Run run) {
  const Problem& p = plan.problem;
  const Source& source = plan.sources[static_cast<size_t>(tile.source)];
  const SourceView& view =
      source
          .views[static_cast<size_t>(source.per_query_head ? rows.b * p.Hq + rows.head : rows.b * p.Hk + rows.kv_head)];
  const Set& columns = tile.columns;
  const bool plain =
      view.position == nullptr && view.visible == nullptr && tile.mask.kind != Mask::Kind::bits && !tile.gated;
  if (!plain) {
    for (Index c = 0; c < columns.count; ++c) {
      if (!sees(plan, rows, tile, row_rank, c)) continue;
      const Index position = view.position == nullptr ? columns[c] : view.position[columns[c]];
      run(position, position + 1);
    }
    return;
  }
  const Index position = rows.position(tile.rows[row_rank]);
  Index least = 0, end = p.M;
  if (tile.mask.kind == Mask::Kind::band) {
    least = std::max(least, position + tile.mask.lo);
    end = std::min(end, position + tile.mask.hi + 1);
  }
  if (!plan.visible_first.empty()) {
    const size_t at = static_cast<size_t>(rows.b * p.M + position);
    least = std::max<Index>(least, plan.visible_first[at]);
    end = std::min<Index>(end, plan.visible_end[at]);
  }
  const Index step = columns.contiguous() ? columns.count : columns.page;
  for (Index c = 0; c < columns.count; c += step) {
    const Index from = columns[c], to = from + std::min(step, columns.count - c);
    if (std::max(from, least) < std::min(to, end)) run(std::max(from, least), std::min(to, end));
  }
}

}  // namespace

PairGrid::PairGrid(Index first, Index rows, Index columns, Index max_pixels)
    : first_(first), rows_(rows), columns_(columns) {
  if (rows < 1 || columns < 1) fail("picture: {} queries and {} keys, expected at least one of each", rows, columns);
  if (max_pixels < 1) fail("picture: max_pixels = {}, expected >= 1", max_pixels);
  cell_ = ceil_div(std::max(rows, columns), max_pixels);
  width_ = ceil_div(columns, cell_), height_ = ceil_div(rows, cell_);
  for (Counts* c : {&attended_, &dense_}) {
    c->ends.assign(static_cast<size_t>(height_ * width_), 0);
    c->covered.assign(static_cast<size_t>(height_ * (width_ + 1)), 0);
  }
}

void PairGrid::add_interval(Counts& counts, Index row, Index begin, Index end) const {
  const Index y = row / cell_, x0 = begin / cell_, x1 = (end - 1) / cell_;
  Index* ends = counts.ends.data() + y * width_;
  if (x0 == x1) {
    ends[x0] += end - begin;
    return;
  }
  ends[x0] += (x0 + 1) * cell_ - begin;
  ends[x1] += end - x1 * cell_;
  Index* covered = counts.covered.data() + y * (width_ + 1);
  ++covered[x0 + 1], --covered[x1];
}

void PairGrid::add(const Plan& plan, Index b, Index head) {
  const Problem& p = plan.problem;
  if (b < 0 || b >= p.B) fail("picture: batch = {}, expected 0 … {}", b, p.B - 1);
  if (head < 0 || head >= p.Hq) fail("picture: head = {}, expected 0 … {}", head, p.Hq - 1);
  if (p.position(0) < first_ || p.position(p.N - 1) >= first_ + rows_ || p.M > columns_)
    fail("picture: queries at {} … {} and {} keys, expected them inside {} … {} and {}", p.position(0),
         p.position(p.N - 1), p.M, first_, first_ + rows_ - 1, columns_);
  for (Index token = 0; token < p.N; ++token) {
    const Index position = p.position(token);
    add_interval(dense_, position - first_, 0, p.causal ? position + 1 : p.M);
  }
  walk_head(plan, b, head, [&](const RowBlock& rows, const std::vector<Tile>& tiles) {
    for (const Tile& tile : tiles)
      for (Index r = 0; r < tile.rows.count; ++r) {
        const Index row = rows.position(tile.rows[r]) - first_;
        visible_runs(plan, rows, tile, r, [&](Index begin, Index end) { add_interval(attended_, row, begin, end); });
      }
  });
}

std::vector<Index> PairGrid::Counts::totals(Index width, Index height, Index cell) const {
  std::vector<Index> sum = ends;
  for (Index y = 0; y < height; ++y) {
    Index covering = 0;
    for (Index x = 0; x < width; ++x) {
      covering += covered[static_cast<size_t>(y * (width + 1) + x)];
      sum[static_cast<size_t>(y * width + x)] += covering * cell;
    }
  }
  return sum;
}

Index PairGrid::pairs() const {
  const std::vector<Index> all = attended_.totals(width_, height_, cell_);
  return std::accumulate(all.begin(), all.end(), Index{0});
}

Index PairGrid::dense_pairs() const {
  const std::vector<Index> all = dense_.totals(width_, height_, cell_);
  return std::accumulate(all.begin(), all.end(), Index{0});
}

Picture PairGrid::picture() const {
  const std::vector<Index> got = attended_.totals(width_, height_, cell_),
                           possible = dense_.totals(width_, height_, cell_);
  Picture picture{.width = width_, .height = height_, .cell = cell_, .share = std::vector<float>(got.size())};
  for (size_t i = 0; i < got.size(); ++i)
    // More than all there is: queries that stand in several rows may meet a key twice.
    picture.share[i] = possible[i] == 0
                           ? std::numeric_limits<float>::quiet_NaN()
                           : static_cast<float>(std::min(got[i], possible[i])) / static_cast<float>(possible[i]);
  return picture;
}

Picture draw(const Plan& plan, Index b, Index head, Index max_pixels) {
  const Problem& p = plan.problem;
  PairGrid grid(p.position(0), p.N, p.M, max_pixels);
  grid.add(plan, b, head);
  return grid.picture();
}

}  // namespace heed
