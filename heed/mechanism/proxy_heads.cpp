#include "heed/mechanism/proxy_heads.h"

#include <algorithm>
#include <numeric>

#include "heed/base/threads.h"
#include "heed/plan/block_scores.h"
#include "heed/plan/select.h"

namespace heed::mechanism {
namespace {

// 1, and each time the least divisor of `kv_heads` that is at least twice the one before.
std::vector<Index> numbers_tried(Index kv_heads) {
  std::vector<Index> numbers{1};
  for (Index p = 2; p <= kv_heads; ++p)
    if (kv_heads % p == 0 && p >= 2 * numbers.back()) numbers.push_back(p);
  return numbers;
}

// The keys with the largest weights, ascending.
std::vector<std::int32_t> top_keys(const std::vector<float>& weights, Index keys) {
  const Index count = std::max<Index>(1, keys / 20);
  std::vector<std::int32_t> top(static_cast<size_t>(count));
  choose_top(weights.data(), keys, count, Ties::lower, top.data());
  return top;
}

}  // namespace

void mean_query(const Queries& queries, Index b, Index first, Index heads, Index token, float* out) {
  const Index d = queries.view().shape[3];
  Scratch& scratch = thread_scratch();
  const Scratch::Mark mark(scratch);
  float* one = scratch.take<float>(d).data();
  std::fill_n(out, d, 0.0f);
  for (Index head = first; head < first + heads; ++head) {
    queries.read(b, head, token, one);
    for (Index f = 0; f < d; ++f) out[f] += one[f] / static_cast<float>(heads);
  }
}

NamedTensors calibrate_proxy_heads(const Params& params, const Inputs& in) {
  const Problem& p = in.problem;
  const Index rows = std::min(params.integer("block"), p.N), first = p.N - rows, keys = p.M, d = p.D;
  const auto weights = [&](const ScoreKeys& from, const float* q) {
    std::vector<std::int32_t> ends(static_cast<size_t>(rows));
    std::iota(ends.begin(), ends.end(), static_cast<std::int32_t>(p.position(first) + 1));
    std::vector<float> mass(static_cast<size_t>(round_up(keys, panel_columns)), 0.0f);
    BlockScores{from, in.rule.scale, 1}.weigh(q, rows, ends.data(), nullptr, mass.data(), thread_scratch());
    return top_keys(mass, keys);
  };
  const auto queries_of = [&](Index head, Index heads) {
    std::vector<float> q(static_cast<size_t>(rows * d));
    for (Index i = 0; i < rows; ++i) mean_query(in.q, 0, head, heads, first + i, q.data() + i * d);
    return q;
  };

  std::vector<std::vector<std::int32_t>> own(static_cast<size_t>(p.Hq));
  parallel_for(p.Hq, [&](Index head, int) {
    own[static_cast<size_t>(head)] = weights(ScoreKeys::of(*in.kv, head / p.group()), queries_of(head, 1).data());
  });
  const std::vector<Index> numbers = numbers_tried(p.Hk);
  Tensor overlap(DType::f32, {static_cast<Index>(numbers.size()), p.Hq});
  for (size_t c = 0; c < numbers.size(); ++c) {
    const Index groups = numbers[c], heads = p.Hq / groups, kv_heads = p.Hk / groups;
    parallel_for(groups, [&](Index g, int) {
      const std::vector<float> mean = mean_head_panels(*in.kv, g * kv_heads, kv_heads);
      const auto proxy = weights(ScoreKeys::of(mean.data(), d, keys), queries_of(g * heads, heads).data());
      for (Index head = g * heads; head < (g + 1) * heads; ++head) {
        const auto& mine = own[static_cast<size_t>(head)];
        std::vector<std::int32_t> both;
        std::set_intersection(mine.begin(), mine.end(), proxy.begin(), proxy.end(), std::back_inserter(both));
        overlap.as<float>()[static_cast<Index>(c) * p.Hq + head] =
            static_cast<float>(both.size()) / static_cast<float>(mine.size());
      }
    });
  }
  NamedTensors tensors;
  Tensor tried(DType::i32, {static_cast<Index>(numbers.size())});
  for (size_t c = 0; c < numbers.size(); ++c) tried.as<std::int32_t>()[c] = static_cast<std::int32_t>(numbers[c]);
  tensors.emplace("overlap", std::move(overlap));
  tensors.emplace("proxy_heads", std::move(tried));
  return tensors;
}

ParamTexts settle_proxy_heads(const Params&, const std::vector<NamedTensors>& layers) {
  if (layers.empty()) return {};
  const Tensor& tried = layers.front().find("proxy_heads")->second;
  for (Index c = 0; c < tried.size(); ++c) {
    std::vector<float> all;
    for (const NamedTensors& layer : layers) {
      const Tensor& overlap = layer.find("overlap")->second;
      const float* row = overlap.as<float>() + c * overlap.shape()[1];
      all.insert(all.end(), row, row + overlap.shape()[1]);
    }
    std::nth_element(all.begin(), all.begin() + static_cast<std::ptrdiff_t>(all.size() / 2), all.end());
    if (all[all.size() / 2] >= 0.5f || c + 1 == tried.size())
      return {{"proxy_heads", std::to_string(tried.as<std::int32_t>()[c])}};
  }
  return {};
}

}  // namespace heed::mechanism
