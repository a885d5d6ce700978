#include "heed/plan/largest.h"

#include <algorithm>
#include <limits>

#include "heed/base/threads.h"

namespace heed {
namespace {

bool extends(const BlockRange& region, const BlockRange& before) {
  return before.size() > 0 && region.begin <= before.begin && before.end <= region.end;
}

// Where runs of regions begin, and the end: a run is long enough to be a unit of work, and ends where regions no
// longer grow from each other, if it can.
std::vector<Index> cut_runs(std::span<const BlockRange> regions) {
  constexpr Index least = 16, most = 256;
  const Index count = static_cast<Index>(regions.size());
  std::vector<Index> cuts{0};
  for (Index r = least; r < count; ++r) {
    const Index length = r - cuts.back();
    const bool grows = extends(regions[static_cast<size_t>(r)], regions[static_cast<size_t>(r) - 1]);
    if (length >= (grows ? most : least)) cuts.push_back(r);
  }
  cuts.push_back(count);
  return cuts;
}

// Of each feature of a region the largest number and the rank that has it.
struct Winners {
  std::vector<float> most;
  std::vector<Index> rank;
  explicit Winners(Index d) : most(static_cast<size_t>(d)), rank(static_cast<size_t>(d)) { forget(); }

  void forget() {
    std::fill(most.begin(), most.end(), -std::numeric_limits<float>::infinity());
    std::fill(rank.begin(), rank.end(), -1);
  }
  void meet(const float* x, float factor, Index at) {
    for (size_t i = 0; i < most.size(); ++i) {
      const float y = factor * x[i];
      if (y > most[i] || (y == most[i] && at < rank[i])) most[i] = y, rank[i] = at;
    }
  }
};

// Raises most [d] to factor·x [d].
void raise(float* most, const float* x, float factor, Index d) {
  for (Index i = 0; i < d; ++i) {
    const float y = factor * x[i];
    most[i] = y > most[i] ? y : most[i];
  }
}

}  // namespace

Largest largest_features(const Problem& p, const Queries& queries, const KeyValues& kv, float scale,
                         std::span<const std::int32_t> order, std::span<const BlockRange> regions) {
  const Index count = static_cast<Index>(regions.size()), d = p.D;
  const float side = scale < 0 ? -1.0f : 1.0f;
  Largest most{Tensor(DType::f32, {p.B, p.Hq, count, d}), Tensor(DType::f32, {p.B, p.Hq, count, d})};
  const std::vector<Index> cuts = cut_runs(regions);
  const Index units = static_cast<Index>(cuts.size()) - 1;
  parallel_for(p.B * p.Hq * units, [&](Index unit, int) {
    const Index head = unit / units, b = head / p.Hq, h = head % p.Hq;
    const Index first = cuts[static_cast<size_t>(unit % units)], end = cuts[static_cast<size_t>(unit % units) + 1];
    float *q = most.q.as<float>() + head * count * d, *k = most.k.as<float>() + head * count * d;
    Scratch& scratch = thread_scratch();
    const Scratch::Mark mark(scratch);
    float* row = scratch.take<float>(d).data();
    BlockRange before;
    for (Index r = first; r < end; ++r) {
      const BlockRange region = regions[static_cast<size_t>(r)];
      const auto fold = [&](Index from, Index to) {
        const Index kv_head = b * p.Hk + h / p.group();
        if (order.empty()) max_columns(kv.layout(), kv.keys(kv_head), from, to, k + r * d);
        for (Index rank = from; rank < to; ++rank) {
          const Index token = order.empty() ? rank : order[static_cast<size_t>(rank)];
          queries.read(b, h, token, row);
          raise(q + r * d, row, side, d);
          if (order.empty()) continue;
          kv.read_key(kv_head, token, row);
          raise(k + r * d, row, 1, d);
        }
      };
      if (extends(region, before)) {
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

void largest_features_backward(const Problem& p, const Queries& queries, const KeyValues& kv, float scale,
                               std::span<const std::int32_t> order, std::span<const BlockRange> regions,
                               const Largest& from, Tensor& dq, Tensor& dk) {
  const Index count = static_cast<Index>(regions.size()), d = p.D;
  const float side = scale < 0 ? -1.0f : 1.0f;
  const auto token_of = [&](Index rank) { return order.empty() ? rank : order[static_cast<size_t>(rank)]; };
  // Query heads of a KV head add to the same keys, one after the other.
  parallel_for(p.B * p.Hk, [&](Index kv_head, int) {
    std::vector<float> row(static_cast<size_t>(d));
    Winners q(d), k(d);
    for (Index g = 0; g < p.group(); ++g) {
      const Index head = kv_head * p.group() + g;
      BlockRange before;
      for (Index r = 0; r < count; ++r) {
        const BlockRange region = regions[static_cast<size_t>(r)];
        const auto meet = [&](Index first, Index end) {
          for (Index rank = first; rank < end; ++rank) {
            queries.read(head / p.Hq, head % p.Hq, token_of(rank), row.data());
            q.meet(row.data(), side, rank);
            kv.read_key(kv_head, token_of(rank), row.data());
            k.meet(row.data(), 1, rank);
          }
        };
        if (extends(region, before)) {
          meet(region.begin, before.begin), meet(before.end, region.end);
        } else {
          q.forget(), k.forget();
          meet(region.begin, region.end);
        }
        before = region;
        if (region.size() == 0) continue;
        const float *dq_r = from.q.as<float>() + (head * count + r) * d,
                    *dk_r = from.k.as<float>() + (head * count + r) * d;
        for (Index i = 0; i < d; ++i) {
          const auto at = static_cast<size_t>(i);
          dq.as<float>()[(head * p.N + token_of(q.rank[at])) * d + i] += dq_r[i];
          dk.as<float>()[(kv_head * p.M + token_of(k.rank[at])) * d + i] += dk_r[i];
        }
      }
    }
  });
}

}  // namespace heed
