// Chunks, pooled scores, lists under a budget and softmax over them: straight from the equations, in f64.
#pragma once

#include <doctest/doctest.h>
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <memory>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "support/boundary_predictor.h"
#include "support/naive.h"

namespace heed::test {

struct DhsaOptions {
  Index budget = 60, query_block = 32, chunks_per_block = 4, half_window = 4, nms_radius = 3;
  double threshold = 0.5;
  Index global = 8, local = 16, dense_tail = 10;
  std::string pooling = "avg_norm";
  bool strict = false;
  std::string call() const {
    return fmt::format("dhsa:budget={},query_block={},chunks_per_block={},half_window={},nms_radius={},threshold={},"
                       "global={},local={},"
                       "dense_tail={},pooling={},strict_causal={}",
                       budget, query_block, chunks_per_block, half_window, nms_radius, threshold, global, local,
                       dense_tail, pooling, strict);
  }
};

using Logits = std::vector<float>;  // [B, N], or nothing

inline Logits random_logits(Index count, std::uint64_t seed) {
  std::mt19937_64 random(seed);
  std::normal_distribution<float> normal;
  Logits x(static_cast<size_t>(count));
  for (float& v : x) v = 2 * normal(random);
  return x;
}

// First tokens of the chunks and N.
inline std::vector<Index> boundaries(const DhsaOptions& o, const float* logits, Index n) {
  std::set<Index> found{0, n};
  if (logits == nullptr) {
    for (Index at = 0; at < n; at += o.query_block / o.chunks_per_block) found.insert(at);
    return {found.begin(), found.end()};
  }
  const Index most = n / o.query_block * o.chunks_per_block, question = n - o.dense_tail;
  std::vector<Index> accepted, order;
  if (o.dense_tail > 0 && question >= 0) accepted.push_back(question);
  for (Index i = 0; i < n; ++i) {
    if (i < o.half_window - 1 || i >= n - o.half_window) continue;
    if (logits[i] > o.threshold && !(o.dense_tail > 0 && i > question)) order.push_back(i);
  }
  if (!o.strict) std::stable_sort(order.begin(), order.end(), [&](Index i, Index j) { return logits[i] > logits[j]; });
  for (const Index i : order) {
    if (!o.strict && static_cast<Index>(accepted.size()) >= most) break;
    // So many ends as the tokens so far are worth, the question's not among them.
    const Index before = std::count_if(accepted.begin(), accepted.end(), [&](Index j) { return j < i; });
    if (o.strict && before >= (i + 1) * o.chunks_per_block / o.query_block) continue;
    bool free = true;
    for (const Index j : accepted) free = free && std::abs(i - j) > o.nms_radius;
    if (free) accepted.push_back(i);
  }
  for (const Index i : accepted) found.insert(i + 1);
  return {found.begin(), found.end()};
}

inline Naive naive_dhsa(const Case& c, const DhsaOptions& o, const Logits& logits) {
  const auto& s = c.size;
  const Index n = s.N, blocks = (n + o.query_block - 1) / o.query_block;
  auto lists = std::make_shared<std::vector<std::set<Index>>>();
  std::vector<char> near(static_cast<size_t>(s.B * blocks), 0);
  for (Index b = 0; b < s.B; ++b) {
    const std::vector<Index> cuts = boundaries(o, logits.empty() ? nullptr : logits.data() + b * n, n);
    // A vector for tokens [from, to), head means first.
    const auto pooled = [&](Index from, Index to, Index heads, const std::function<double(Index, Index, Index)>& at) {
      std::vector<double> x(static_cast<size_t>(s.D), o.pooling == "max" ? -INFINITY : 0.0);
      for (Index t = from; t < to; ++t)
        for (Index d = 0; d < s.D; ++d) {
          double mean = 0;
          for (Index h = 0; h < heads; ++h) mean += at(h, t, d) / static_cast<double>(heads);
          double& y = x[static_cast<size_t>(d)];
          y = o.pooling == "max" ? std::max(y, mean) : y + mean / static_cast<double>(to - from);
        }
      if (o.pooling == "avg_norm")
        for (double& y : x) y *= std::sqrt(static_cast<double>(to - from));
      return x;
    };
    std::vector<std::vector<double>> chunk;
    for (size_t i = 0; i + 1 < cuts.size(); ++i)
      chunk.push_back(
          pooled(cuts[i], cuts[i + 1], s.Hk, [&](Index h, Index t, Index d) { return c.k_at(b, h, t, d); }));
    for (Index u = 0; u < blocks; ++u) {
      std::set<Index>& list = lists->emplace_back();
      const Index allowed = std::min(n, (u + 1) * o.query_block);
      if (allowed <= o.budget) {
        for (Index j = 0; j < allowed; ++j) list.insert(j);
        continue;
      }
      const std::vector<double> query =
          pooled(u * o.query_block, allowed, s.Hq, [&](Index h, Index t, Index d) { return c.q_at(b, h, t, d); });
      for (Index j = 0; j < o.global; ++j) list.insert(j);
      for (Index j = allowed - o.local; j < allowed; ++j) list.insert(j);
      struct Scored {
        double score;
        std::vector<Index> tokens;
      };
      std::vector<Scored> scored;
      for (size_t i = 0; i < chunk.size(); ++i) {
        Scored x{0, {}};
        const bool cut = o.strict && cuts[i] < allowed && allowed < cuts[i + 1];
        const std::vector<double> visible =
            cut ? pooled(cuts[i], allowed, s.Hk, [&](Index h, Index t, Index d) { return c.k_at(b, h, t, d); })
                : chunk[i];
        for (Index d = 0; d < s.D; ++d) x.score += visible[static_cast<size_t>(d)] * query[static_cast<size_t>(d)];
        for (Index j = cuts[i]; j < std::min(cuts[i + 1], allowed); ++j)
          if (list.count(j) == 0) x.tokens.push_back(j);
        if (!x.tokens.empty()) scored.push_back(x);
      }
      std::stable_sort(scored.begin(), scored.end(),
                       [](const Scored& x, const Scored& y) { return x.score > y.score; });
      for (size_t i = 0; i < scored.size() && static_cast<Index>(list.size()) < o.budget; ++i) {
        for (const Index j : scored[i].tokens)
          if (static_cast<Index>(list.size()) < o.budget) list.insert(j);
        // The chunk that fills the budget must stand clear of its neighbours in rank.
        if (static_cast<Index>(list.size()) < o.budget) continue;
        const double margin = 1e-4 * std::max(1.0, std::fabs(scored[i].score));
        if (i > 0 && scored[i - 1].score - scored[i].score < margin) near[static_cast<size_t>(b * blocks + u)] = 1;
        if (i + 1 < scored.size() && scored[i].score - scored[i + 1].score < margin)
          near[static_cast<size_t>(b * blocks + u)] = 1;
      }
      CHECK(static_cast<Index>(list.size()) == o.budget);
    }
  }
  const auto dense = [n, o](Index t) { return t >= n - o.dense_tail; };
  Naive result = naive_attention(c, [&c, o, blocks, lists, dense](Index b, Index, Index t, Index j) {
    return j <= t && (dense(t) || (*lists)[static_cast<size_t>(b * blocks + t / o.query_block)].count(j) != 0);
  });
  result.undecided.assign(static_cast<size_t>(s.B * s.Hq * n), 0);
  for (Index b = 0; b < s.B; ++b)
    for (Index h = 0; h < s.Hq; ++h)
      for (Index t = 0; t < n; ++t)
        result.undecided[static_cast<size_t>((b * s.Hq + h) * n + t)] =
            !dense(t) && near[static_cast<size_t>(b * blocks + t / o.query_block)] != 0;
  return result;
}

inline AttendInput with(const Case& c, const Logits& logits) {
  AttendInput in = c.input();
  if (!logits.empty()) in.extra["boundary_logits"] = {logits.data(), DType::f32, {c.size.B, c.size.N}};
  return in;
}

}  // namespace heed::test
