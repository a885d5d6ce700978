#include "heed/plan/level_rule.h"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace heed {

void LevelRule::assign(const float* score, Index n, bool logarithms, std::int32_t* levels, Scratch& scratch) const {
  const Scratch::Mark mark(scratch);
  const auto order = scratch.take<std::int32_t>(n);
  std::iota(order.begin(), order.end(), 0);
  std::sort(order.begin(), order.end(),
            [&](std::int32_t i, std::int32_t j) { return score[i] > score[j] || (score[i] == score[j] && i < j); });
  const auto cumulated = scratch.take<double>(of == ShareOf::importance ? n : 0);
  double sum = 0;
  for (size_t i = 0; i < cumulated.size(); ++i) {
    const double x = score[order[i]];
    cumulated[i] = sum += logarithms ? std::exp(x) : x;
  }
  const auto part = [n](double share) { return static_cast<Index>(share * static_cast<double>(n) + 1e-9); };
  std::fill_n(levels, n, 0);
  Index begin = 0;
  for (size_t i = 0; i < bounds.size(); ++i) {
    Index end = part(bounds[i].share);
    if (of == ShareOf::importance) {
      end = std::upper_bound(cumulated.begin(), cumulated.end(), (bounds[i].share + 1e-6) * sum) - cumulated.begin();
      if (end > 0) ++end;
    }
    if (i == 0) end = std::max(end, of == ShareOf::importance ? part(least_first) + 1 : 1);
    for (end = std::min(end, n); begin < end; ++begin)
      levels[order[static_cast<size_t>(begin)]] = static_cast<std::int32_t>(bounds[i].level);
  }
}

}  // namespace heed
