#include "heed/model/rope.h"

#include <algorithm>
#include <cmath>

#include "heed/base/threads.h"

namespace heed::model {

void Rope::reach(Index positions, Index limit) {
  if (positions <= positions_) return;
  positions_ = std::min(limit, std::max({positions, 2 * positions_, Index{1024}}));
  table_ = Buffer<float>(positions_ * 2 * half_);
  constexpr Index step = 256;
  parallel_for(ceil_div(positions_, step), [&](Index unit, int) {
    for (Index p = unit * step; p < std::min(positions_, (unit + 1) * step); ++p) {
      float* cosines = table_.data() + p * 2 * half_;
      for (Index i = 0; i < half_; ++i) {
        const double angle =
            static_cast<double>(p) * std::pow(base_, -static_cast<double>(i) / static_cast<double>(half_));
        cosines[i] = static_cast<float>(std::cos(angle));
        cosines[half_ + i] = static_cast<float>(std::sin(angle));
      }
    }
  });
}

void Rope::turn(float* row, Index heads, Index position) const {
  const float *c = table_.data() + position * 2 * half_, *s = c + half_;
  for (Index h = 0; h < heads; ++h, row += 2 * half_) {
    const bool adjacent = pairs_ == RopePairs::adjacent;
    const Index step = adjacent ? 2 : 1, other = adjacent ? 1 : half_;
    for (Index i = 0; i < half_; ++i) {
      const float a = row[i * step], b = row[i * step + other];
      row[i * step] = a * c[i] - b * s[i];
      row[i * step + other] = a * s[i] + b * c[i];
    }
  }
}

}  // namespace heed::model
