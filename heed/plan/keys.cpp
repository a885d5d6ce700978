#include "heed/plan/keys.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <new>

#include "heed/base/error.h"
#include "heed/base/memory.h"
#include "heed/base/scratch.h"
#include "heed/base/threads.h"
#include "heed/kernel/kernels.h"

namespace heed {
namespace {

// Anonymous pages: zero, and costing nothing until a token is written there.
std::byte* reserve(Index bytes) {
  void* p = mmap(nullptr, static_cast<size_t>(bytes), PROT_READ | PROT_WRITE,
                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) throw std::bad_alloc();
  return static_cast<std::byte*>(p);
}

// Numbers as they are stored, widened; scales left out.
float widen(float x) { return x; }
float widen(bf16 x) { return to_f32(x); }
float widen(std::int8_t x) { return static_cast<float>(x); }

template <class T>
T narrow(float x) {
  if constexpr (sizeof(T) == 2) return to_bf16(x);
  else return static_cast<T>(x);
}

/// Calls body with a null pointer to the type that is stored.
template <class Body>
auto with_stored(DType dtype, Body body) {
  switch (dtype) {
    case DType::bf16: return body(static_cast<const bf16*>(nullptr));
    case DType::i8: return body(static_cast<const std::int8_t*>(nullptr));
    default: return body(static_cast<const float*>(nullptr));
  }
}

/// Makes n numbers whole, -127 … 127, in place; they count times the scale that is returned.
float make_whole(float* x, Index n) {
  float most = 0;
  for (Index i = 0; i < n; ++i) most = std::max(most, std::fabs(x[i]));
  const float scale = most / 127, inverse = scale > 0 ? 1 / scale : 0;
  for (Index i = 0; i < n; ++i) x[i] = std::clamp(std::nearbyint(x[i] * inverse), -127.0f, 127.0f);
  return scale;
}

}  // namespace

void KeyValues::Free::operator()(std::byte* p) const { munmap(p, static_cast<size_t>(bytes)); }

KeyValues::KeyValues(Index heads, Index d, Index dv, Index capacity, DType stored)
    : heads_(heads), capacity_(capacity), panels_(ceil_div(std::max<Index>(capacity, 1), panel_columns)),
      layout_(panel_layout(stored, d, dv)) {
  const Index element = size_of(layout_.dtype), rows = panels_ * panel_columns;
  head_bytes_k_ = layout_.key_elements(rows) * element;
  head_bytes_v_ = layout_.value_elements(rows) * element;
  const Index k = std::max<Index>(1, heads * head_bytes_k_), v = std::max<Index>(1, heads * head_bytes_v_);
  memory_k_ = {reserve(k), Free{k}};
  memory_v_ = {reserve(v), Free{v}};
  if (stored == DType::i8) {
    scales_ = rows;
    const Index s = std::max<Index>(1, heads * 2 * rows * static_cast<Index>(sizeof(float)));
    memory_scales_ = {reserve(s), Free{s}};
  }
}

Index KeyValues::bytes() const {
  const Index panels = ceil_div(size_, panel_columns);
  Index sum = (heads_ * panels - released_count_) * layout_.panel_bytes();
  if (memory_scales_) sum += heads_ * 2 * panels * panel_columns * static_cast<Index>(sizeof(float));
  for (const auto& [block, means] : means_) sum += static_cast<Index>(means.panels.size() * sizeof(float));
  for (const auto& [block, bounds] : bounds_) sum += static_cast<Index>(bounds.bounds.size() * sizeof(float));
  return sum + heads_ * rows_complete_ * layout_.dp * size_of(layout_.product);
}

const void* KeyValues::keys(Index head) const { return memory_k_.get() + head * head_bytes_k_; }
const void* KeyValues::values(Index head) const { return memory_v_.get() + head * head_bytes_v_; }
const float* KeyValues::key_scales(Index head) const {
  return memory_scales_ ? reinterpret_cast<const float*>(memory_scales_.get()) + 2 * head * scales_ : nullptr;
}
const float* KeyValues::value_scales(Index head) const { return memory_scales_ ? key_scales(head) + scales_ : nullptr; }

void KeyValues::append(const TensorView& k, const TensorView& v) {
  const size_t axis = k.shape.size() - 2;  // of tokens
  const Index n = k.shape.at(axis), begin = size_, end = size_ + n;
  if (end > capacity_) fail("tokens = {}, expected at most {} (the capacity of the key-value cache)", end, capacity_);
  if (begin == 0 && end == capacity_ && n > 0) {  // not a cache that grows
    ask_for_large_pages(memory_k_.get(), heads_ * head_bytes_k_);
    ask_for_large_pages(memory_v_.get(), heads_ * head_bytes_v_);
  }
  const Kernels& kernel = kernels();
  const Index first_panel = begin / panel_columns, panels = n == 0 ? 0 : ceil_div(end, panel_columns) - first_panel;

  parallel_for(heads_ * panels, [&](Index unit, int) {
    const Index head = unit / panels, panel = first_panel + unit % panels;
    const Index from = std::max(begin, panel * panel_columns), to = std::min(end, (panel + 1) * panel_columns);
    Scratch& scratch = thread_scratch();
    const Scratch::Mark mark(scratch);
    const Index d = layout_.d, dv = layout_.dv;
    float* rows = scratch.take<float>(panel_columns * std::max(d, dv)).data();
    auto* keys = memory_k_.get() + head * head_bytes_k_;
    auto* values = memory_v_.get() + head * head_bytes_v_;

    // Tokens from … to as rows of `width`; where i8 is stored, whole numbers, with scales[token].
    const auto fetch = [&](const TensorView& x, Index width, const float* scales) {
      for (Index t = from; t < to; ++t) {
        float* row = rows + (t - from) * width;
        const void* from_row =
            axis == 1 ? x.at({head, t - begin}) : x.at({head / x.shape[1], head % x.shape[1], t - begin});
        read_f32(from_row, x.dtype, x.stride[axis + 1], width, row);
        if (scales != nullptr) const_cast<float*>(scales)[t] = make_whole(row, width);
      }
    };

    fetch(k, d, key_scales(head));
    const bool fresh = from % panel_columns == 0;  // padding included
    const Index offset = panel * layout_.panel_elements();
    if (fresh && layout_.dtype == DType::bf16) {
      kernel.pack_keys_bf16(rows, d, to - from, d, layout_.dp, reinterpret_cast<bf16*>(keys) + offset);
    } else if (fresh && layout_.dtype == DType::f32) {
      kernel.pack_keys_f32(rows, d, to - from, d, layout_.dp, reinterpret_cast<float*>(keys) + offset);
    } else {
      with_stored(layout_.dtype, [&]<class T>(const T*) {
        T* out = reinterpret_cast<T*>(keys);
        for (Index i = 0; i < d; ++i)
          for (Index t = from; t < to; ++t) out[layout_.key_offset(t, i)] = narrow<T>(rows[(t - from) * d + i]);
      });
    }
    fetch(v, dv, value_scales(head));
    with_stored(layout_.dtype, [&]<class T>(const T*) {
      constexpr Index pair = sizeof(T) == 2 ? 2 : 1;
      for (Index t = from; t < to; ++t) {
        const float* row = rows + (t - from) * dv;
        T* out = reinterpret_cast<T*>(values) + layout_.value_offset(t, 0);
        for (Index e = 0; e < dv; ++e) out[pair * e] = narrow<T>(row[e]);
      }
    });
  });
  size_ = end;
}

void KeyValues::truncate(Index size) {
  size_ = std::min(size_, std::max<Index>(size, 0));
  for (auto& [block, means] : means_) means.complete = std::min(means.complete, size_ / block);
  for (auto& [block, bounds] : bounds_) bounds.complete = std::min(bounds.complete, size_ / block);
  rows_complete_ = std::min(rows_complete_, size_);
  for (Index head = 0; head < heads_ && released_count_ > 0; ++head)
    for (Index p = ceil_div(size_, panel_columns); p < panels_; ++p)
      if (auto mark = released_[static_cast<size_t>(head * panels_ + p)]; mark) mark = false, --released_count_;
}

void KeyValues::release(Index head, Index first, Index end) {
  if (released_.empty()) released_.assign(static_cast<size_t>(heads_ * panels_), false);
  for (Index p = first; p < end; ++p) {
    auto mark = released_[static_cast<size_t>(head * panels_ + p)];
    released_count_ += mark ? 0 : 1;
    mark = true;
  }
  // A page that panels share goes with the last of them.
  Index run_begin = first, run_end = end;
  while (run_begin > 0 && released(head, run_begin - 1)) --run_begin;
  while (run_end < panels_ && released(head, run_end)) ++run_end;
  const Index page = sysconf(_SC_PAGESIZE), element = size_of(layout_.dtype);
  const auto free_pages = [&](std::byte* memory, Index head_bytes, Index panel_bytes) {
    const auto at = [&](Index panel) { return head * head_bytes + panel * panel_bytes; };
    const Index from = std::max(round_up(at(run_begin), page), at(first) / page * page);
    const Index to = std::min(at(run_end) / page * page, round_up(at(end), page));
    if (from < to) madvise(memory + from, static_cast<size_t>(to - from), MADV_DONTNEED);
  };
  free_pages(memory_k_.get(), head_bytes_k_, layout_.panel_elements() * element);
  free_pages(memory_v_.get(), head_bytes_v_, panel_columns * layout_.dvp * element);
}

void KeyValues::read_key(Index head, Index token, float* out) const {
  with_stored(layout_.dtype, [&]<class T>(const T*) {
    constexpr Index pair = sizeof(T) == 2 ? 2 : 1;
    const T* key = static_cast<const T*>(keys(head)) + layout_.key_offset(token, 0);
    for (Index f = 0; f < layout_.d; ++f) out[f] = widen(key[f / pair * pair * panel_columns + f % pair]);
  });
  if (memory_scales_)
    for (Index f = 0; f < layout_.d; ++f) out[f] *= key_scales(head)[token];
}

void KeyValues::read_value(Index head, Index token, float* out) const {
  with_stored(layout_.dtype, [&]<class T>(const T*) {
    const T* v = static_cast<const T*>(values(head));
    for (Index e = 0; e < layout_.dv; ++e) out[e] = widen(v[layout_.value_offset(token, e)]);
  });
  if (memory_scales_)
    for (Index e = 0; e < layout_.dv; ++e) out[e] *= value_scales(head)[token];
}

namespace {

// Folds n numbers value(0), value(1), … in eight chains, which a compiler keeps in vectors.
template <class Value, class Fold>
float fold_run(Index n, float start, Value value, Fold fold) {
  constexpr Index chains = 8;
  float partial[chains];
  std::fill_n(partial, chains, start);
  Index c = 0;
  for (; c + chains <= n; c += chains)
    for (Index i = 0; i < chains; ++i) partial[i] = fold(partial[i], value(c + i));
  for (Index width = chains / 2; width > 0; width /= 2)
    for (Index i = 0; i < width; ++i) partial[i] = fold(partial[i], partial[i + width]);
  for (; c < n; ++c) partial[0] = fold(partial[0], value(c));
  return partial[0];
}

// The columns of a feature lie side by side (every other one in bf16): each panel's are folded first. scale: of each
// column, where i8 is stored.
template <class Fold>
void fold_columns(const PanelLayout& layout, const void* keys, const float* scale, Index begin, Index end, float start,
                  float* out, Fold fold) {
  with_stored(layout.dtype, [&]<class T>(const T*) {
    constexpr Index pair = sizeof(T) == 2 ? 2 : 1;
    for (Index from = begin; from < end;) {
      const Index to = std::min(end, round_up(from + 1, panel_columns)), count = to - from;
      for (Index i = 0; i < layout.d; ++i) {
        const T* p = static_cast<const T*>(keys) + layout.key_offset(from, i);
        const auto value = [&](Index c) {
          if constexpr (sizeof(T) == 1) return widen(p[c]) * scale[from + c];
          else return widen(p[pair * c]);
        };
        out[i] = fold(out[i], fold_run(count, start, value, fold));
      }
      from = to;
    }
  });
}

constexpr auto sum_of = [](float a, float b) { return a + b; };
constexpr auto larger_of = [](float a, float b) { return a < b ? b : a; };
constexpr auto smaller_of = [](float a, float b) { return a < b ? a : b; };

}  // namespace

void sum_columns(const PanelLayout& layout, const void* keys, Index begin, Index end, float* out) {
  fold_columns(layout, keys, nullptr, begin, end, 0, out, sum_of);
}

void max_columns(const PanelLayout& layout, const void* keys, Index begin, Index end, float* out) {
  fold_columns(layout, keys, nullptr, begin, end, -std::numeric_limits<float>::infinity(), out, larger_of);
}

void KeyValues::sum_keys(Index head, Index begin, Index end, float* sum) const {
  fold_columns(layout_, keys(head), key_scales(head), begin, end, 0, sum, sum_of);
}

void KeyValues::sum_values(Index head, Index begin, Index end, float* sum) const {
  with_stored(layout_.dtype, [&]<class T>(const T*) {
    constexpr Index pair = sizeof(T) == 2 ? 2 : 1;
    for (Index t = begin; t < end; ++t) {
      const T* p = static_cast<const T*>(values(head)) + layout_.value_offset(t, 0);
      const float scale = memory_scales_ ? value_scales(head)[t] : 1;
      for (Index e = 0; e < layout_.dv; ++e) sum[e] += widen(p[pair * e]) * scale;
    }
  });
}

void KeyValues::add_panel(Index head, Index panel, float* sum) const {
  with_stored(layout_.dtype, [&]<class T>(const T*) {
    constexpr Index pair = sizeof(T) == 2 ? 2 : 1;
    const float* scale = memory_scales_ ? key_scales(head) + panel * panel_columns : nullptr;
    for (Index f = 0; f < layout_.d; ++f) {
      const T* in = static_cast<const T*>(keys(head)) + layout_.key_offset(panel * panel_columns, f);
      float* out = sum + f * panel_columns;
      for (Index c = 0; c < panel_columns; ++c)
        out[c] += sizeof(T) == 1 ? widen(in[c]) * scale[c] : widen(in[pair * c]);
    }
  });
}

void KeyValues::bound_keys(Index head, Index begin, Index end, float* most, float* least) const {
  constexpr float infinity = std::numeric_limits<float>::infinity();
  fold_columns(layout_, keys(head), key_scales(head), begin, end, -infinity, most, larger_of);
  fold_columns(layout_, keys(head), key_scales(head), begin, end, infinity, least, smaller_of);
}

// Calls fill(head, block) for every block that became complete, after making room for `width` values of each block.
template <class Blocks, class Fill>
void KeyValues::complete_blocks(Index block, Index width, Blocks& blocks, std::vector<float>& values, Fill fill) const {
  if (blocks.block == 0) {
    blocks.block = block;
    blocks.capacity = round_up(capacity_ / block, panel_columns);
    values.assign(static_cast<size_t>(heads_ * blocks.capacity * width), 0);
  }
  const Index complete = size_ / block, fresh = complete - blocks.complete;
  if (fresh > 0)
    parallel_for(heads_ * fresh, [&](Index unit, int) { fill(unit / fresh, blocks.complete + unit % fresh); });
  blocks.complete = complete;
}

const BlockMeans& KeyValues::block_means(Index block) const {
  BlockMeans& m = means_[block];
  const Index d = layout_.d;
  complete_blocks(block, d, m, m.panels, [&](Index head, Index b) {
    Scratch& scratch = thread_scratch();
    const Scratch::Mark mark(scratch);
    float* sum = scratch.take<float>(d).data();
    std::fill_n(sum, d, 0.0f);
    sum_keys(head, b * block, (b + 1) * block, sum);
    float* column = m.panels.data() + (head * m.capacity + b / panel_columns * panel_columns) * d + b % panel_columns;
    for (Index f = 0; f < d; ++f) column[f * panel_columns] = sum[f] / static_cast<float>(block);
  });
  return m;
}

const BlockBounds& KeyValues::block_bounds(Index block) const {
  BlockBounds& s = bounds_[block];
  const Index d = layout_.d;
  complete_blocks(block, 2 * d, s, s.bounds, [&](Index head, Index b) {
    float* bounds = s.bounds.data() + (head * s.capacity + b) * 2 * d;
    std::fill_n(bounds, d, -std::numeric_limits<float>::infinity());
    std::fill_n(bounds + d, d, std::numeric_limits<float>::infinity());
    bound_keys(head, b * block, (b + 1) * block, bounds, bounds + d);
  });
  return s;
}

namespace {

// Columns [from, to) of one panel as rows of dp numbers of type Row; `scale`: of each column, or null.
template <class Row, class Stored>
void unpack_panel(const Stored* panel, const float* scale, Index from, Index to, Index dp, Row* rows) {
  constexpr Index pair = sizeof(Stored) == 2 ? 2 : 1;
  for (Index c = from; c < to; ++c, rows += dp)
    for (Index f = 0; f < dp; f += pair)
      for (Index i = 0; i < pair; ++i) {
        const Stored x = panel[f * panel_columns + c * pair + i];
        if constexpr (sizeof(Row) == 2) rows[f + i] = x;
        else rows[f + i] = scale == nullptr ? widen(x) : widen(x) * scale[c];
      }
}

}  // namespace

KeyRows KeyValues::key_rows() const {
  const Index row_bytes = layout_.dp * size_of(layout_.product);
  if (!memory_rows_) {
    const Index bytes = std::max<Index>(1, heads_ * capacity_ * row_bytes);
    memory_rows_ = {reserve(bytes), Free{bytes}};
  }
  const KeyRows rows{memory_rows_.get(), row_bytes, capacity_};
  const Index first_panel = rows_complete_ / panel_columns;
  const Index panels = rows_complete_ < size_ ? ceil_div(size_, panel_columns) - first_panel : 0;
  parallel_for(heads_ * panels, [&](Index unit, int) {
    const Index head = unit / panels, panel = first_panel + unit % panels, start = panel * panel_columns;
    const Index from = std::max(rows_complete_, start) - start, to = std::min(size_ - start, panel_columns);
    auto* out = const_cast<std::byte*>(rows.row(head, start + from));
    with_stored(layout_.dtype, [&]<class T>(const T*) {
      const T* in = static_cast<const T*>(keys(head)) + panel * layout_.panel_elements();
      const float* scale = memory_scales_ ? key_scales(head) + start : nullptr;
      if constexpr (sizeof(T) == 2)
        if (layout_.product == DType::bf16)
          return unpack_panel(in, scale, from, to, layout_.dp, reinterpret_cast<bf16*>(out));
      unpack_panel(in, scale, from, to, layout_.dp, reinterpret_cast<float*>(out));
    });
  });
  rows_complete_ = size_;
  return rows;
}

KeyValues pack_keys(const TensorView& k, DType stored) {
  const size_t axis = k.shape.size() - 2;
  KeyValues packed(axis == 1 ? k.shape[0] : k.shape[0] * k.shape[1], k.shape[axis + 1], 0, k.shape[axis], stored);
  TensorView none = k;
  none.shape[axis + 1] = 0;
  packed.append(k, none);
  return packed;
}

}  // namespace heed
