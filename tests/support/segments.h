// A sequence of segments whose keys are alike, and queries that ask for one of them: what chunks are for.
#pragma once

#include <algorithm>
#include <random>
#include <vector>

#include "support/cases.h"
#include "support/naive.h"

namespace heed::test {

/// Segments of 8 … 64 tokens, keys = centroid + noise; each block of queries asks for one earlier segment.
struct Segments {
  Index block;
  Case c;
  std::vector<Index> segment_of, wanted;  // of each token; by each block

  Segments(Index n, Index features, Index rows, std::mt19937_64& random)
      : block(rows), c({1, 1, 1, n, n, features, 1}), segment_of(static_cast<size_t>(n)) {
    std::normal_distribution<double> normal;
    std::vector<std::vector<double>> centre;
    for (Index begin = 0, id = 0; begin < n; ++id) {
      const Index end = std::min<Index>(n, begin + 8 + static_cast<Index>(random() % 57));
      std::vector<double> x;
      for (Index i = 0; i < features; ++i) x.push_back(normal(random));
      centre.push_back(x);
      for (Index j = begin; j < end; ++j) {
        segment_of[static_cast<size_t>(j)] = id;
        for (Index i = 0; i < features; ++i) c.k.set(0, 0, j, i, x[static_cast<size_t>(i)] + normal(random));
      }
      begin = end;
    }
    for (Index u = 0; u < n / block; ++u) {
      const Index id =
          segment_of[static_cast<size_t>(random() % static_cast<std::uint64_t>(std::max<Index>(1, u * block)))];
      wanted.push_back(id);
      for (Index t = u * block; t < (u + 1) * block; ++t)
        for (Index i = 0; i < features; ++i)
          c.q.set(0, 0, t, i, centre[static_cast<size_t>(id)][static_cast<size_t>(i)] + 0.5 * normal(random));
    }
  }
  bool ends_after(Index token) const {
    return token + 1 == c.size.N ||
           segment_of[static_cast<size_t>(token)] != segment_of[static_cast<size_t>(token + 1)];
  }
  /// The share of the wanted segment that a block's last row sees, the mean over blocks from row `from` on.
  double recall(const Plan& plan, Index from) const {
    double sum = 0;
    Index asked = 0;
    walk(plan, [&](const RowBlock& rows, const std::vector<Tile>& tiles) {
      if (rows.first < from) return;
      const Index id = wanted[static_cast<size_t>(rows.first / block)];
      const auto size = std::count(segment_of.begin(), segment_of.end(), id);
      Index held = 0;
      for (const Tile& tile : tiles)
        for (Index r = 0; r < tile.columns.count; ++r)
          held += segment_of[static_cast<size_t>(tile.columns[r])] == id && sees(plan, rows, tile, rows.rows - 1, r)
                      ? 1
                      : 0;
      sum += static_cast<double>(held) / static_cast<double>(size), ++asked;
    });
    return sum / static_cast<double>(asked);
  }
};

}  // namespace heed::test
