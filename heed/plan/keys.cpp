#include "heed/plan/keys.h"

#include <sys/mman.h>

#include <algorithm>
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

}  // namespace

void KeyValues::Free::operator()(std::byte* p) const { munmap(p, static_cast<size_t>(bytes)); }

KeyValues::KeyValues(Index heads, Index d, Index dv, Index capacity, DType arithmetic)
    : heads_(heads), capacity_(capacity), arithmetic_(arithmetic), layout_(panel_layout(arithmetic, d, dv)) {
  const Index element = size_of(layout_.dtype), rows = round_up(std::max<Index>(capacity, 1), panel_columns);
  head_bytes_k_ = layout_.key_elements(rows) * element;
  head_bytes_v_ = layout_.value_elements(rows) * element;
  const Index k = std::max<Index>(1, heads * head_bytes_k_), v = std::max<Index>(1, heads * head_bytes_v_);
  memory_k_ = {reserve(k), Free{k}};
  memory_v_ = {reserve(v), Free{v}};
}

Index KeyValues::bytes() const {
  Index sum = heads_ * (layout_.key_elements(size_) + layout_.value_elements(size_)) * size_of(layout_.dtype);
  for (const auto& [block, means] : means_) sum += static_cast<Index>(means.panels.size() * sizeof(float));
  for (const auto& [block, bounds] : bounds_) sum += static_cast<Index>(bounds.bounds.size() * sizeof(float));
  return sum + heads_ * rows_complete_ * layout_.dp * size_of(layout_.dtype);
}

const void* KeyValues::keys(Index head) const { return memory_k_.get() + head * head_bytes_k_; }
const void* KeyValues::values(Index head) const { return memory_v_.get() + head * head_bytes_v_; }

void KeyValues::append(const TensorView& k, const TensorView& v) {
  const size_t axis = k.shape.size() - 2;  // of tokens
  const Index n = k.shape.at(axis), begin = size_, end = size_ + n;
  if (end > capacity_) fail("tokens = {}, expected at most {} (the capacity of the key-value cache)", end, capacity_);
  if (begin == 0 && end == capacity_ && n > 0) {  // not a cache that grows
    ask_for_large_pages(memory_k_.get(), heads_ * head_bytes_k_);
    ask_for_large_pages(memory_v_.get(), heads_ * head_bytes_v_);
  }
  const bool paired = layout_.dtype == DType::bf16, rounded = arithmetic_ == DType::bf16;
  const Kernels& kernel = kernels();
  const Index first_panel = begin / panel_columns, panels = n == 0 ? 0 : ceil_div(end, panel_columns) - first_panel;

  parallel_for(heads_ * panels, [&](Index unit, int) {
    const Index head = unit / panels, panel = first_panel + unit % panels;
    const Index from = std::max(begin, panel * panel_columns), to = std::min(end, (panel + 1) * panel_columns);
    Scratch& scratch = thread_scratch();
    const Scratch::Mark mark(scratch);
    const Index d = layout_.d, dv = layout_.dv, dvp = layout_.dvp;
    float* rows = scratch.take<float>(panel_columns * std::max(d, dv)).data();
    auto* keys = memory_k_.get() + head * head_bytes_k_;
    auto* values = memory_v_.get() + head * head_bytes_v_;

    const auto fetch = [&](const TensorView& x, Index width) {
      for (Index t = from; t < to; ++t) {
        float* row = rows + (t - from) * width;
        const void* from_row =
            axis == 1 ? x.at({head, t - begin}) : x.at({head / x.shape[1], head % x.shape[1], t - begin});
        read_f32(from_row, x.dtype, x.stride[axis + 1], width, row);
        if (rounded && !paired)
          for (Index i = 0; i < width; ++i) row[i] = round_to_bf16(row[i]);
      }
    };

    fetch(k, d);
    if (from % panel_columns == 0) {  // a fresh panel, padding included
      const Index offset = panel * layout_.panel_elements();
      if (paired) kernel.pack_keys_bf16(rows, d, to - from, d, layout_.dp, reinterpret_cast<bf16*>(keys) + offset);
      else kernel.pack_keys_f32(rows, d, to - from, d, layout_.dp, reinterpret_cast<float*>(keys) + offset);
    } else {
      for (Index t = from; t < to; ++t)
        for (Index i = 0; i < d; ++i) {
          const float x = rows[(t - from) * d + i];
          if (paired) reinterpret_cast<bf16*>(keys)[layout_.key_offset(t, i)] = to_bf16(x);
          else reinterpret_cast<float*>(keys)[layout_.key_offset(t, i)] = x;
        }
    }
    fetch(v, dv);
    for (Index t = from; t < to; ++t) {
      const float* row = rows + (t - from) * dv;
      if (paired) {
        bf16* out = reinterpret_cast<bf16*>(values) + t / 2 * dvp * 2 + t % 2;
        for (Index e = 0; e < dv; ++e) out[2 * e] = to_bf16(row[e]);
      } else {
        std::copy(row, row + dv, reinterpret_cast<float*>(values) + t * dvp);
      }
    }
  });
  size_ = end;
}

void KeyValues::truncate(Index size) {
  size_ = std::min(size_, std::max<Index>(size, 0));
  for (auto& [block, means] : means_) means.complete = std::min(means.complete, size_ / block);
  for (auto& [block, bounds] : bounds_) bounds.complete = std::min(bounds.complete, size_ / block);
  rows_complete_ = std::min(rows_complete_, size_);
}

