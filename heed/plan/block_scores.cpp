#include "heed/plan/block_scores.h"

#include <algorithm>
#include <limits>

#include "heed/base/threads.h"

namespace heed {
namespace {

constexpr Index lanes = 16;  // what kernels may read and write beyond the last block
// Rows that meet a panel while it is in cache. Multiples of 12 fill every instruction set's register tile.
constexpr Index most_rows = 48, least_rows = 12;
// What the rows' blocks may take of the second-level cache and of memory.
constexpr Index row_state = Index{1} << 17;  // floats
constexpr float log2_e = 1.44269504f;

}  // namespace

ScoreKeys ScoreKeys::of(const KeyValues& kv, Index head) {
  return {{kv.layout(), kv.keys(head), kv.key_scales(head)}, kv.size()};
}

void BlockScores::weigh(const float* q, Index rows, const std::int32_t* ends, float* largest, float* mass,
                        Scratch& scratch) const {
  const Kernels& kernel = kernels();
  const Scratch::Mark mark(scratch);
  const auto end_of = [&](Index i) { return ends == nullptr ? keys.columns : std::min<Index>(ends[i], keys.columns); };
  Index end = 0;
  for (Index i = 0; i < rows; ++i) end = std::max(end, end_of(i));
  const Index count = round_up(blocks(end), lanes), ldc = chunk_columns + lanes;
  const PanelLayout& layout = keys.packed.layout;
  const bool single = block == 1;
  const Index at_once =
      std::clamp(row_state / std::max<Index>(1, count) / least_rows * least_rows, least_rows, most_rows);

  const Index row_bytes = layout.dp * size_of(layout.product);
  const auto* packed = reinterpret_cast<const std::byte*>(q);
  if (layout.product == DType::bf16 || layout.dp != layout.d) {
    auto* rows_padded = scratch.take<std::byte>(rows * row_bytes).data();
    std::fill_n(rows_padded, rows * row_bytes, std::byte{});
    for (Index i = 0; i < rows; ++i) {
      std::byte* row = rows_padded + i * row_bytes;
      if (layout.product == DType::bf16) kernel.round_bf16(q + i * layout.d, layout.d, reinterpret_cast<bf16*>(row));
      else std::copy_n(q + i * layout.d, layout.d, reinterpret_cast<float*>(row));
    }
    packed = rows_padded;
  }
  float* scores = scratch.take<float>(most_rows * ldc).data();
  float* maximum = scratch.take<float>(at_once * count).data();
  float* sum = single ? nullptr : scratch.take<float>(at_once * count).data();

  for (Index row = 0; row < rows; row += at_once) {
    const Index some = std::min(at_once, rows - row);
    Index some_end = 0;
    for (Index i = 0; i < some; ++i) some_end = std::max(some_end, end_of(row + i));
    std::fill_n(maximum, some * count, -std::numeric_limits<float>::infinity());
    if (!single) std::fill_n(sum, some * count, 0.0f);
    for (Index begin = 0; begin < some_end; begin += chunk_columns) {
      const Index columns = std::min(chunk_columns, some_end - begin), panel = begin / panel_columns * panel_columns;
      multiply_keys(keys.packed, panel, columns, packed + row * row_bytes, some, scores, ldc);
      for (Index i = 0; i < some; ++i)
        if (const Index seen = std::min(columns, end_of(row + i) - begin); seen > 0)
          kernel.fold_blocks(scores + i * ldc, seen, begin, block, scale * log2_e, maximum + i * count,
                             single ? nullptr : sum + i * count);
    }
    for (Index i = 0; i < some; ++i)
      kernel.weigh_blocks(maximum + i * count, single ? nullptr : sum + i * count,
                          round_up(blocks(end_of(row + i)), lanes), largest,
                          mass == nullptr ? nullptr : mass + (row + i) * mass_stride);
  }
}

void BlockScores::weigh(const Queries& queries, const RowBlock& rows, Index stride, bool causal, float* largest,
                        float* mass, Scratch& scratch) const {
  const Scratch::Mark mark(scratch);
  const Index count = ceil_div(rows.rows, stride), d = keys.packed.layout.d;
  float* q = scratch.take<float>(count * d).data();
  std::int32_t* ends = scratch.take<std::int32_t>(count).data();
  for (Index i = 0; i < count; ++i) {
    queries.read(rows.b, rows.head, rows.token(i * stride), q + i * d);
    ends[i] = static_cast<std::int32_t>(rows.position(i * stride) + 1);
  }
  weigh(q, count, causal ? ends : nullptr, largest, mass, scratch);
}

void block_targets(const BlockScores& scores, const Queries& queries, const RowBlock& rows, float* targets,
                   Scratch& scratch) {
  const Index count = scores.blocks(rows.position(rows.rows - 1) + 1);
  std::fill_n(targets, round_up(count, lanes), 0.0f);
  scores.weigh(queries, rows, 1, true, targets, nullptr, scratch);
  double sum = 0;
  for (Index b = 0; b < count; ++b) sum += static_cast<double>(targets[b]);
  for (Index b = 0; b < count; ++b) targets[b] = static_cast<float>(static_cast<double>(targets[b]) / sum);
}

std::vector<float> mean_head_panels(const KeyValues& kv, Index first, Index heads) {
  const Index d = kv.layout().d, panels = ceil_div(kv.size(), panel_columns);
  std::vector<float> mean(static_cast<size_t>(panels * d * panel_columns));
  parallel_for(panels, [&](Index panel, int) {
    float* out = mean.data() + panel * d * panel_columns;
    for (Index head = first; head < first + heads; ++head) kv.add_panel(head, panel, out);
    for (Index i = 0; i < d * panel_columns; ++i) out[i] /= static_cast<float>(heads);
  });
  return mean;
}

}  // namespace heed
