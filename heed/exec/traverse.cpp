#include "heed/exec/traverse.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <limits>

#include "heed/base/error.h"
#include "heed/exec/gather.h"

namespace heed {
namespace {

constexpr Index most_task_rows = 128;  // what any kernel asks for
constexpr Index chunk_panels = chunk_columns / panel_columns;
// More rows than these share panels that were widened for them; fewer are served by kernels that widen as they read.
constexpr Index few_rows = 12;

// Bits [from, to) of a 64-bit word.
std::uint64_t bit_range(Index from, Index to) {
  from = std::clamp<Index>(from, 0, 64), to = std::clamp<Index>(to, 0, 64);
  if (from >= to) return 0;
  const std::uint64_t up_to = to == 64 ? ~std::uint64_t{0} : (std::uint64_t{1} << to) - 1;
  return up_to & (~std::uint64_t{0} << from);
}

// 64 bits starting at bit `from` of a row of `words` words; outside is 0.
std::uint64_t bits_at(const std::uint64_t* row, Index words, Index from) {
  const auto word = [&](Index i) { return i >= 0 && i < words ? row[i] : 0; };
  const Index i = from >= 0 ? from / 64 : -((63 - from) / 64), shift = from - i * 64;
  return shift == 0 ? word(i) : (word(i) >> shift) | (word(i + 1) << (64 - shift));
}

bool has_bit(const std::uint64_t* words, Index i) { return ((words[i / 64] >> (i % 64)) & 1) != 0; }

// The panels of one chunk widened to f32, each when the first sub-block meets it.
class WidePanels {
 public:
  /// Panels from `first` of a view on, for `rows` rows.
  WidePanels(const PanelLayout& layout, Index rows, Index first, Scratch& scratch)
      : layout_(layout), first_(first),
        wanted_(rows > few_rows && layout.product == DType::f32 && layout.dtype != DType::f32) {
    if (!wanted_) return;
    keys_ = scratch.take<float>(chunk_panels * layout_.panel_elements()).data();
    values_ = scratch.take<float>(chunk_panels * panel_columns * layout_.dvp).data();
  }
  bool wanted() const { return wanted_; }
  /// Lets the task read panels [begin, end) of the view widened.
  void show(const SourceView& view, Index begin, Index end, PanelTask& task) {
    const Index key_size = layout_.panel_elements(), value_size = panel_columns * layout_.dvp;
    const Index element = size_of(layout_.dtype);
    for (Index p = begin; p < end; ++p) {
      bool& done = done_[p - first_];
      if (done) continue;
      widen_panels(layout_, static_cast<const std::byte*>(view.keys) + p * key_size * element,
                   static_cast<const std::byte*>(view.values) + p * value_size * element, 1,
                   keys_ + (p - first_) * key_size, values_ + (p - first_) * value_size);
      done = true;
    }
    task.layout = {DType::f32, layout_.d, layout_.dv, layout_.dp, layout_.dvp};
    task.k = keys_ + (begin - first_) * key_size, task.v = values_ + (begin - first_) * value_size;
  }