void KeyValues::read_key(Index head, Index token, float* out) const {
  const Index at = layout_.key_offset(token, 0);
  if (layout_.dtype == DType::f32) {
    const float* key = static_cast<const float*>(keys(head)) + at;
    for (Index f = 0; f < layout_.d; ++f) out[f] = key[f * panel_columns];
  } else {
    const bf16* key = static_cast<const bf16*>(keys(head)) + at;
    for (Index f = 0; f < layout_.d; ++f) out[f] = to_f32(key[f / 2 * 2 * panel_columns + f % 2]);
  }
}

void KeyValues::read_value(Index head, Index token, float* out) const {
  for (Index e = 0; e < layout_.dv; ++e) {
    const Index at = layout_.value_offset(token, e);
    out[e] = layout_.dtype == DType::f32 ? static_cast<const float*>(values(head))[at]
                                         : to_f32(static_cast<const bf16*>(values(head))[at]);
  }
}

namespace {

float widen(float x) { return x; }
float widen(bf16 x) { return to_f32(x); }

// Folds n numbers, `step` apart, in eight chains, which a compiler keeps in vectors.
template <Index step, class T, class Fold>
float fold_run(const T* x, Index n, float start, Fold fold) {
  constexpr Index chains = 8;
  float partial[chains];
  std::fill_n(partial, chains, start);
  Index c = 0;
  for (; c + chains <= n; c += chains)
    for (Index i = 0; i < chains; ++i) partial[i] = fold(partial[i], widen(x[(c + i) * step]));
  for (Index width = chains / 2; width > 0; width /= 2)
    for (Index i = 0; i < width; ++i) partial[i] = fold(partial[i], partial[i + width]);
  for (; c < n; ++c) partial[0] = fold(partial[0], widen(x[c * step]));
  return partial[0];
}

// The columns of a feature lie side by side (every other one in bf16): each panel's are folded first.
template <class Fold>
void fold_columns(const PanelLayout& layout, const void* keys, Index begin, Index end, float start, float* out,
                  Fold fold) {
  for (Index from = begin; from < end;) {
    const Index to = std::min(end, round_up(from + 1, panel_columns)), count = to - from;
    for (Index i = 0; i < layout.d; ++i) {
      const Index at = layout.key_offset(from, i);
      out[i] = fold(out[i], layout.dtype == DType::f32
                                ? fold_run<1>(static_cast<const float*>(keys) + at, count, start, fold)
                                : fold_run<2>(static_cast<const bf16*>(keys) + at, count, start, fold));
    }
    from = to;
  }
}

}  // namespace

void sum_columns(const PanelLayout& layout, const void* keys, Index begin, Index end, float* out) {
  fold_columns(layout, keys, begin, end, 0, out, [](float a, float b) { return a + b; });
}

void max_columns(const PanelLayout& layout, const void* keys, Index begin, Index end, float* out) {
  fold_columns(layout, keys, begin, end, -std::numeric_limits<float>::infinity(), out,
               [](float a, float b) { return a < b ? b : a; });
}

void KeyValues::sum_keys(Index head, Index begin, Index end, float* sum) const {
  sum_columns(layout_, keys(head), begin, end, sum);
}

void KeyValues::sum_values(Index head, Index begin, Index end, float* sum) const {
  for (Index t = begin; t < end; ++t) {
    const Index at = layout_.value_offset(t, 0), dv = layout_.dv;
    if (layout_.dtype == DType::f32) {
      const float* p = static_cast<const float*>(values(head)) + at;
      for (Index e = 0; e < dv; ++e) sum[e] += p[e];
    } else {
      const bf16* p = static_cast<const bf16*>(values(head)) + at;
      for (Index e = 0; e < dv; ++e) sum[e] += to_f32(p[2 * e]);
    }
  }
}

void KeyValues::bound_keys(Index head, Index begin, Index end, float* most, float* least) const {
  max_columns(layout_, keys(head), begin, end, most);
  fold_columns(layout_, keys(head), begin, end, std::numeric_limits<float>::infinity(), least,
               [](float a, float b) { return a < b ? a : b; });
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

// Columns [from, to) of one panel as rows of dp elements; `pair` features lie side by side.
template <class T, Index pair>
void unpack_panel(const T* panel, Index from, Index to, Index dp, T* rows) {
  for (Index c = from; c < to; ++c, rows += dp)
    for (Index f = 0; f < dp; f += pair)
      for (Index i = 0; i < pair; ++i) rows[f + i] = panel[f * panel_columns + c * pair + i];
}

}  // namespace

KeyRows KeyValues::key_rows() const {
  const Index row_bytes = layout_.dp * size_of(layout_.dtype);
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
    if (layout_.dtype == DType::f32)
      unpack_panel<float, 1>(static_cast<const float*>(keys(head)) + panel * layout_.panel_elements(), from, to,
                             layout_.dp, reinterpret_cast<float*>(out));
    else
      unpack_panel<bf16, 2>(static_cast<const bf16*>(keys(head)) + panel * layout_.panel_elements(), from, to,
                            layout_.dp, reinterpret_cast<bf16*>(out));
  });
  rows_complete_ = size_;
  return rows;
}

KeyValues pack_keys(const TensorView& k, DType arithmetic) {
  const size_t axis = k.shape.size() - 2;
  KeyValues packed(axis == 1 ? k.shape[0] : k.shape[0] * k.shape[1], k.shape[axis + 1], 0, k.shape[axis], arithmetic);
  TensorView none = k;
  none.shape[axis + 1] = 0;
  packed.append(k, none);
  return packed;
}

}  // namespace heed
