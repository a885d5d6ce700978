#include "heed/plan/summary.h"

#include <algorithm>

#include "heed/base/threads.h"
#include "heed/kernel/kernels.h"

namespace heed {
namespace {

// Packs the means of `blocks[head]` groups for every head: sum(head, j, out) adds up the group's keys in out [d],
// tokens(head, j) says how many they are.
template <class Sum, class Tokens>
Summary pack_means(std::vector<Index> blocks, Index d, Sum sum, Tokens tokens) {
  Summary s{.d = d, .blocks = std::move(blocks), .panels = {}, .own = {}};
  const Index heads = static_cast<Index>(s.blocks.size());
  Index panels = 0;
  for (const Index count : s.blocks) {
    s.own.push_back(std::make_unique_for_overwrite<float[]>(static_cast<size_t>(round_up(count, panel_columns) * d)));
    s.panels.push_back(s.own.back().get());
    panels = std::max(panels, ceil_div(count, panel_columns));
  }
  parallel_for(heads * panels, [&](Index unit, int) {
    const Index head = unit / panels, first = unit % panels * panel_columns;
    const Index columns = std::min(panel_columns, s.blocks[static_cast<size_t>(head)] - first);
    if (columns <= 0) return;
    Scratch& scratch = thread_scratch();
    const Scratch::Mark mark(scratch);
    float* rows = scratch.take<float>(columns * d).data();
    std::fill_n(rows, columns * d, 0.0f);
    for (Index j = 0; j < columns; ++j) {
      float* row = rows + j * d;
      sum(head, first + j, row);
      const float n = static_cast<float>(tokens(head, first + j));
      for (Index i = 0; i < d; ++i) row[i] /= n;
    }
    kernels().pack_keys_f32(rows, d, columns, d, d, s.own[static_cast<size_t>(head)].get() + first * d);
  });
  return s;
}

}  // namespace

void Summary::score(Index head, const float* q, Index rows, Index count, float* scores, Index stride,
                    bool accumulate) const {
  kernels().gemm_f32(rows, count, d, q, d, panels[static_cast<size_t>(head)], scores, stride, accumulate);
}

Summary mean_keys(const KeyValues& kv, const Problem& problem, const std::vector<std::vector<BlockRange>>& ranges) {
  std::vector<Index> blocks;
  for (Index head = 0; head < problem.B * problem.Hk; ++head)
    blocks.push_back(static_cast<Index>(ranges[static_cast<size_t>(head / problem.Hk)].size()));
  const auto range = [&](Index head, Index j) -> const BlockRange& {
    return ranges[static_cast<size_t>(head / problem.Hk)][static_cast<size_t>(j)];
  };
  return pack_means(
      std::move(blocks), problem.D,
      [&](Index head, Index j, float* sum) { kv.sum_keys(head, range(head, j).begin, range(head, j).end, sum); },
      [&](Index head, Index j) { return range(head, j).size(); });
}

Summary mean_keys(const KeyValues& kv, const Problem& problem, std::span<const std::int32_t> tokens,
                  std::span<const Index> begins) {
  const auto group = [&](Index j) {
    const Index begin = begins[static_cast<size_t>(j)], count = begins[static_cast<size_t>(j) + 1] - begin;
    return tokens.subspan(static_cast<size_t>(begin), static_cast<size_t>(count));
  };
  return pack_means(
      std::vector<Index>(static_cast<size_t>(problem.B * problem.Hk), static_cast<Index>(begins.size()) - 1), problem.D,
      [&](Index head, Index j, float* sum) {
        const auto block = group(j);
        // Tokens that follow each other are summed as a run.
        for (size_t from = 0, to; from < block.size(); from = to) {
          for (to = from + 1; to < block.size() && block[to] == block[to - 1] + 1;) ++to;
          kv.sum_keys(head, block[from], block[to - 1] + 1, sum);
        }
      },
      [&](Index, Index j) { return static_cast<Index>(group(j).size()); });
}

Tensor mean_queries(const Queries& queries, const Problem& problem, std::span<const std::int32_t> tokens,
                    std::span<const Index> begins) {
  const Index groups = static_cast<Index>(begins.size()) - 1, d = problem.D;
  Tensor means(DType::f32, {problem.B, problem.Hq, groups, d});
  constexpr Index at_once = 16;
  const Index runs = ceil_div(groups, at_once);
  parallel_for(problem.B * problem.Hq * runs, [&](Index unit, int) {
    const Index head = unit / runs, first = unit % runs * at_once;
    Scratch& scratch = thread_scratch();
    const Scratch::Mark mark(scratch);
    float* x = scratch.take<float>(d).data();
    for (Index g = first; g < std::min(first + at_once, groups); ++g) {
      float* mean = means.as<float>() + (head * groups + g) * d;
      const Index begin = begins[static_cast<size_t>(g)], end = begins[static_cast<size_t>(g) + 1];
      for (Index t = begin; t < end; ++t) {
        queries.read(head / problem.Hq, head % problem.Hq, tokens[static_cast<size_t>(t)], x);
        for (Index i = 0; i < d; ++i) mean[i] += x[i];
      }
      for (Index i = 0; i < d; ++i) mean[i] /= static_cast<float>(end - begin);
    }
  });
  return means;
}

Summary mean_blocks(const KeyValues& kv, const Problem& problem, Index block) {
  const Index heads = problem.B * problem.Hk, d = problem.D;
  const BlockMeans& means = kv.block_means(block);
  Summary s{.d = d, .blocks = std::vector<Index>(static_cast<size_t>(heads), means.complete), .panels = {}, .own = {}};
  for (Index head = 0; head < heads; ++head) s.panels.push_back(means.panels.data() + head * means.capacity * d);
  return s;
}

}  // namespace heed
