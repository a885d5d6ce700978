#include "heed/plan/sampled.h"

#include <algorithm>
#include <cstring>
#include <limits>

#include "heed/kernel/kernels.h"

namespace heed {
namespace {

// Keys gathered for one product: their rows stay in the second-level cache.
constexpr Index keys_at_once = 192;
constexpr Index lanes = 16;

// The largest of n numbers, n a multiple of 16.
float largest(const float* x, Index n) {
  float best[lanes];
  std::copy_n(x, lanes, best);
  for (Index i = lanes; i < n; i += lanes)
    for (Index l = 0; l < lanes; ++l) best[l] = x[i + l] > best[l] ? x[i + l] : best[l];
  return *std::max_element(best, best + lanes);
}

}  // namespace

SampledQueries::SampledQueries(const Queries& queries, const RowBlock& rows, Index stride, const PanelLayout& layout,
                               Scratch& scratch)
    : layout_(layout), scratch_(scratch) {
  positions_ = scratch.take<std::int32_t>(ceil_div(rows.rows, stride));
  padded_ = round_up(static_cast<Index>(positions_.size()), lanes);
  const Index panels = ceil_div(padded_, panel_columns), d = layout.d;
  auto* packed = scratch.take<std::byte>(panels * layout.panel_elements() * size_of(layout.product)).data();
  panels_ = packed;
  const Scratch::Mark mark(scratch);
  float* q = scratch.take<float>(padded_ * d).data();
  for (size_t i = 0; i < positions_.size(); ++i) {
    const Index row = std::min((static_cast<Index>(i) + 1) * stride, rows.rows) - 1;
    positions_[i] = static_cast<std::int32_t>(rows.position(row));
    queries.read(rows.b, rows.head, rows.token(row), q + static_cast<Index>(i) * d);
  }
  for (Index i = static_cast<Index>(positions_.size()); i < padded_; ++i) std::copy_n(q + (i - 1) * d, d, q + i * d);
  for (Index p = 0; p < panels; ++p) {
    const Index columns = std::min(panel_columns, padded_ - p * panel_columns);
    const float* x = q + p * panel_columns * d;
    if (layout.product == DType::bf16)
      kernels().pack_keys_bf16(x, d, columns, d, layout.dp,
                               reinterpret_cast<bf16*>(packed) + p * layout.panel_elements());
    else
      kernels().pack_keys_f32(x, d, columns, d, layout.dp,
                              reinterpret_cast<float*>(packed) + p * layout.panel_elements());
  }
}

void SampledQueries::score(const KeyRows& keys, Index head, const KeyBlocks& geometry,
                           std::span<const std::int32_t> blocks, Index distance, float* scores) const {
  const Scratch::Mark mark(scratch_);
  auto* rows = scratch_.take<std::byte>(keys_at_once * keys.row_bytes).data();
  float* products = scratch_.take<float>(keys_at_once * padded_).data();
  const auto tokens = scratch_.take<std::int32_t>(keys_at_once), owners = scratch_.take<std::int32_t>(keys_at_once);
  std::fill_n(scores, blocks.size(), -std::numeric_limits<float>::infinity());

  Index held = 0;
  const auto flush = [&] {
    if (layout_.product == DType::bf16)
      kernels().gemm_bf16(held, padded_, layout_.dp, reinterpret_cast<const bf16*>(rows), layout_.dp,
                          static_cast<const bf16*>(panels_), products, padded_, false);
    else
      kernels().gemm_f32(held, padded_, layout_.dp, reinterpret_cast<const float*>(rows), layout_.dp,
                         static_cast<const float*>(panels_), products, padded_, false);
    for (Index i = 0; i < held; ++i) {
      const float* row = products + i * padded_;
      const Index nearest = tokens[static_cast<size_t>(i)] + distance;  // the first query that may meet this key
      float best = scores[owners[static_cast<size_t>(i)]];
      if (positions_.front() >= nearest) {
        best = std::max(best, largest(row, padded_));
      } else {
        for (size_t s = positions_.size(); s > 0 && positions_[s - 1] >= nearest; --s)
          best = std::max(best, row[s - 1]);
      }
      scores[owners[static_cast<size_t>(i)]] = best;
    }
    held = 0;
  };
  // Blocks lie far apart, so their first keys are asked for some blocks ahead.
  constexpr size_t ahead = 12;
  const Index line = 64, bytes = std::min<Index>(geometry.size * keys.row_bytes, 8 * line);
  for (size_t i = 0; i < blocks.size(); ++i) {
    if (i + ahead < blocks.size()) {
      const std::byte* next = keys.row(head, geometry.begin + blocks[i + ahead] * geometry.size);
      for (Index at = 0; at < bytes; at += line) __builtin_prefetch(next + at);
    }
    const Index first = geometry.begin + blocks[i] * geometry.size, end = std::min(first + geometry.size, geometry.end);
    for (Index token = first, run; token < end; token += run * geometry.stride) {
      // Neighbours are fetched together.
      run = geometry.stride == 1 ? std::min(end - token, keys_at_once - held) : 1;
      std::memcpy(rows + held * keys.row_bytes, keys.row(head, token), static_cast<size_t>(run * keys.row_bytes));
      for (Index r = 0; r < run; ++r, ++held) {
        tokens[static_cast<size_t>(held)] = static_cast<std::int32_t>(token + r);
        owners[static_cast<size_t>(held)] = static_cast<std::int32_t>(i);
      }
      if (held == keys_at_once) flush();
    }
  }
  flush();
}

}  // namespace heed
