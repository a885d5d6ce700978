#include "heed/plan/pyramid.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "heed/base/threads.h"
#include "heed/plan/permute.h"

namespace heed {

PooledColumns pool_groups(const KeyValues& kv, std::span<const std::int32_t> order, std::span<const Index> begins) {
  PooledColumns pooled{.means = mean_columns(kv, order, begins), .position = {}, .log_weight = {}, .members = {}};
  pooled.members = {{order.begin(), order.end()}, {begins.begin(), begins.end()}};
  for (size_t g = 0; g + 1 < begins.size(); ++g) {
    pooled.position.push_back(order[static_cast<size_t>(begins[g + 1] - 1)]);
    pooled.log_weight.push_back(std::log(static_cast<float>(begins[g + 1] - begins[g])));
  }
  return pooled;
}

PooledColumns pool_every(const KeyValues& kv, Index tokens, Index size) {
  std::vector<std::int32_t> order(static_cast<size_t>(tokens));
  std::iota(order.begin(), order.end(), 0);
  std::vector<Index> begins;
  for (Index begin = 0; begin < tokens; begin += size) begins.push_back(begin);
  begins.push_back(tokens);
  return pool_groups(kv, order, begins);
}

Index add_pooled(Plan& plan, PooledColumns columns, PooledWeight weight) {
  const auto kept = std::make_shared<const PooledColumns>(std::move(columns));
  Source& source = plan.sources.emplace_back();
  source.layout = kept->means->layout();
  for (Index head = 0; head < kept->means->heads(); ++head) {
    SourceView& view = source.views.emplace_back();
    view.keys = kept->means->keys(head), view.values = kept->means->values(head);
    view.columns = kept->columns(), view.position = kept->position.data(), view.members = &kept->members;
    if (weight == PooledWeight::tokens) view.log_weight = kept->log_weight.data();
  }
  plan.keep.push_back(kept);
  return static_cast<Index>(plan.sources.size()) - 1;
}

std::vector<float> end_similarity(const KeyValues& kv, Index tokens, Index block, Index size) {
  const Index blocks = ceil_div(tokens, block), d = kv.layout().d;
  std::vector<float> similarity(static_cast<size_t>(kv.heads() * blocks), -1);
  parallel_for(kv.heads() * blocks, [&](Index unit, int) {
    const Index head = unit / blocks, begin = unit % blocks * block, end = std::min(tokens, begin + block);
    Scratch& scratch = thread_scratch();
    const Scratch::Mark mark(scratch);
    const auto x = scratch.take<float>(d), y = scratch.take<float>(d);
    double sum = 0;
    for (Index t = begin; t + size <= end; t += size) {
      kv.read_key(head, t, x.data()), kv.read_key(head, t + size - 1, y.data());
      double xy = 0, xx = 0, yy = 0;
      for (size_t i = 0; i < x.size(); ++i) {
        const double a = static_cast<double>(x[i]), b = static_cast<double>(y[i]);
        xy += a * b, xx += a * a, yy += b * b;
      }
      if (xx > 0 && yy > 0) sum += xy / std::sqrt(xx) / std::sqrt(yy);
    }
    if (end - begin >= size)
      similarity[static_cast<size_t>(unit)] = static_cast<float>(sum / static_cast<double>((end - begin) / size));
  });
  return similarity;
}

}  // namespace heed
