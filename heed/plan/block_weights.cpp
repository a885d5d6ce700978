#include "heed/plan/block_weights.h"

#include <algorithm>

#include "heed/kernel/kernels.h"

namespace heed {
namespace {

// Scores of a few rows at once: queries, scores and a panel of keys stay in the second-level cache.
constexpr Index rows_at_once = 64, columns_at_once = 8 * panel_columns;

/// Calls visit(row, first, scores, count) with every piece of every row, columns ascending; pieces end at
/// multiples of columns_at_once. Products only, not scaled.
template <class Visit>
void stream_products(const ScoreMap& map, Index row, Index rows, Visit visit) {
  const PanelLayout& layout = map.layout;
  const Index row_bytes = layout.dp * size_of(layout.product);
  Scratch& scratch = thread_scratch();
  const Scratch::Mark mark(scratch);
  std::byte* const q = scratch.take<std::byte>(rows_at_once * row_bytes).data();
  float* const scores = scratch.take<float>(rows_at_once * columns_at_once).data();
  for (Index r0 = 0; r0 < rows; r0 += rows_at_once) {
    const Index count = std::min(rows_at_once, rows - r0);
    for (Index i = 0; i < count; ++i)
      map.queries->read_packed(layout, map.b, map.head, map.tokens[static_cast<size_t>(row + r0 + i)],
                               q + i * row_bytes);
    for (Index first = 0; first < map.columns; first += columns_at_once) {
      const Index width = std::min(columns_at_once, map.columns - first);
      multiply_keys({layout, map.keys}, first, width, q, count, scores, columns_at_once);
      for (Index i = 0; i < count; ++i) visit(row + r0 + i, first, scores + i * columns_at_once, width);
    }
  }
}

}  // namespace

void row_lse(const ScoreMap& map, Index row, Index rows, float* lse) {
  Scratch& scratch = thread_scratch();
  const Scratch::Mark mark(scratch);
  // Pieces of different rows come in turn.
  const auto state = scratch.take<BlockWeight>(rows);
  std::fill(state.begin(), state.end(), BlockWeight{});
  stream_products(map, row, rows, [&](Index r, Index, float* scores, Index count) {
    for (Index j = 0; j < count; ++j) scores[j] *= map.scale;
    BlockWeight& s = state[static_cast<size_t>(r - row)];
    kernels().log_sum_exp(scores, count, s.log_most, s.sum);
  });
  for (Index i = 0; i < rows; ++i) {
    const BlockWeight& s = state[static_cast<size_t>(i)];
    lse[map.tokens[static_cast<size_t>(row + i)]] = s.log_most + std::log(s.sum);
  }
}

void block_weights(const ScoreMap& map, Index row, Index rows, const float* lse, Index first, Index block,
                   double threshold, std::span<BlockWeight> out) {
  std::fill(out.begin(), out.end(), BlockWeight{});
  const auto log_threshold = static_cast<float>(std::log(threshold));
  stream_products(map, row, rows, [&](Index r, Index begin, float* scores, Index count) {
    const float minus_lse = -lse[map.tokens[static_cast<size_t>(r)]];
    for (Index at = std::max(begin, first); at < begin + count;) {
      const Index b = (at - first) / block, end = std::min(begin + count, first + (b + 1) * block);
      float* const p = scores + (at - begin);
      const Index pairs = end - at;
      std::int32_t below = 0;
      for (Index j = 0; j < pairs; ++j) {
        p[j] = p[j] * map.scale + minus_lse;
        below += p[j] < log_threshold ? 1 : 0;
      }
      BlockWeight& weight = out[static_cast<size_t>(b)];
      kernels().log_sum_exp(p, pairs, weight.log_most, weight.sum);
      weight.below += below;
      at = end;
    }
  });
}

}  // namespace heed
