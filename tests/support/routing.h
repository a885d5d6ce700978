// Routing attention: normalise, gather the nearest to each centroid, attend inside, average; step by step, in f64.
#pragma once

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "support/naive.h"

namespace heed::test {

struct Routing {
  Index cluster_size = 16;
  double scale = 1, eps = 1e-2;
  bool mask_self = false, shared = false, causal = true;
  std::string call() const {
    return fmt::format("routing-transformer:cluster_size={},scale={},eps={},mask_self={},shared_qk={}", cluster_size,
                       scale, eps, mask_self, shared);
  }
};

/// Centroids [Hk, C, D].
struct Mu {
  Index heads, clusters, d;
  std::vector<float> at;
  Mu(const Case& c, Index clusters_in, std::uint64_t seed = 9) : heads(c.size.Hk), clusters(clusters_in), d(c.size.D) {
    std::mt19937_64 random(seed);
    std::normal_distribution<double> normal;
    for (Index i = 0; i < heads * clusters * d; ++i) at.push_back(static_cast<float>(normal(random)));
  }
  AttendInput input(const Case& c, bool causal) const {
    AttendInput in = c.input(causal);
    in.extra["mu"] = {at.data(), DType::f32, {heads, clusters, d}};
    return in;
  }
};

using Rows = std::vector<std::vector<double>>;

inline std::vector<double> normalised(std::vector<double> x) {
  const auto d = static_cast<double>(x.size());
  double mean = 0, variance = 0;
  for (const double v : x) mean += v / d;
  for (double& v : x) v -= mean, variance += v * v / d;
  for (double& v : x) v /= std::sqrt(variance + 1e-6);
  return x;
}

inline double dot(const std::vector<double>& a, const std::vector<double>& b) {
  double sum = 0;
  for (size_t i = 0; i < a.size(); ++i) sum += a[i] * b[i];
  return sum;
}

struct List {
  std::vector<Index> tokens;  // ascending
  std::set<Index> near;       // those within 1e-4 of being in or out
};

inline List gather(const Rows& x, const std::vector<double>& centroid, Index width) {
  std::vector<std::pair<double, Index>> scored;
  for (size_t t = 0; t < x.size(); ++t) scored.emplace_back(-dot(x[t], centroid), static_cast<Index>(t));
  std::sort(scored.begin(), scored.end());
  const size_t w = std::min(static_cast<size_t>(width), x.size());
  List list;
  for (size_t i = 0; i < x.size(); ++i) {
    if (i < w) list.tokens.push_back(scored[i].second);
    const double margin =
        i < w ? (w < x.size() ? scored[w].first - scored[i].first : 1) : scored[i].first - scored[w - 1].first;
    if (margin < 1e-4) list.near.insert(scored[i].second);
  }
  std::sort(list.tokens.begin(), list.tokens.end());
  return list;
}

/// Cluster by cluster, in f64. Normalised values are rounded to the arithmetic for the products, not for the lists.
inline Naive naive_routing(const Case& c, const Routing& r, const Mu& mu) {
  const auto& s = c.size;
  Naive result;
  result.o.assign(static_cast<size_t>(s.B * s.Hq * s.N * s.Dv), 0);
  result.undecided.assign(static_cast<size_t>(s.B * s.Hq * s.N), 0);
  result.lse.assign(result.undecided.size(), -INFINITY);
  const auto product = [&](const std::vector<double>& a, const std::vector<double>& b) {
    if (c.arithmetic == DType::f32) return dot(a, b);
    double sum = 0;
    for (size_t i = 0; i < a.size(); ++i) sum += nearest_bf16(a[i]) * nearest_bf16(b[i]);
    return sum;
  };
  for (Index b = 0; b < s.B; ++b)
    for (Index h = 0; h < s.Hq; ++h) {
      const Index g = c.kv_head(h);
      Rows q, k;
      for (Index t = 0; t < s.N; ++t) {
        auto& row = q.emplace_back();
        for (Index d = 0; d < s.D; ++d) row.push_back(c.q_at(b, h, t, d));
        row = normalised(row);
      }
      for (Index j = 0; j < s.M; ++j) {
        auto& row = k.emplace_back();
        for (Index d = 0; d < s.D; ++d) row.push_back(c.k_at(b, g, j, d));
        row = normalised(row);
      }
      if (r.shared) k = q;
      std::vector<double> count(static_cast<size_t>(s.N), 0);
      for (Index cluster = 0; cluster < mu.clusters; ++cluster) {
        const auto first = mu.at.begin() + (g * mu.clusters + cluster) * s.D;
        const std::vector<double> centroid(first, first + s.D);
        const List queries = gather(q, centroid, r.cluster_size), keys = gather(k, centroid, r.cluster_size);
        for (const Index t : queries.near) result.undecided[static_cast<size_t>((b * s.Hq + h) * s.N + t)] = 1;
        for (const Index t : queries.tokens) {
          const size_t row = static_cast<size_t>((b * s.Hq + h) * s.N + t);
          if (!keys.near.empty()) result.undecided[row] = 1;
          count[static_cast<size_t>(t)] += 1;
          std::vector<Index> seen;
          for (const Index j : keys.tokens)
            if (!r.causal || j <= position(c, t)) seen.push_back(j);
          if (r.mask_self && seen.size() > 1) std::erase(seen, position(c, t));
          double top = -INFINITY, sum = 0;
          std::vector<double> score;
          for (const Index j : seen) {
            score.push_back(r.scale * product(q[static_cast<size_t>(t)], k[static_cast<size_t>(j)]));
            top = std::max(top, score.back());
          }
          for (double& x : score) sum += x = std::exp(x - top);
          for (size_t i = 0; i < seen.size(); ++i)
            for (Index e = 0; e < s.Dv; ++e)
              result.o[row * static_cast<size_t>(s.Dv) + static_cast<size_t>(e)] +=
                  score[i] / sum * c.v_at(b, g, seen[i], e);
          result.pairs += static_cast<Index>(seen.size());
        }
      }
      for (Index t = 0; t < s.N; ++t)
        for (Index e = 0; e < s.Dv && count[static_cast<size_t>(t)] > 0; ++e)
          result.o[static_cast<size_t>(((b * s.Hq + h) * s.N + t) * s.Dv + e)] /= count[static_cast<size_t>(t)] + r.eps;
    }
  return result;
}

}  // namespace heed::test
