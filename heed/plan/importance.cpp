#include "heed/plan/importance.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numbers>

#include "heed/base/threads.h"
#include "heed/kernel/kernels.h"

namespace heed {
namespace {

constexpr float infinity = std::numeric_limits<float>::infinity();
// Rows that share a pass over the packed keys: as many as fill the kernels' rows of six, while their scores stay in
// cache.
constexpr Index rows_at_once = 48;
constexpr Index kernel_lanes = 16;  // what kernels read or write beyond a row at most

// Packs `columns` vectors of `width` features per head; read(head, column, row) writes one into a row of zeros.
template <class Read>
std::vector<std::vector<float>> pack_columns(Index heads, Index columns, Index width, Read read) {
  const Index panels = ceil_div(columns, panel_columns);
  std::vector<std::vector<float>> packed(static_cast<size_t>(heads));
  for (auto& head : packed) head.resize(static_cast<size_t>(panels * panel_columns * width));
  parallel_for(heads * panels, [&](Index unit, int) {
    const Index head = unit / panels, first = unit % panels * panel_columns;
    const Index count = std::min(panel_columns, columns - first);
    Scratch& scratch = thread_scratch();
    const Scratch::Mark mark(scratch);
    float* rows = scratch.take<float>(count * width).data();
    std::fill_n(rows, count * width, 0.0f);
    for (Index c = 0; c < count; ++c) read(head, first + c, rows + c * width);
    kernels().pack_keys_f32(rows, width, count, width, width, packed[static_cast<size_t>(head)].data() + first * width);
  });
  return packed;
}

}  // namespace

SampledKeys::SampledKeys(const KeyValues& kv, Index tokens, Index block, Index stride)
    : d_(kv.layout().d), blocks_(ceil_div(tokens, block)), stride_(stride) {
  columns_ = blocks_ * ceil_div(std::min(block, tokens), stride);
  panels_ = pack_columns(kv.heads(), columns_, d_, [&](Index head, Index column, float* row) {
    // A last block that lacks the offset has its first key once more, which changes no maximum.
    const Index first = column % blocks_ * block, token = first + column / blocks_ * stride;
    kv.read_key(head, token < tokens ? token : first, row);
  });
}

void SampledKeys::score(const Queries& queries, const RowBlock& rows, Index kv_head, const Importance& to,
                        Scratch& scratch) const {
  constexpr Index columns_at_once = 16 * panel_columns;
  const Scratch::Mark mark(scratch);
  float* q = scratch.take<float>(rows_at_once * d_).data();
  float* scores = scratch.take<float>(rows_at_once * columns_at_once).data();
  float* best = scratch.take<float>(rows_at_once * blocks_).data();
  const Index per_block = ceil_div(to.query_block, stride_);
  const auto rank_of = [&](Index i) { return i / per_block * to.query_block + i % per_block * stride_; };
  for (Index u = 0; u < ceil_div(rows.rows, to.query_block); ++u)
    std::fill_n(to.out + u * to.stride, blocks_, -infinity);
  for (Index first = 0; rank_of(first) < rows.rows; first += rows_at_once) {
    Index count = 0;
    for (; count < rows_at_once && rank_of(first + count) < rows.rows; ++count)
      queries.read(rows.b, rows.head, rows.token(rank_of(first + count)), q + count * d_);
    for (Index i = 0; i < count * d_; ++i) q[i] *= to.scale;
    std::fill_n(best, count * blocks_, -infinity);
    for (Index from = 0; from < columns_; from += columns_at_once) {
      const Index width = std::min(columns_at_once, columns_ - from);
      kernels().gemm_f32(count, width, d_, q, d_, panels_[static_cast<size_t>(kv_head)].data() + from * d_, scores,
                         columns_at_once, false);
      for (Index i = 0; i < count; ++i)
        for (Index c = 0, run; c < width; c += run) {  // one offset of neighbouring blocks
          const Index b = (from + c) % blocks_;
          run = std::min(blocks_ - b, width - c);
          const float* x = scores + i * columns_at_once + c;
          float* y = best + i * blocks_ + b;
          for (Index r = 0; r < run; ++r) y[r] = x[r] > y[r] ? x[r] : y[r];
        }
    }
    for (Index i = 0; i < count; ++i) {
      const float* row = best + i * blocks_;
      float* out = to.out + (first + i) / per_block * to.stride;
      const float top = *std::max_element(row, row + blocks_);
      for (Index b = 0; b < blocks_; ++b) out[b] = std::max(out[b], row[b] - top);
    }
  }
}

FoldedKeys::FoldedKeys(const KeyValues& kv, Index tokens, Index fold)
    : tokens_(tokens), d_(kv.layout().d), fold_(fold) {
  panels_ = pack_columns(kv.heads(), ceil_div(tokens, fold), fold * d_, [&](Index head, Index column, float* row) {
    for (Index t = 0; t < std::min(fold, tokens - column * fold); ++t)
      kv.read_key(head, column * fold + t, row + t * d_);
  });
}

void FoldedKeys::score(const Queries& queries, const RowBlock& rows, Index kv_head, const Importance& to,
                       Scratch& scratch) const {
  const Scratch::Mark mark(scratch);
  const Index width = fold_ * d_, begin = rows.first / fold_, end = ceil_div(rows.first + rows.rows, fold_);
  const Index stride = round_up(end, panel_columns), block = to.block / fold_, query_block = to.query_block / fold_;
  float* q = scratch.take<float>(rows_at_once * width).data();
  float* scores = scratch.take<float>(rows_at_once * stride + kernel_lanes).data();
  const Index blocks = ceil_div(end, block), padded = round_up(blocks, kernel_lanes);
  const Index query_blocks = ceil_div(end - begin, query_block);
  float *maximum = scratch.take<float>(padded).data(), *sum = scratch.take<float>(padded).data();
  float* mass = scratch.take<float>(query_blocks * padded).data();
  std::fill_n(mass, query_blocks * padded, 0.0f);
  for (Index first = begin; first < end; first += rows_at_once) {
    const Index count = std::min(rows_at_once, end - first);
    std::fill_n(q, count * width, 0.0f);
    for (Index i = 0; i < count; ++i)
      for (Index t = 0; t < fold_; ++t) {
        const Index token = (first + i + 1) * fold_ - 1 - t;
        if (token < tokens_) queries.read(rows.b, rows.head, token, q + i * width + t * d_);
      }
    for (Index i = 0; i < count * width; ++i) q[i] *= to.scale / static_cast<float>(fold_);
    kernels().gemm_f32(count, first + count, width, q, width, panels_[static_cast<size_t>(kv_head)].data(), scores,
                       stride, false);
    for (Index i = 0; i < count; ++i) {
      std::fill_n(maximum, padded, -infinity), std::fill_n(sum, padded, 0.0f);
      float* sums = block == 1 ? nullptr : sum;
      kernels().fold_blocks(scores + i * stride, first + i + 1, 0, block, std::numbers::log2e_v<float>, maximum, sums);
      kernels().weigh_blocks(maximum, sums, padded, nullptr, mass + (first + i - begin) / query_block * padded);
    }
  }
  for (Index u = 0; u < query_blocks; ++u) std::copy_n(mass + u * padded, blocks, to.out + u * to.stride);
}

}  // namespace heed