 private:
  PanelLayout layout_;
  Index first_;  // panel of the view
  bool wanted_, done_[chunk_panels] = {};
  float *keys_ = nullptr, *values_ = nullptr;
};

}  // namespace

bool meets(const Tile& tile, Index split, Index split_chunks) {
  const Index first = tile.columns.contiguous() ? tile.columns.first : 0, last = first + tile.columns.count - 1;
  return split_of(first, split_chunks) <= split && split <= split_of(last, split_chunks);
}

// Per row of the tile: the columns [first, end) that its band, the plan's visible interval and the
// tile's own edges leave, in columns of the tile (ranks).
struct Traversal::Extent {
  bool uniform = false;                  // every row sees all columns of the tile
  const std::int32_t* ranks = nullptr;   // state rank of each row of the tile, or null = from rank0 on
  Index rank0 = 0, rows = 0;
  std::span<std::int32_t> first, end;
};

void Traversal::run(const Rows& rows, const std::vector<Tile>& tiles, Index split, Index split_chunks,
                    AttendStats& stats) {
  split_ = split, split_chunks_ = split_chunks;
  for (const Tile& tile : tiles) {
    const Scratch::Mark mark(scratch_);
    const Index before = stats.panels_visited;
    const bool owner =
        mine(tile.columns.contiguous() ? tile.columns.first : 0);  // a tile that splits share counts once
    run_tile(rows, tile, stats);
    stats.tiles_visited += owner && stats.panels_visited > before ? 1 : 0;
  }
}

void Traversal::run_tile(const Rows& rows, const Tile& tile, AttendStats& stats) {
  const Source& source = plan_.sources[static_cast<size_t>(tile.source)];
  const Problem& problem = plan_.problem;
  const Index head = source.per_query_head ? rows.block.b * problem.Hq + rows.block.head
                                           : rows.block.b * problem.Hk + rows.block.kv_head;
  const SourceView& view = source.views[static_cast<size_t>(head)];
  const PanelLayout& layout = source.layout;

  // Which rows: a run of ranks where it can be, else a list.
  Extent extent;
  const bool whole = tile.rows.contiguous() && (rows.heads == 1 || tile.rows.count == rows.block.rows);
  extent.rows = tile.rows.count * rows.heads;
  if (whole) {
    extent.rank0 = tile.rows.first;
  } else {
    const auto ranks = scratch_.take<std::int32_t>(extent.rows);
    for (Index h = 0; h < rows.heads; ++h)
      for (Index i = 0; i < tile.rows.count; ++i)
        ranks[static_cast<size_t>(h * tile.rows.count + i)] =
            static_cast<std::int32_t>(h * rows.block.rows + tile.rows[i]);
    extent.ranks = ranks.data();
  }

  // Which columns each of them sees.
  const bool banded = tile.mask.kind == Mask::Kind::band, limited = !plan_.visible_first.empty();
  extent.uniform = !banded && !limited;
  if (!extent.uniform) {
    extent.first = scratch_.take<std::int32_t>(extent.rows);
    extent.end = scratch_.take<std::int32_t>(extent.rows);
    const auto position_of = [&](Index rank) {
      const Index column = tile.columns[rank];
      return view.position == nullptr ? column : view.position[column];
    };
    const bool plain = tile.columns.contiguous() && view.position == nullptr;
    // Ranks [0, count) whose position is at least p: positions ascend.
    const auto lower_bound = [&](Index p) -> Index {
      if (plain) return std::clamp<Index>(p - tile.columns.first, 0, tile.columns.count);
      Index low = 0, high = tile.columns.count;
      while (low < high) {
        const Index middle = (low + high) / 2;
        if (position_of(middle) < p) low = middle + 1;
        else high = middle;
      }
      return low;
    };
    for (size_t i = 0; i < static_cast<size_t>(extent.rows); ++i) {
      const Index rank = extent.ranks == nullptr ? extent.rank0 + static_cast<Index>(i) : extent.ranks[i];
      const Index p = rows.block.position(rows.row_of(rank));
      Index low = -Mask::unbounded, high = Mask::unbounded;
      if (banded) low = p + tile.mask.lo, high = p + tile.mask.hi + 1;
      if (limited) {
        const size_t at = static_cast<size_t>(rows.block.b * problem.M + p);
        low = std::max<Index>(low, plan_.visible_first[at]);
        high = std::min<Index>(high, plan_.visible_end[at]);
      }
      extent.first[i] = static_cast<std::int32_t>(lower_bound(low));
      extent.end[i] = static_cast<std::int32_t>(std::max<Index>(extent.first[i], lower_bound(high)));
    }
  }

  if (!tile.columns.contiguous()) {
    // A list is packed, in pieces of one chunk; then it is a range of its own.
    for (Index from = 0; from < tile.columns.count; from += chunk_columns) {
      if (!mine(from)) continue;
      const Scratch::Mark mark(scratch_);
      const Index count = std::min(chunk_columns, tile.columns.count - from);
      const SourceView piece = work_ == nullptr ? describe_columns(view, tile.columns, from, count, scratch_)
                                                : work_->take_up(rows, tile, view, from, count, scratch_);
      stats.columns_gathered += count;
      run_chunk(rows, tile, extent, piece, layout.of_copies(), from, from, from + count, stats);
      if (work_ != nullptr) work_->put_back(rows, tile, from, count);
    }
    return;
  }
  const Index first = tile.columns.first, end = first + tile.columns.count;
  if (tile.gated) {
    // A group must be seen at once: chunks begin and end with groups, as many as fit from the first one's panel on.
    for (Index begin = first, stop; begin < end; begin = stop) {
      const Index base = begin / panel_columns * panel_columns, most = std::min(end, base + chunk_columns);
      for (stop = most; stop > begin && !has_bit(view.gates, stop - 1);) --stop;
      if (stop == begin) fail("columns from {} on: no gate before {}, expected a group to fit", begin, most);
      if (mine(base)) run_chunk(rows, tile, extent, view, layout, first, begin - first, stop - first, stats);
    }
    return;
  }
  // Chunks stand at absolute columns, so that a row's bits do not depend on where a tile begins.
  for (Index chunk = first / chunk_columns * chunk_columns; chunk < end; chunk += chunk_columns)
    if (mine(chunk))
      run_chunk(rows, tile, extent, view, layout, first, std::max(first, chunk) - first,
                std::min(end, chunk + chunk_columns) - first, stats);
}

// Columns [from, to) of the tile (ranks); rank r is column columns_first + r of the view (for a
// gathered piece: r - from).
void Traversal::run_chunk(const Rows& rows, const Tile& tile, const Extent& extent, const SourceView& view,
                          const PanelLayout& layout, Index columns_first, Index from, Index to, AttendStats& stats) {
  const Index element = size_of(layout.dtype);
  const Index origin = tile.columns.contiguous() ? -columns_first : from;  // rank of the view's column 0
  const Rule& rule = plan_.rule;
  const bool bits = tile.mask.kind == Mask::Kind::bits;
  const bool additive = !rule.plain() || view.log_weight != nullptr;
  std::uint64_t words[most_task_rows * chunk_panels], gates[chunk_panels] = {};
  const Index sub_block = std::min(most_task_rows, kernels().task_rows);
  const Scratch::Mark chunk_mark(scratch_);
  WidePanels wide(layout, extent.rows, (from - origin) / panel_columns, scratch_);
  Index read_first = std::numeric_limits<Index>::max(), read_end = 0;  // panels that some sub-block meets

  for (Index r0 = 0; r0 < extent.rows; r0 += sub_block) {
    const Index count = std::min(sub_block, extent.rows - r0);
    // The union and the intersection of what these rows see of the chunk, in ranks.
    Index any_first = from, any_end = to, all_first = from, all_end = to, pairs = count * (to - from);
    if (!extent.uniform) {
      any_first = to, any_end = from, pairs = 0;
      for (Index i = 0; i < count; ++i) {
        const Index a = std::max<Index>(from, extent.first[static_cast<size_t>(r0 + i)]);
        const Index b = std::min<Index>(to, extent.end[static_cast<size_t>(r0 + i)]);
        all_first = std::max(all_first, a), all_end = std::min(all_end, b);
        if (a >= b) continue;
        any_first = std::min(any_first, a), any_end = std::max(any_end, b);
        pairs += b - a;
      }
      if (any_first >= any_end) continue;
    }
    const Index panel0 = (any_first - origin) / panel_columns, panel1 = ceil_div(any_end - origin, panel_columns);
    const Index whole_first = panel0 * panel_columns + origin, whole_end = panel1 * panel_columns + origin;

    PanelTask task;
    task.layout = layout;
    task.panels = panel1 - panel0;
    task.rows = count;
    if (extent.ranks == nullptr) task.first_row = extent.rank0 + r0;
    else task.row_list = extent.ranks + r0;
    task.q = rows.q, task.m = rows.m, task.l = rows.l, task.acc = rows.acc;
    task.scale = rule.scale, task.softcap = rule.softcap;
    Index closing = 0;  // gates, which are not attended
    if (tile.gated) {
      for (Index p = 0; p < task.panels; ++p) {
        const Index start = whole_first + p * panel_columns;
        gates[p] = view.gates[panel0 + p] & bit_range(from - start, to - start);
        closing += std::popcount(gates[p]);
      }
      task.gates = gates;
      task.gates_begin = std::max<Index>(0, from - whole_first);
    }

    // Columns of no group are hidden as such.
    const bool full = all_first <= (tile.gated ? from : whole_first) && all_end >= (tile.gated ? to : whole_end) &&
                      !bits && view.visible == nullptr;
    if (!full) {
      task.words = words;
      const bool counted = bits || view.visible != nullptr || tile.gated;
      const bool alike = extent.uniform && !bits;  // every row sees the same columns
      if (counted) pairs = 0;
      if (alike) task.word_stride = 0;
      for (Index i = 0; i < (alike ? 1 : count); ++i) {
        const Index a = extent.uniform ? from : std::max<Index>(from, extent.first[static_cast<size_t>(r0 + i)]);
        const Index b = extent.uniform ? to : std::min<Index>(to, extent.end[static_cast<size_t>(r0 + i)]);
        for (Index p = 0; p < task.panels; ++p) {
          const Index start = whole_first + p * panel_columns;
          std::uint64_t word = bit_range(a - start, b - start);
          if (view.visible != nullptr) word &= view.visible[panel0 + p];
          if (bits)
            word &= bits_at(tile.mask.words + (r0 + i) % tile.rows.count * tile.mask.stride, tile.mask.stride, start);
          words[i * chunk_panels + p] = word;
          if (counted) pairs += std::popcount(word & ~gates[p]);
        }
      }
      if (counted && alike) pairs *= count;
      if (pairs == 0) continue;
    }

    stats.panels_visited += task.panels;
    stats.pairs += pairs - (full ? count * closing : 0);
    stats.pairs_computed += count * task.panels * panel_columns;
    stats.rows_visited += count;
    read_first = std::min(read_first, panel0), read_end = std::max(read_end, panel1);
    if (work_ == nullptr) continue;

    const Scratch::Mark mark(scratch_);
    task.k = static_cast<const std::byte*>(view.keys) + panel0 * layout.panel_elements() * element;
    task.v = static_cast<const std::byte*>(view.values) + panel0 * panel_columns * layout.dvp * element;
    if (wide.wanted()) wide.show(view, panel0, panel1, task);
    if (layout.dtype == DType::i8) {
      task.key_scale = view.key_scale + panel0 * panel_columns;
      task.value_scale = view.value_scale + panel0 * panel_columns;
    }
    if (additive) {
      const Index columns = task.panels * panel_columns;
      const bool per_row = !rule.alibi.empty() || !rule.bias.empty();
      float* add = scratch_.take<float>((per_row ? count : 1) * columns).data();
      for (Index i = 0; i < (per_row ? count : 1); ++i) {
        const Index rank = extent.ranks == nullptr ? extent.rank0 + r0 + i : extent.ranks[r0 + i];
        fill_addend(plan_, rows, rank, tile, view, whole_first, origin, columns, add + i * columns);
      }
      task.add = add;
      task.add_stride = per_row ? columns : 0;
    }
    work_->meet(rows, tile, task, {view, panel0, origin}, scratch_);
  }
  const Index read = std::max<Index>(0, read_end - read_first);
  stats.panels_read += read, stats.bytes_read += read * layout.panel_bytes();
}

}  // namespace heed
