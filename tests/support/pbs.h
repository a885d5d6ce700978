// Importance, segmented sort, pooled blocks, cumulative choice, causal own segments: step by step, in f64.
#pragma once

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <set>
#include <string>
#include <vector>

#include "support/naive.h"

namespace heed::test {

struct Pbs {
  Index block = 16, segment = 64;
  double mass = 0.6;
  bool force_first = true, largest = false;
  std::string call() const {
    return fmt::format("pbs-attn:block={},segment={},mass={},force_first={},pool={}", block, segment, mass, force_first,
                       largest ? "max" : "mean");
  }
};

/// One head: keys by falling importance inside each complete segment. `near`: a block's edge is nearly a tie.
inline std::vector<Index> sorted_keys(const Case& c, const Pbs& o, Index b, Index h, bool& near) {
  const Index n = c.size.N, keys = n / o.segment * o.segment, rows = std::min(o.block, n), g = c.kv_head(h);
  std::vector<double> importance(static_cast<size_t>(keys), 0);
  for (Index t = n - rows; t < n; ++t) {
    std::vector<double> score;
    double sum = 0;
    for (Index j = 0; j < keys; ++j) {
      double x = 0;
      for (Index d = 0; d < c.size.D; ++d) x += c.q_at(b, h, t, d) * c.k_at(b, g, j, d);
      score.push_back(std::exp(x / std::sqrt(static_cast<double>(c.size.D))));
      sum += score.back();
    }
    for (size_t j = 0; j < score.size(); ++j) importance[j] += score[j] / sum / static_cast<double>(rows);
  }
  std::vector<Index> order(importance.size());
  std::iota(order.begin(), order.end(), Index{0});
  const auto at = [&](Index j) { return importance[static_cast<size_t>(j)]; };
  for (Index s = 0; s < keys; s += o.segment) {
    const auto begin = order.begin() + s;
    std::stable_sort(begin, begin + o.segment, [&](Index i, Index j) { return at(i) > at(j); });
    for (Index e = o.block; e < o.segment; e += o.block)
      near = near || at(begin[e - 1]) - at(begin[e]) < 2e-5 * at(begin[e]);
  }
  return order;
}

/// Whom each query sees, and the rows [B, Hq, N] whose choice is nearly a tie.
struct PbsChoice {
  Sees sees;
  std::vector<char> undecided;
};

inline PbsChoice pbs_sees(const Case& c, const Pbs& o) {
  const auto& s = c.size;
  const Index n = s.N, query_blocks = (n + o.block - 1) / o.block;
  std::vector<char> undecided(static_cast<size_t>(s.B * s.Hq * n), 0);
  // seen[(b·Hq + h)·query blocks + a][j]: a key of an earlier segment.
  std::vector<std::vector<char>> seen;
  const auto pool = [&](const std::vector<std::vector<double>>& rows) {
    std::vector<double> out = rows[0];
    for (size_t i = 1; i < rows.size(); ++i)
      for (size_t d = 0; d < out.size(); ++d) out[d] = o.largest ? std::max(out[d], rows[i][d]) : out[d] + rows[i][d];
    if (!o.largest)
      for (double& x : out) x /= static_cast<double>(rows.size());
    return out;
  };
  for (Index b = 0; b < s.B; ++b)
    for (Index h = 0; h < s.Hq; ++h) {
      bool near = false;
      const std::vector<Index> order = sorted_keys(c, o, b, h, near);
      std::vector<std::vector<double>> keys;
      size_t first_block = 0;
      for (size_t k = 0; (k + 1) * static_cast<size_t>(o.block) <= order.size(); ++k) {
        std::vector<std::vector<double>> rows;
        for (Index i = 0; i < o.block; ++i) {
          const Index j = order[k * static_cast<size_t>(o.block) + static_cast<size_t>(i)];
          if (j == 0) first_block = k;
          auto& row = rows.emplace_back();
          for (Index d = 0; d < s.D; ++d) row.push_back(c.k_at(b, c.kv_head(h), j, d));
        }
        keys.push_back(pool(rows));
      }
      for (Index a = 0; a < query_blocks; ++a) {
        auto& flags = seen.emplace_back(static_cast<size_t>(n), 0);
        const Index begin = a * o.block, end = std::min(n, begin + o.block), own = begin / o.segment;
        const size_t past = static_cast<size_t>(own * o.segment / o.block);
        if (past == 0) continue;
        std::vector<std::vector<double>> rows;
        for (Index t = begin; t < end; ++t) {
          auto& row = rows.emplace_back();
          for (Index d = 0; d < s.D; ++d) row.push_back(c.q_at(b, h, t, d));
        }
        const std::vector<double> query = pool(rows);
        std::vector<std::pair<double, size_t>> p;
        double sum = 0;
        for (size_t k = 0; k < past; ++k) {
          double x = 0;
          for (size_t d = 0; d < query.size(); ++d) x += query[d] * keys[k][d];
          x /= std::sqrt(static_cast<double>(s.D));
          p.emplace_back(-x, k);
        }
        std::sort(p.begin(), p.end());
        for (const auto& x : p) sum += std::exp(-x.first + p[0].first);
        double reached = 0;
        size_t count = 0;
        bool close = false;
        while (count < past && (o.mass >= 1 || reached < o.mass)) {
          reached += std::exp(-p[count].first + p[0].first) / sum;
          ++count;
          close = close || (o.mass < 1 && std::fabs(reached - o.mass) < 1e-4);
        }
        close = close || (count < past && p[count].first - p[count - 1].first < 1e-4);
        std::set<size_t> chosen;
        for (size_t i = 0; i < count; ++i) chosen.insert(p[i].second);
        if (o.force_first) chosen.insert(first_block);
        for (const size_t k : chosen)
          for (Index i = 0; i < o.block; ++i)
            flags[static_cast<size_t>(order[k * static_cast<size_t>(o.block) + static_cast<size_t>(i)])] = 1;
        if (close || (near && o.mass < 1))
          for (Index t = begin; t < end; ++t) undecided[static_cast<size_t>((b * s.Hq + h) * n + t)] = 1;
      }
    }
  const auto sees = [seen, o, query_blocks, heads = s.Hq](Index b, Index h, Index t, Index j) {
    if (j > t) return false;
    if (j / o.segment == t / o.segment) return true;
    return seen[static_cast<size_t>((b * heads + h) * query_blocks + t / o.block)][static_cast<size_t>(j)] != 0;
  };
  return {sees, undecided};
}

inline Naive naive_pbs(const Case& c, const Pbs& o) {
  const PbsChoice choice = pbs_sees(c, o);
  Naive result = naive_attention(c, choice.sees);
  result.undecided = choice.undecided;
  return result;
}

}  // namespace heed::test
