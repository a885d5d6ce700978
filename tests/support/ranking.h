// A ranking of pairs of a query and a block by a full sort: what the cut of a ranking is compared with.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "heed/base/types.h"

namespace heed::test {

struct Pair {
  double score;
  Index block, token;
};

/// By falling score, equal ones by block, then token.
inline void sort_pairs(std::vector<Pair>& pairs) {
  std::sort(pairs.begin(), pairs.end(), [](const Pair& x, const Pair& y) {
    if (x.score != y.score) return x.score > y.score;
    return x.block != y.block ? x.block < y.block : x.token < y.token;
  });
}

/// Of the pairs that are not own ones, sorted: how many are in. The sums are of score - least over all pairs.
inline size_t prefix(const std::vector<Pair>& ranked, double least, double most, double own_sum, double sum,
                     double mass) {
  if (mass >= 1) return ranked.size();
  const double unit = most - least <= 1e-6 ? 1 : most - least;
  const double need = std::max(0.0, mass - own_sum / unit / (sum / unit + 1e-6));
  double held = 0;
  for (size_t i = 0; i < ranked.size(); ++i) {
    held += (ranked[i].score - least) / unit;
    if (held / (sum / unit + 1e-6) >= need) return i + 1;
  }
  return ranked.size();
}

}  // namespace heed::test
