#include "heed/plan/summary.h"

#include <algorithm>

#include "heed/base/threads.h"
#include "heed/kernel/kernels.h"

namespace heed {
namespace {

// Packs `count` means, sums[j·d …] / tokens(j), as key panels.
template <class Sums, class Tokens>
std::vector<float> pack_means(Index count, Index d, Sums sums, Tokens tokens) {
  std::vector<float> panels(static_cast<size_t>(round_up(count, panel_columns) * d));
  Scratch& scratch = thread_scratch();
  const Scratch::Mark mark(scratch);
  float* rows = scratch.take<float>(panel_columns * d).data();
  for (Index first = 0; first < count; first += panel_columns) {
    const Index columns = std::min(panel_columns, count - first);
    for (Index j = 0; j < columns; ++j) {
      const float* sum = sums(first + j);
      const float n = static_cast<float>(tokens(first + j));
      for (Index i = 0; i < d; ++i) rows[j * d + i] = sum[i] / n;
    }
    kernels().pack_keys_f32(rows, d, columns, d, d, panels.data() + first * d);
  }
  return panels;
}

}  // namespace

void Summary::score(Index head, const float* q, Index rows, Index count, float* scores, Index stride,
                    bool accumulate) const {
  kernels().gemm_f32(rows, count, d, q, d, panels[static_cast<size_t>(head)].data(), scores, stride, accumulate);
}

Summary mean_keys(const KeyValues& kv, const Problem& problem, const std::vector<std::vector<BlockRange>>& ranges) {
  const Index heads = problem.B * problem.Hk, d = problem.D;
  Summary s{.d = d, .blocks = {}, .panels = std::vector<std::vector<float>>(static_cast<size_t>(heads))};
  for (Index head = 0; head < heads; ++head)
    s.blocks.push_back(static_cast<Index>(ranges[static_cast<size_t>(head / problem.Hk)].size()));
  parallel_for(heads, [&](Index head, int) {
    const std::vector<BlockRange>& blocks = ranges[static_cast<size_t>(head / problem.Hk)];
    std::vector<float> sum(static_cast<size_t>(d));
    s.panels[static_cast<size_t>(head)] = pack_means(
        static_cast<Index>(blocks.size()), d,
        [&](Index j) {
          std::fill(sum.begin(), sum.end(), 0.0f);
          kv.sum_keys(head, blocks[static_cast<size_t>(j)].begin, blocks[static_cast<size_t>(j)].end, sum.data());
          return sum.data();
        },
        [&](Index j) { return blocks[static_cast<size_t>(j)].size(); });
  });
  return s;
}

Summary mean_keys(const KeyValues& kv, const Problem& problem, std::span<const std::int32_t> tokens,
                  std::span<const Index> begins) {
  const Index heads = problem.B * problem.Hk, d = problem.D, blocks = static_cast<Index>(begins.size()) - 1;
  Summary s{.d = d,
            .blocks = std::vector<Index>(static_cast<size_t>(heads), blocks),
            .panels = std::vector<std::vector<float>>(static_cast<size_t>(heads))};
  parallel_for(heads, [&](Index head, int) {
    std::vector<float> sum(static_cast<size_t>(d));
    s.panels[static_cast<size_t>(head)] = pack_means(
        blocks, d,
        [&](Index c) {
          std::fill(sum.begin(), sum.end(), 0.0f);
          const Index begin = begins[static_cast<size_t>(c)], count = begins[static_cast<size_t>(c) + 1] - begin;
          const auto block = tokens.subspan(static_cast<size_t>(begin), static_cast<size_t>(count));
          // Tokens that follow each other are summed as a run.
          for (size_t from = 0, to; from < block.size(); from = to) {
            for (to = from + 1; to < block.size() && block[to] == block[to - 1] + 1;) ++to;
            kv.sum_keys(head, block[from], block[to - 1] + 1, sum.data());
          }
          return sum.data();
        },
        [&](Index c) { return begins[static_cast<size_t>(c) + 1] - begins[static_cast<size_t>(c)]; });
  });
  return s;
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
  const BlockSums& sums = kv.block_sums(block);
  Summary s{.d = d,
            .blocks = std::vector<Index>(static_cast<size_t>(heads), sums.complete),
            .panels = std::vector<std::vector<float>>(static_cast<size_t>(heads))};
  for (Index head = 0; head < heads; ++head)
    s.panels[static_cast<size_t>(head)] = pack_means(
        sums.complete, d, [&](Index j) { return sums.sums.data() + (head * sums.capacity + j) * d; },
        [&](Index) { return block; });
  return s;
}

}  // namespace heed
