#include "support/naive.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <memory>

namespace heed::test {

Naive naive_attention(const Case& c, const Sees& sees, const NaiveOptions& options) {
  const auto& s = c.size;
  const double scale = options.scale != 0 ? options.scale : 1 / std::sqrt(static_cast<double>(s.D));
  Naive result;
  result.o.assign(static_cast<size_t>(s.B * s.Hq * s.N * s.Dv), 0);
  result.lse.assign(static_cast<size_t>(s.B * s.Hq * s.N), -INFINITY);
  // One head's keys and values, widened once.
  std::vector<double> keys(static_cast<size_t>(s.M * s.D)), values(static_cast<size_t>(s.M * s.Dv));
  std::vector<double> query(static_cast<size_t>(s.D)), score(static_cast<size_t>(s.M));
  std::vector<Index> seen;
  for (Index b = 0; b < s.B; ++b)
    for (Index h = 0; h < s.Hq; ++h) {
      const Index g = c.kv_head(h);
      for (Index j = 0; j < s.M; ++j) {
        for (Index d = 0; d < s.D; ++d) keys[static_cast<size_t>(j * s.D + d)] = c.k_at(b, g, j, d);
        for (Index e = 0; e < s.Dv; ++e) values[static_cast<size_t>(j * s.Dv + e)] = c.v_at(b, g, j, e);
      }
      for (Index t = 0; t < s.N; ++t) {
        const size_t row = static_cast<size_t>((b * s.Hq + h) * s.N + t);
        for (Index d = 0; d < s.D; ++d) query[static_cast<size_t>(d)] = c.q_at(b, h, t, d);
        double top = options.sinks.empty() ? -INFINITY : options.sinks[static_cast<size_t>(h)];
        seen.clear();
        for (Index j = 0; j < s.M; ++j) {
          if (!sees(b, h, t, j)) continue;
          double x = 0;
          for (Index d = 0; d < s.D; ++d) x += query[static_cast<size_t>(d)] * keys[static_cast<size_t>(j * s.D + d)];
          x *= scale;
          if (options.change) x = options.change(b, h, t, j, x);
          score[static_cast<size_t>(j)] = x;
          seen.push_back(j);
          top = std::max(top, x);
        }
        result.pairs += static_cast<Index>(seen.size());
        if (top == -INFINITY) continue;
        double sum = options.sinks.empty() ? 0 : std::exp(options.sinks[static_cast<size_t>(h)] - top);
        double* o = &result.o[row * static_cast<size_t>(s.Dv)];
        for (const Index j : seen) {
          const double p = std::exp(score[static_cast<size_t>(j)] - top);
          sum += p;
          for (Index e = 0; e < s.Dv; ++e) o[e] += p * values[static_cast<size_t>(j * s.Dv + e)];
        }
        for (Index e = 0; e < s.Dv; ++e) o[e] /= sum;
        result.lse[row] = top + std::log(sum);
      }
    }
  return result;
}

Index document_start(const Case& c, const Docs& docs, Index b, Index j) {
  if (docs.empty()) return 0;
  const std::int32_t* ids = &docs[static_cast<size_t>(b * c.size.M)];
  while (j > 0 && ids[j - 1] == ids[j]) --j;
  return j;
}

bool same_document(const Case& c, const Docs& docs, Index b, Index i, Index j) {
  return docs.empty() || docs[static_cast<size_t>(b * c.size.M + i)] == docs[static_cast<size_t>(b * c.size.M + j)];
}

Sees dense_sees(const Case& c, bool causal) {
  return [&c, causal](Index, Index, Index t, Index j) { return !causal || j <= position(c, t); };
}

Sees streaming_sees(const Case& c, Index sink, Index window, const Docs& docs) {
  return [&c, sink, window, docs](Index b, Index, Index t, Index j) {
    const Index p = position(c, t);
    if (j > p || !same_document(c, docs, b, p, j)) return false;
    return p - j < window || j - document_start(c, docs, b, j) < sink;
  };
}

Sees power_sees(const Case& c, Index block, Index window_blocks, Index sink_blocks) {
  return [&c, block, window_blocks, sink_blocks](Index, Index, Index t, Index j) {
    const Index p = position(c, t);
    if (j > p) return false;
    const Index distance = p / block - j / block;
    bool power = distance == 0;
    for (Index x = 1; x <= distance; x += x) power = power || x == distance;
    return distance < window_blocks || power || j / block < sink_blocks;
  };
}

MobaChoice moba_sees(const Case& c, const MobaOptions& options, const Docs& docs) {
  const auto& s = c.size;
  const Index block = options.block;
  // chosen[row] holds the first positions of the chosen past blocks.
  auto chosen = std::make_shared<std::vector<std::vector<Index>>>(static_cast<size_t>(s.B * s.Hq * s.N));
  MobaChoice result;
  result.undecided.assign(chosen->size(), 0);
  // Complete blocks of every KV head: first position and mean key. They restart at documents.
  struct Block {
    Index first, document;
    std::vector<double> mean;
  };
  std::vector<std::vector<Block>> blocks(static_cast<size_t>(s.B * s.Hk));
  for (Index b = 0; b < s.B; ++b)
    for (Index g = 0; g < s.Hk; ++g)
      for (Index j = 0; j < s.M; ++j) {
        const Index start = document_start(c, docs, b, j);
        if ((j - start) % block != block - 1) continue;  // not the last token of a block
        Block& x = blocks[static_cast<size_t>(b * s.Hk + g)].emplace_back(Block{j - block + 1, start, {}});
        for (Index d = 0; d < s.D; ++d) {
          double sum = 0;
          for (Index i = x.first; i <= j; ++i) sum += c.k_at(b, g, i, d);
          x.mean.push_back(sum / static_cast<double>(block));
        }
      }
  for (Index b = 0; b < s.B; ++b)
    for (Index h = 0; h < s.Hq; ++h)
      for (Index t = 0; t < s.N; ++t) {
        const size_t row = static_cast<size_t>((b * s.Hq + h) * s.N + t);
        const Index p = position(c, t), start = document_start(c, docs, b, p);
        const Index own = start + (p - start) / block * block;
        std::vector<std::pair<double, Index>> scored;
        for (const Block& x : blocks[static_cast<size_t>(b * s.Hk + c.kv_head(h))]) {
          if (x.document != start || x.first >= own) continue;
          double score = 0;
          for (Index d = 0; d < s.D; ++d) score += x.mean[static_cast<size_t>(d)] * c.q_at(b, h, t, d);
          scored.emplace_back(score, x.first);
        }
        std::sort(scored.begin(), scored.end(), [&](const auto& x, const auto& y) {
          if (x.first != y.first) return x.first > y.first;
          return options.higher ? x.second > y.second : x.second < y.second;
        });
        const size_t keep = static_cast<size_t>(options.top_k - 1);
        if (keep > 0 && scored.size() > keep && scored[keep - 1].first - scored[keep].first < options.margin)
          result.undecided[row] = 1;
        if (scored.size() > keep) scored.resize(keep);
        for (const auto& [score, first] : scored) (*chosen)[row].push_back(first);
      }
  result.sees = [&c, options, docs, chosen](Index b, Index h, Index t, Index j) {
    const Index p = position(c, t);
    if (j > p || !same_document(c, docs, b, p, j)) return false;
    const Index start = document_start(c, docs, b, p), own = start + (p - start) / options.block * options.block;
    if (j >= own || j - start < options.sink) return true;
    for (const Index first : (*chosen)[static_cast<size_t>((b * c.size.Hq + h) * c.size.N + t)])
      if (j >= first && j < first + options.block) return true;
    return false;
  };
  return result;
}

Naive naive_moba(const Case& c, const MobaOptions& options, const Docs& docs) {
  MobaChoice choice = moba_sees(c, options, docs);
  Naive result = naive_attention(c, choice.sees);
  result.undecided = std::move(choice.undecided);
  return result;
}

std::string difference(const Got& got, const Naive& want, const Case& c, double tolerance) {
  const auto& s = c.size;
  if (got.o.size() != want.o.size() || got.lse.size() != want.lse.size()) return "sizes differ";
  for (Index lane = 0; lane < s.B * s.Hq; ++lane) {
    double largest = 0;
    for (Index i = lane * s.N * s.Dv; i < (lane + 1) * s.N * s.Dv; ++i)
      largest = std::max(largest, std::fabs(want.o[static_cast<size_t>(i)]));
    for (Index t = 0; t < s.N; ++t) {
      const size_t row = static_cast<size_t>(lane * s.N + t);
      if (!want.undecided.empty() && want.undecided[row] != 0) continue;
      const double l = got.lse[row], wl = want.lse[row];
      const bool lse_agrees = wl == -INFINITY ? l == wl : std::fabs(l - wl) <= tolerance * std::max(1.0, std::fabs(wl));
      if (!lse_agrees)
        return fmt::format("lse of batch {} head {} query {}: {} instead of {}", lane / s.Hq, lane % s.Hq, t, l, wl);
      for (Index e = 0; e < s.Dv; ++e) {
        const size_t i = row * static_cast<size_t>(s.Dv) + static_cast<size_t>(e);
        // Written so that a NaN fails.
        if (!(std::fabs(got.o[i] - want.o[i]) <= tolerance * largest))
          return fmt::format("o of batch {} head {} query {} feature {}: {} instead of {}, largest {}", lane / s.Hq,
                             lane % s.Hq, t, e, got.o[i], want.o[i], largest);
      }
    }
  }
  return "";
}

double tolerance(DType arithmetic) { return arithmetic == DType::bf16 ? 2e-2 : 2e-5; }

}  // namespace heed::test
