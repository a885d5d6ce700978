#include "heed/plan/levels.h"

#include <algorithm>
#include <numeric>

#include "heed/base/threads.h"
#include "heed/kernel/kernels.h"
#include "heed/plan/select.h"

namespace heed {
namespace {

// [level][heads, runs, d]. The first level is left empty.
using Vectors = std::vector<std::vector<float>>;

// Sums over the tokens of every run. sum_tokens(head, begin, end, out) adds tokens to out [d]; coarser levels add
// up finer ones, which keeps the digits of long runs.
template <class SumTokens>
Vectors sum_runs(const Levels& levels, Index heads, Index d, SumTokens sum_tokens) {
  Vectors sums(static_cast<size_t>(levels.top) + 1);
  constexpr Index at_once = 32;
  for (Index level = 1; level <= levels.top; ++level) {
    const Index runs = levels.count(level), finer = levels.count(level - 1), units = ceil_div(runs, at_once);
    std::vector<float>& out = sums[static_cast<size_t>(level)];
    out.assign(static_cast<size_t>(heads * runs * d), 0.0f);
    parallel_for(heads * units, [&](Index unit, int) {
      const Index head = unit / units, first = unit % units * at_once;
      for (Index run = first; run < std::min(first + at_once, runs); ++run) {
        float* sum = out.data() + (head * runs + run) * d;
        const Index begin = run * levels.branch, end = std::min(begin + levels.branch, finer);
        if (level == 1) {
          sum_tokens(head, begin, end, sum);
          continue;
        }
        const float* parts = sums[static_cast<size_t>(level) - 1].data() + head * finer * d;
        for (Index part = begin; part < end; ++part)
          for (Index i = 0; i < d; ++i) sum[i] += parts[part * d + i];
      }
    });
  }
  return sums;
}

// Scores `rows` rows q against `count` rows k [count, d], which are packed first; stride = count rounded up to 64.
void score(const float* q, Index rows, const float* k, Index count, Index d, float* scores, Scratch& scratch) {
  const Scratch::Mark mark(scratch);
  const Index stride = round_up(count, panel_columns);
  float* panels = scratch.take<float>(stride * d).data();
  for (Index first = 0; first < count; first += panel_columns)
    kernels().pack_keys_f32(k + first * d, d, std::min(panel_columns, count - first), d, d, panels + first * d);
  kernels().gemm_f32(rows, count, d, q, d, panels, scores, stride, false);
}

}  // namespace

LevelChoice::LevelChoice(const Levels& levels, Index top_k, const Problem& problem, const Queries& queries,
                         const KeyValues& kv)
    : lists_(static_cast<size_t>(levels.top) + 1) {
  const Index heads = problem.B * problem.Hq, d = problem.D;
  for (Index level = 1; level <= levels.top; ++level) {
    Lists& lists = lists_[static_cast<size_t>(level)];
    lists.runs = levels.count(level), lists.stride = std::min(top_k, lists.runs);
    lists.all = top_k >= lists.runs;  // then all coarser levels chose all as well
    if (!lists.all) {
      lists.chosen.resize(static_cast<size_t>(heads * lists.runs * lists.stride));
      lists.counts.resize(static_cast<size_t>(heads * lists.runs));
    } else if (everything_.empty()) {
      everything_.resize(static_cast<size_t>(lists.runs));
      std::iota(everything_.begin(), everything_.end(), 0);
    }
  }
  if (all(1)) return;

  // A query's sums rank keys as its means do; keys need their means.
  const Vectors q = sum_runs(levels, heads, d, [&](Index head, Index begin, Index end, float* sum) {
    Scratch& scratch = thread_scratch();
    const Scratch::Mark mark(scratch);
    float* x = scratch.take<float>(d).data();
    for (Index t = begin; t < end; ++t) {
      queries.read(head / problem.Hq, head % problem.Hq, t, x);
      for (Index i = 0; i < d; ++i) sum[i] += x[i];
    }
  });
  Vectors k = sum_runs(levels, kv.heads(), d,
                       [&](Index head, Index begin, Index end, float* sum) { kv.sum_keys(head, begin, end, sum); });
  for (Index level = 1; level <= levels.top; ++level) {
    const Index width = levels.width(level), runs = levels.count(level);
    float* x = k[static_cast<size_t>(level)].data();
    for (Index row = 0; row < kv.heads() * runs; ++row) {
      const Index begin = row % runs * width;
      const auto tokens = static_cast<float>(std::min(width, levels.tokens - begin));
      for (Index i = 0; i < d; ++i) x[row * d + i] /= tokens;
    }
  }

  // Coarse to fine. A unit is the children of one run of queries: they share their candidates. At the top the
  // whole is cut into units of as many.
  for (Index level = levels.top; level >= 1; --level) {
    Lists& lists = lists_[static_cast<size_t>(level)];
    if (lists.all) continue;
    const bool top = level == levels.top;
    const Index runs = lists.runs, at_once = top ? 128 : levels.branch, units = ceil_div(runs, at_once);
    parallel_for(heads * units, [&](Index unit, int) {
      const Index head = unit / units, parent = unit % units, first = parent * at_once;
      const Index rows = std::min(at_once, runs - first);
      const Index kv_head = head / problem.Hq * problem.Hk + head % problem.Hq / problem.group();
      const float* keys = k[static_cast<size_t>(level)].data() + kv_head * runs * d;
      Scratch& scratch = thread_scratch();
      const Scratch::Mark mark(scratch);

      Index count = runs;
      std::int32_t* candidates = nullptr;
      if (!top && !all(level + 1)) {
        const std::span<const std::int32_t> parents = of(level + 1, head, parent);
        candidates = scratch.take<std::int32_t>(static_cast<Index>(parents.size()) * levels.branch).data();
        count = 0;
        for (const std::int32_t p : parents)
          for (Index c = p * levels.branch; c < std::min((p + 1) * levels.branch, runs); ++c)
            candidates[count++] = static_cast<std::int32_t>(c);
        float* panel = scratch.take<float>(count * d).data();
        for (Index c = 0; c < count; ++c) std::copy_n(keys + candidates[c] * d, d, panel + c * d);
        keys = panel;
      }
      const Index stride = round_up(count, panel_columns);
      float* scores = scratch.take<float>(rows * stride).data();
      score(q[static_cast<size_t>(level)].data() + (head * runs + first) * d, rows, keys, count, d, scores, scratch);
      for (Index i = 0; i < rows; ++i) {
        const Index row = head * runs + first + i;
        std::int32_t* chosen = lists.chosen.data() + row * lists.stride;
        const Index n = choose_top(scores + i * stride, count, top_k, Ties::lower, chosen);
        if (candidates != nullptr)
          for (Index j = 0; j < n; ++j) chosen[j] = candidates[chosen[j]];
        lists.counts[static_cast<size_t>(row)] = static_cast<std::int32_t>(n);
      }
    });
  }
}

}  // namespace heed
