// Attention to blocks of keys at several resolutions, and how blocks come by theirs: straight from the equations, in
// f64.
#pragma once

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <string>
#include <vector>

#include "support/naive.h"

namespace heed::test {

struct PsaOptions {
  Index query_block = 32, block = 16;
  bool threshold = false;
  std::vector<std::pair<int, double>> ratios{{1, .2}, {2, .35}, {4, .5}, {8, .7}};
  double min_full = 0.06;
  Index sample_stride = 4, fold = 8;
  bool cap = false;
  double t2 = 0.7, t4 = 0.65, t8 = 0.6;

  std::string call() const {
    std::string list;
    for (const auto& [z, share] : ratios) list += fmt::format("{}{}:{}", list.empty() ? "" : ",", z, share);
    return fmt::format("psa:query_block={},block={},mode={},ratios={},min_full={},sample_stride={},fold={},"
                       "similarity_cap={},t2={},t4={},t8={}",
                       query_block, block, threshold ? "threshold" : "topk", list, min_full, sample_stride, fold, cap,
                       t2, t4, t8);
  }
};

struct Levels {
  Index queries = 0, keys = 0;       // blocks
  std::vector<std::int32_t> of;      // [B, Hq, queries, keys]
  std::vector<char> undecided;       // [B, Hq, queries]
  std::int32_t at(Index head, Index u, Index k) const {
    return of[static_cast<size_t>((head * queries + u) * keys + k)];
  }
};

/// Every skipped block is masked; in a block of level z, keys and values are replaced by the means of groups of z
/// tokens, once for every token. A causal query sees a group if it stands at its last token or later.
inline Naive naive_levels(const Case& c, const Levels& levels, Index query_block, Index block, bool causal) {
  const auto& s = c.size;
  Naive result;
  result.o.assign(static_cast<size_t>(s.B * s.Hq * s.N * s.Dv), 0);
  result.lse.assign(static_cast<size_t>(s.B * s.Hq * s.N), -INFINITY);
  const auto mean = [](Index from, Index to, const std::function<double(Index)>& at) {
    double sum = 0;
    for (Index t = from; t < to; ++t) sum += at(t);
    return sum / static_cast<double>(to - from);
  };
  for (Index b = 0; b < s.B; ++b)
    for (Index h = 0; h < s.Hq; ++h) {
      const Index g = c.kv_head(h);
      // Means by level, group and feature.
      std::vector<std::vector<double>> k(9), v(9);
      for (const Index z : {1, 2, 4, 8})
        for (Index from = 0; from < s.M; from += z) {
          const Index to = std::min(s.M, from + z);
          for (Index d = 0; d < s.D; ++d)
            k[static_cast<size_t>(z)].push_back(mean(from, to, [&](Index t) { return c.k_at(b, g, t, d); }));
          for (Index e = 0; e < s.Dv; ++e)
            v[static_cast<size_t>(z)].push_back(mean(from, to, [&](Index t) { return c.v_at(b, g, t, e); }));
        }
      for (Index t = 0; t < s.N; ++t) {
        const size_t row = static_cast<size_t>((b * s.Hq + h) * s.N + t);
        std::vector<double> weight, q;
        std::vector<const double*> value;
        for (Index d = 0; d < s.D; ++d) q.push_back(c.q_at(b, h, t, d));
        double top = -INFINITY;
        for (Index j = 0; j < s.M; ++j) {
          const Index z = levels.at(b * s.Hq + h, t / query_block, j / block);
          if (z == 0) continue;
          const Index group = j / z, last = std::min(s.M, (group + 1) * z) - 1;
          if (causal && last > t) continue;
          if (j == group * z) ++result.pairs;
          double x = 0;
          for (Index d = 0; d < s.D; ++d)
            x += q[static_cast<size_t>(d)] * k[static_cast<size_t>(z)][static_cast<size_t>(group * s.D + d)];
          weight.push_back(x / std::sqrt(static_cast<double>(s.D)));
          value.push_back(&v[static_cast<size_t>(z)][static_cast<size_t>(group * s.Dv)]);
          top = std::max(top, weight.back());
        }
        double sum = 0;
        for (double& w : weight) sum += w = std::exp(w - top);
        for (size_t i = 0; i < weight.size(); ++i)
          for (Index e = 0; e < s.Dv; ++e)
            result.o[row * static_cast<size_t>(s.Dv) + static_cast<size_t>(e)] += weight[i] / sum * value[i][e];
        if (!weight.empty()) result.lse[row] = top + std::log(sum);
      }
    }
  if (!levels.undecided.empty())
    for (Index i = 0; i < s.B * s.Hq * s.N; ++i)
      result.undecided.push_back(
          levels.undecided[static_cast<size_t>(i / s.N * levels.queries + i % s.N / query_block)]);
  return result;
}

/// Steps 3 to 5 of the method, query block by query block.
inline Levels naive_select(const Case& c, const PsaOptions& o, bool causal) {
  const auto& s = c.size;
  const Index n = s.N;
  const double scale = 1 / std::sqrt(static_cast<double>(s.D));
  Levels levels{.queries = (n + o.query_block - 1) / o.query_block,
                .keys = (n + o.block - 1) / o.block,
                .of = {},
                .undecided = {}};
  for (Index b = 0; b < s.B; ++b)
    for (Index h = 0; h < s.Hq; ++h) {
      const Index g = c.kv_head(h);
      const auto dot = [&](Index i, Index j) {
        double x = 0;
        if (i < n && j < n)
          for (Index d = 0; d < s.D; ++d) x += c.q_at(b, h, i, d) * c.k_at(b, g, j, d);
        return x * scale;
      };
      const auto cosine = [&](Index i, Index j) {
        double xy = 0, xx = 0, yy = 0;
        for (Index d = 0; d < s.D; ++d) {
          const double x = c.k_at(b, g, i, d), y = c.k_at(b, g, j, d);
          xy += x * y, xx += x * x, yy += y * y;
        }
        return xy / std::sqrt(xx * yy);
      };
      for (Index u = 0; u < levels.queries; ++u) {
        const Index begin = u * o.query_block, end = std::min(n, begin + o.query_block);
        const Index seen = causal ? (end + o.block - 1) / o.block : levels.keys;
        std::vector<double> importance(static_cast<size_t>(seen), 0);
        const auto is_sampled = [&](Index t, Index size) { return t % size % o.sample_stride == 0; };
        for (Index i = begin; !causal && i < end; ++i) {
          if (!is_sampled(i, o.query_block)) continue;
          std::vector<double> x;
          for (Index j = 0; j < n; ++j) x.push_back(is_sampled(j, o.block) ? dot(i, j) : -INFINITY);
          const double top = *std::max_element(x.begin(), x.end());
          for (Index j = 0; j < n; ++j) {
            double& y = importance[static_cast<size_t>(j / o.block)];
            y = std::max(y, std::exp(x[static_cast<size_t>(j)] - top));
          }
        }
        for (Index i = begin / o.fold; causal && i * o.fold < end; ++i) {
          std::vector<double> x;
          double sum = 0;
          for (Index j = 0; j <= i; ++j) {
            double y = 0;
            for (Index t = 0; t < o.fold; ++t) y += dot(i * o.fold + o.fold - 1 - t, j * o.fold + t);
            x.push_back(std::exp(y / static_cast<double>(o.fold)));
            sum += x.back();
          }
          for (Index j = 0; j <= i; ++j)
            importance[static_cast<size_t>(j * o.fold / o.block)] += x[static_cast<size_t>(j)] / sum;
        }

        std::vector<Index> order;
        double total = 0;
        for (Index k = 0; k < seen; ++k) order.push_back(k), total += importance[static_cast<size_t>(k)];
        const auto rank = [&](size_t i) { return importance[static_cast<size_t>(order[i])]; };
        std::stable_sort(order.begin(), order.end(), [&](Index i, Index j) {
          return importance[static_cast<size_t>(i)] > importance[static_cast<size_t>(j)];
        });
        bool near = false;
        const auto part = [&](double share) {
          return static_cast<Index>(std::floor(share * static_cast<double>(seen) + 1e-9));
        };
        std::vector<std::int32_t> row(static_cast<size_t>(levels.keys), 0);
        Index at = 0;
        std::vector<std::pair<int, double>> ratios = o.ratios;
        if (ratios.front().first != 1) ratios.insert(ratios.begin(), {1, 0.0});  // some block is always in full
        for (const auto& [z, share] : ratios) {
          Index stop = part(share);
          if (o.threshold) {
            Index within = 0;
            double sum = 0;
            for (size_t i = 0; i < order.size(); ++i) {
              sum += rank(i);
              if (sum / total <= share + 1e-6) ++within;
              if (std::fabs(sum / total - share - 1e-6) < 1e-5 && share < 1) near = true;
            }
            stop = within == 0 ? at : within + 1;
          }
          if (z == 1) stop = std::max(stop, o.threshold ? part(o.min_full) + 1 : 1);
          stop = std::clamp(stop, at, seen);
          for (; at < stop; ++at) row[static_cast<size_t>(order[static_cast<size_t>(at)])] = z;
          // Every sampled row gives its own best block exactly 1, so equals are common; they are decided by index,
          // unless a row's second best comes so near that rounding may exchange the two.
          if (at == 0 || at == seen) continue;
          const double above = rank(static_cast<size_t>(at - 1)), below = rank(static_cast<size_t>(at));
          const bool equal =
              !causal && above == 1 && below == 1 &&
              std::none_of(importance.begin(), importance.end(), [](double x) { return x < 1 && x > 1 - 1e-4; });
          near = near || (!equal && std::log(above / below) < 1e-4);
        }
        for (Index k = 0; k < levels.keys; ++k) {
          const Index first = k * o.block, last = std::min(n, first + o.block);
          std::int32_t& level = row[static_cast<size_t>(k)];
          std::int32_t most = o.cap ? 1 : 8;
          for (const auto& [z, bound] : {std::pair{2, o.t2}, {4, o.t4}, {8, o.t8}}) {
            if (!o.cap || last - first < z) continue;
            double sum = 0;
            Index groups = 0;
            for (Index t = first; t + z <= last; t += z) sum += cosine(t, t + z - 1), ++groups;
            if (sum / static_cast<double>(groups) > bound) most = z;
            near = near || std::fabs(sum / static_cast<double>(groups) - bound) < 1e-5;
          }
          level = std::min(level, most);
          if (causal && (k == 0 || (first < end && last > begin))) level = 1;
          levels.of.push_back(level);
        }
        levels.undecided.push_back(near ? 1 : 0);
      }
    }
  return levels;
}

}  // namespace heed::test
