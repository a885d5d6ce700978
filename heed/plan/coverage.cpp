#include "heed/plan/coverage.h"

namespace heed {

std::vector<double> coverage(Index n, const std::function<bool(Index, Index)>& allowed) {
  std::vector<double> shares;
  std::vector<bool> reached(static_cast<size_t>(n), false);
  std::vector<Index> front{n - 1};
  reached[static_cast<size_t>(n - 1)] = true;
  Index count = 1;
  while (!front.empty()) {
    std::vector<Index> next;
    for (Index i : front)
      for (Index j = 0; j <= i; ++j)
        if (!reached[static_cast<size_t>(j)] && allowed(i, j)) {
          reached[static_cast<size_t>(j)] = true;
          next.push_back(j);
        }
    count += static_cast<Index>(next.size());
    if (!next.empty() || shares.empty()) shares.push_back(static_cast<double>(count) / static_cast<double>(n));
    front = std::move(next);
  }
  return shares;
}

Index hops_to_cover(Index n, const std::function<bool(Index, Index)>& allowed) {
  const std::vector<double> shares = coverage(n, allowed);
  return shares.back() < 1 ? -1 : static_cast<Index>(shares.size());
}

}  // namespace heed
