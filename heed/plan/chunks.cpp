#include "heed/plan/chunks.h"

#include <numeric>

#include "heed/base/threads.h"
#include "heed/kernel/kernels.h"

namespace heed {

std::vector<BlockRange> cut_at_peaks(std::span<const float> scores, const PeakRule& rule) {
  const Index n = static_cast<Index>(scores.size());
  std::vector<char> ends(scores.size(), 0);
  const bool in_order = rule.per > 0;
  Index accepted = 0, limit = n - rule.margin;
  if (rule.forced >= 0 && rule.forced < n) {
    ends[static_cast<size_t>(rule.forced)] = 1, accepted = in_order ? 0 : 1;  // in order, it comes last
    limit = std::min(limit, rule.forced);
  }
  std::vector<Index> candidates;
  for (Index i = std::max<Index>(0, rule.margin - 1); i < limit; ++i)
    if (scores[static_cast<size_t>(i)] > rule.threshold) candidates.push_back(i);
  if (!in_order)
    std::stable_sort(candidates.begin(), candidates.end(),
                     [&](Index i, Index j) { return scores[static_cast<size_t>(i)] > scores[static_cast<size_t>(j)]; });
  for (const Index i : candidates) {
    if (accepted >= (in_order ? rule.most * (i + 1) / rule.per : rule.most)) continue;
    const auto from = ends.begin() + std::max<Index>(0, i - rule.radius),
               to = ends.begin() + std::min(n, i + rule.radius + 1);
    if (std::find(from, to, 1) != to) continue;
    ends[static_cast<size_t>(i)] = 1, ++accepted;
  }
  std::vector<BlockRange> chunks;
  Index begin = 0;
  for (Index i = 0; i < n; ++i)
    if (ends[static_cast<size_t>(i)] != 0 || i == n - 1) chunks.push_back({begin, i + 1}), begin = i + 1;
  return chunks;
}

std::vector<BlockRange> cut_evenly(Index tokens, Index length) {
  std::vector<BlockRange> chunks;
  for (Index begin = 0; begin < tokens; begin += length) chunks.push_back({begin, std::min(tokens, begin + length)});
  return chunks;
}

void pool_key(const KeyValues& kv, const Problem& problem, Index b, const BlockRange& chunk, Pooling pooling,
              float* out) {
  std::vector<float> key(static_cast<size_t>(problem.D));
  pool_tokens(pooling, chunk.begin, chunk.end, problem.Hk, problem.D, out, [&](Index t, Index h, float* row) {
    kv.read_key(b * problem.Hk + h, t, key.data());
    for (size_t i = 0; i < key.size(); ++i) row[i] += key[i];
  });
}

std::vector<float> pool_keys(const KeyValues& kv, const Problem& problem, Index b, std::span<const BlockRange> chunks,
                             Pooling pooling) {
  const Index d = problem.D, count = static_cast<Index>(chunks.size());
  std::vector<float> panels(static_cast<size_t>(round_up(count, panel_columns) * d));
  parallel_for(ceil_div(count, panel_columns), [&](Index panel, int) {
    const Index first = panel * panel_columns, columns = std::min(panel_columns, count - first);
    std::vector<float> rows(static_cast<size_t>(columns * d));
    for (Index c = 0; c < columns; ++c)
      pool_key(kv, problem, b, chunks[static_cast<size_t>(first + c)], pooling, rows.data() + c * d);
    kernels().pack_keys_f32(rows.data(), d, columns, d, d, panels.data() + first * d);
  });
  return panels;
}

std::vector<std::int32_t> fill_from_chunks(std::span<const BlockRange> chunks, const float* scores, Index begin,
                                           Index end, Index need) {
  const auto first =
      std::partition_point(chunks.begin(), chunks.end(), [&](const BlockRange& c) { return c.end <= begin; });
  const auto last = std::partition_point(first, chunks.end(), [&](const BlockRange& c) { return c.begin < end; });
  std::vector<Index> heap(static_cast<size_t>(last - first));
  std::iota(heap.begin(), heap.end(), first - chunks.begin());
  const auto worse = [&](Index i, Index j) { return scores[i] < scores[j] || (scores[i] == scores[j] && i > j); };
  std::make_heap(heap.begin(), heap.end(), worse);
  std::vector<std::int32_t> tokens;
  tokens.reserve(static_cast<size_t>(need));
  while (static_cast<Index>(tokens.size()) < need) {
    std::pop_heap(heap.begin(), heap.end(), worse);
    const BlockRange& chunk = chunks[static_cast<size_t>(heap.back())];
    heap.pop_back();
    const Index from = std::max(begin, chunk.begin), left = need - static_cast<Index>(tokens.size());
    for (Index t = from; t < std::min({end, chunk.end, from + left}); ++t)
      tokens.push_back(static_cast<std::int32_t>(t));
  }
  std::sort(tokens.begin(), tokens.end());
  return tokens;
}

}  // namespace heed
