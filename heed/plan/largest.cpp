#include "heed/plan/largest.h"

#include <algorithm>
#include <limits>

#include "heed/base/threads.h"

namespace heed {

Largest largest_features(const Problem& p, const Queries& queries, const KeyValues& kv, float scale,
                         std::span<const std::int32_t> order, std::span<const BlockRange> regions) {
  constexpr Index run = 256;
  const Index count = static_cast<Index>(regions.size()), d = p.D, units = ceil_div(count, run);
  const float side = scale < 0 ? -1.0f : 1.0f;
  Largest most{Tensor(DType::f32, {p.B, p.Hq, count, d}), Tensor(DType::f32, {p.B, p.Hq, count, d})};
  // Keys as rows: a key's features lie apart where they are packed, and a token may be in many regions.
  Tensor keys(DType::f32, {p.B * p.Hk, p.M, d});
  const Index pieces = ceil_div(p.M, run);
  parallel_for(p.B * p.Hk * pieces, [&](Index unit, int) {
    const Index head = unit / pieces, begin = unit % pieces * run;
    for (Index j = begin; j < std::min(p.M, begin + run); ++j)
      kv.read_key(head, j, keys.as<float>() + (head * p.M + j) * d);
  });
  parallel_for(p.B * p.Hq * units, [&](Index unit, int) {
    const Index head = unit / units, b = head / p.Hq, h = head % p.Hq, first = unit % units * run;
    const Index end = std::min(count, first + run);
    const float* key = keys.as<float>() + (b * p.Hk + h / p.group()) * p.M * d;
    float *q = most.q.as<float>() + head * count * d, *k = most.k.as<float>() + head * count * d;
    std::vector<float> row(static_cast<size_t>(d));
    BlockRange before;
    for (Index r = first; r < end; ++r) {
      const BlockRange region = regions[static_cast<size_t>(r)];
      const auto fold = [&](Index from, Index to) {
        for (Index rank = from; rank < to; ++rank) {
          const Index token = order.empty() ? rank : order[static_cast<size_t>(rank)];
          queries.read(b, h, token, row.data());
          for (Index i = 0; i < d; ++i) {
            q[r * d + i] = std::max(q[r * d + i], side * row[static_cast<size_t>(i)]);
            k[r * d + i] = std::max(k[r * d + i], key[token * d + i]);
          }
        }
      };
      if (before.size() > 0 && region.begin <= before.begin && before.end <= region.end) {
        std::copy_n(q + (r - 1) * d, d, q + r * d), std::copy_n(k + (r - 1) * d, d, k + r * d);
        fold(region.begin, before.begin), fold(before.end, region.end);
      } else {
        std::fill_n(q + r * d, d, -std::numeric_limits<float>::infinity());
        std::fill_n(k + r * d, d, -std::numeric_limits<float>::infinity());
        fold(region.begin, region.end);
      }
      before = region;
    }
    for (Index i = first * d; side < 0 && i < end * d; ++i) q[i] = -q[i];
  });
  return most;
}

}  // namespace heed
