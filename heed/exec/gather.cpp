#include "heed/exec/gather.h"

#include <algorithm>
#include <cstring>

#include "heed/kernel/kernels.h"

namespace heed {
namespace {

// `run` consecutive columns of one panel to consecutive columns of another; `fixed` > 0: that many.
template <Index fixed, class T>
void copy_run(const T* from, T* to, Index steps, Index run) {
  const Index width = fixed > 0 ? fixed : run;
  constexpr Index step = panel_columns * (sizeof(T) == 2 ? 2 : 1);
  for (Index f = 0; f < steps; ++f, from += step, to += step)
    for (Index c = 0; c < width; ++c) to[c] = from[c];
}

// Keys of columns [column, column + run) of a packed source, all in one panel, to column `to` on of another.
template <class T>
void copy_keys(const PanelLayout& layout, const SourceView& view, Index column, Index run, T* keys, Index to) {
  constexpr Index pair = sizeof(T) == 2 ? 2 : 1;
  const T* k = static_cast<const T*>(view.keys) + layout.key_offset(column, 0);
  T* k_out = keys + layout.key_offset(to, 0);
  const Index steps = layout.dp / pair;
  switch (run * pair) {
    case 1: copy_run<1>(k, k_out, steps, 1); break;
    case 2: copy_run<2>(k, k_out, steps, 2); break;
    case 4: copy_run<4>(k, k_out, steps, 4); break;
    case 8: copy_run<8>(k, k_out, steps, 8); break;
    case 16: copy_run<16>(k, k_out, steps, 16); break;
    case 32: copy_run<32>(k, k_out, steps, 32); break;
    case panel_columns* pair: std::copy_n(k, layout.panel_elements(), k_out); break;  // a whole panel
    default: copy_run<0>(k, k_out, steps, run * pair);
  }
}

// Their values.
template <class T>
void copy_values(const PanelLayout& layout, const SourceView& view, Index column, Index run, T* values, Index to) {
  constexpr Index pair = sizeof(T) == 2 ? 2 : 1;
  const T* v = static_cast<const T*>(view.values);
  // bf16 values stand in pairs of columns: whole pairs are copied as they lie.
  const Index whole = pair == 1 || (column % 2 == 0 && to % 2 == 0) ? run / pair * pair : 0;
  std::copy_n(v + layout.value_offset(column, 0), whole * layout.dvp, values + layout.value_offset(to, 0));
  for (Index i = whole; i < run; ++i) {
    const T* in = v + layout.value_offset(column + i, 0);
    T* out = values + layout.value_offset(to + i, 0);
    for (Index e = 0; e < layout.dvp; ++e) out[e * pair] = in[e * pair];
  }
}

constexpr Index line = 64;

void ask_for(const void* data, Index bytes) {
  for (Index at = 0; at < bytes; at += line) __builtin_prefetch(static_cast<const std::byte*>(data) + at);
}

// Packs listed keys from rows, which are in the type of products.
void pack_key_rows(const PanelLayout& layout, const SourceView& view, std::span<const std::int32_t> members, void* keys,
                   Scratch& scratch) {
  const Scratch::Mark mark(scratch);
  const Index bytes = layout.dp * size_of(layout.product), width = bytes / Index{sizeof(float)};
  float* rows = scratch.take<float>(panel_columns * width).data();
  constexpr Index ahead = 12;  // rows lie far apart
  const Index count = static_cast<Index>(members.size());
  const auto row = [&](Index i) { return view.key_rows + members[static_cast<size_t>(i)] * bytes; };
  for (Index first = 0; first < count; first += panel_columns) {
    const Index columns = std::min(panel_columns, count - first);
    for (Index i = first; i < first + columns; ++i) {
      if (i + ahead < count) ask_for(row(i + ahead), bytes);
      std::memcpy(rows + (i - first) * width, row(i), static_cast<size_t>(bytes));
    }
    if (layout.dtype == DType::bf16 && layout.product == DType::f32)
      kernels().pack_keys_bf16(rows, width, columns, width, width, static_cast<bf16*>(keys) + first * width);
    else  // two bf16 features move together, like one f32: that is how panels hold them
      kernels().pack_keys_f32(rows, width, columns, width, width, static_cast<float*>(keys) + first * width);
  }
}

// Keys of i8, and their values, widened to f32.
void widen_keys(const PanelLayout& layout, const SourceView& view, Index column, Index run, float* keys, Index to) {
  const auto* k = static_cast<const std::int8_t*>(view.keys) + layout.key_offset(column, 0);
  float* out = keys + layout.key_offset(to, 0);
  for (Index f = 0; f < layout.dp; ++f, k += panel_columns, out += panel_columns)
    for (Index c = 0; c < run; ++c) out[c] = static_cast<float>(k[c]) * view.key_scale[column + c];
}
void widen_values(const PanelLayout& layout, const SourceView& view, Index column, Index run, float* values, Index to) {
  const auto* v = static_cast<const std::int8_t*>(view.values) + layout.value_offset(column, 0);
  float* out = values + layout.value_offset(to, 0);
  for (Index c = 0; c < run; ++c, v += layout.dvp, out += layout.dvp)
    for (Index e = 0; e < layout.dvp; ++e) out[e] = static_cast<float>(v[e]) * view.value_scale[column + c];
}

template <class T>
void gather(const PanelLayout& layout, const SourceView& view, std::span<const std::int32_t> members, bool short_runs,
            Scratch& scratch, SourceView& piece) {
  const Index count = static_cast<Index>(members.size()), padded = round_up(count, panel_columns);
  T* keys = scratch.take<T>(layout.key_elements(padded)).data();
  T* values = scratch.take<T>(layout.value_elements(padded)).data();
  const bool by_rows = short_runs && view.key_rows != nullptr;
  // Columns beyond the list have weight zero, but zero times leftover infinity would be NaN.
  const Index tail = padded - panel_columns;
  if (count != padded) {
    if (!by_rows) std::fill_n(keys + layout.key_elements(tail), layout.panel_elements(), T{});
    std::fill_n(values + tail * layout.dvp, panel_columns * layout.dvp, T{});
  }
  if (by_rows) pack_key_rows(layout, view, members, keys, scratch);
  constexpr Index ahead = 8;
  const auto member = [&](Index i) -> Index { return members[static_cast<size_t>(i)]; };
  for (Index i = 0, run; i < count; i += run) {
    const Index column = member(i);
    const Index most = std::min({count - i, panel_columns - column % panel_columns, panel_columns - i % panel_columns});
    for (run = 1; run < most && member(i + run) == column + run;) ++run;
    if constexpr (sizeof(T) == 4) {
      if (layout.dtype == DType::i8) {
        if (!by_rows) widen_keys(layout, view, column, run, keys, i);
        widen_values(layout, view, column, run, values, i);
        continue;
      }
    }
    if (short_runs && i + ahead < count)
      ask_for(static_cast<const T*>(view.values) + layout.value_offset(member(i + ahead), 0),
              run * layout.dvp * Index{sizeof(T)});
    if (!by_rows) copy_keys(layout, view, column, run, keys, i);
    copy_values(layout, view, column, run, values, i);
  }
  piece.keys = keys, piece.values = values;
}

// Members [from, from + count) of a set, without a division for each.
std::span<const std::int32_t> expand(const Set& columns, Index from, Index count, Scratch& scratch) {
  if (columns.page == 1 && columns.first == 0 && !columns.contiguous())
    return {columns.pages + from, static_cast<size_t>(count)};
  const auto members = scratch.take<std::int32_t>(count);
  Index page = from / columns.page, inner = from % columns.page;
  for (Index i = 0; i < count; ++page, inner = 0) {
    const Index begin = columns.first + columns.pages[page] * columns.page;
    for (; inner < columns.page && i < count; ++inner)
      members[static_cast<size_t>(i++)] = static_cast<std::int32_t>(begin + inner);
  }
  return members;
}

SourceView describe(const SourceView& view, std::span<const std::int32_t> members, Scratch& scratch) {
  SourceView piece;
  const size_t count = members.size();
  piece.columns = static_cast<Index>(count);
  if (view.log_weight != nullptr) {
    float* w = scratch.take<float>(piece.columns).data();
    for (size_t i = 0; i < count; ++i) w[i] = view.log_weight[members[i]];
    piece.log_weight = w;
  }
  if (view.position == nullptr) {
    piece.position = members.data();
  } else {
    std::int32_t* position = scratch.take<std::int32_t>(piece.columns).data();
    for (size_t i = 0; i < count; ++i) position[i] = view.position[members[i]];
    piece.position = position;
  }
  if (view.visible != nullptr) {
    std::uint64_t* visible = scratch.take<std::uint64_t>(chunk_columns / 64).data();
    std::fill_n(visible, chunk_columns / 64, 0);
    for (size_t i = 0; i < count; ++i)
      visible[i / 64] |= ((view.visible[members[i] / 64] >> (members[i] % 64)) & 1) << (i % 64);
    piece.visible = visible;
  }
  return piece;
}

}  // namespace

SourceView gather_columns(const PanelLayout& layout, const SourceView& view, const Set& columns, Index from,
                          Index count, Scratch& scratch) {
  constexpr Index short_run = 8;  // columns of a panel's line
  const std::span<const std::int32_t> members = expand(columns, from, count, scratch);
  SourceView piece = describe(view, members, scratch);
  const bool short_runs = columns.page < short_run;
  if (layout.dtype == DType::bf16) gather<bf16>(layout, view, members, short_runs, scratch, piece);
  else gather<float>(layout, view, members, short_runs, scratch, piece);
  return piece;
}

SourceView describe_columns(const SourceView& view, const Set& columns, Index from, Index count, Scratch& scratch) {
  return describe(view, expand(columns, from, count, scratch), scratch);
}

void fill_addend(const Plan& plan, const Rows& rows, Index row_rank, const Tile& tile, const SourceView& view,
                 Index first, Index origin, Index count, float* out) {
  const Rule& rule = plan.rule;
  const Index begin = std::max<Index>(first, origin), end = std::min(first + count, origin + view.columns);
  std::fill_n(out, count, 0.0f);
  const auto position = [&](Index rank) -> Index {
    const Index column = rank - origin;
    return view.position == nullptr ? column : view.position[column];
  };
  const Index head = rows.head_of(row_rank), row = rows.row_of(row_rank);
  if (view.log_weight != nullptr)
    for (Index r = begin; r < end; ++r) out[r - first] = view.log_weight[r - origin];
  if (!rule.alibi.empty()) {
    const float slope = rule.alibi[static_cast<size_t>(head)];
    const Index p = rows.block.position(row);
    for (Index r = begin; r < end; ++r) out[r - first] += slope * static_cast<float>(position(r) - p);
  }
  // A bias belongs to pairs of input tokens, so only the input itself has one.
  if (!rule.bias.empty() && tile.source == 0) {
    const TensorView& bias = rule.bias;
    const Index b = bias.shape[0] == 1 ? 0 : rows.block.b, h = bias.shape[1] == 1 ? 0 : head;
    const Index token = rows.block.token(row);
    for (Index r = begin; r < end; ++r) {
      float x;
      read_f32(bias.at({b, h, token, position(r)}), bias.dtype, 1, 1, &x);
      out[r - first] += x;
    }
  }
}

}  // namespace heed
