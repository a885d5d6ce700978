// Windows on grids straight from their definition, as predicates on pairs of tokens.
#pragma once

#include <fmt/ranges.h>

#include <algorithm>
#include <string>
#include <vector>

#include "support/naive.h"

namespace heed::test {

/// One value per axis of the grid, as many as it has.
struct Neighborhood {
  std::vector<Index> grid, kernel, stride, dilation, causal;

  Index tokens() const {
    Index n = 1;
    for (const Index length : grid) n *= length;
    return n;
  }
  /// "natten:grid=5x6,kernel_size=…", with the stride for gna.
  std::string call(const std::string& name) const {
    const auto text = [](const std::vector<Index>& x) { return fmt::format("{}", fmt::join(x, "x")); };
    return fmt::format("{}:grid={},kernel_size={},dilation={},is_causal={}{}", name, text(grid), text(kernel),
                       text(dilation), text(causal), name == "gna" ? ",stride=" + text(stride) : "");
  }
};

/// Coordinates of a token, row-major.
inline std::vector<Index> coordinates(const std::vector<Index>& grid, Index token) {
  std::vector<Index> x(grid.size());
  for (size_t a = grid.size(); a-- > 0; token /= grid[a]) x[a] = token % grid[a];
  return x;
}

/// Along one axis: does token x see token y?
inline bool axis_sees(Index length, Index k, Index s, Index d, bool causal, Index x, Index y) {
  if (x % d != y % d) return false;
  Index members = 0;
  for (Index t = x % d; t < length; t += d) ++members;
  const Index i = x / d, j = y / d, group = i / s;
  if (causal) {
    const Index leader = std::min((group + 1) * s, members) - 1;
    return j <= i && j > leader - k;
  }
  // The window of the group's leader, pushed inside [0, members).
  const Index leader = std::min(group * s + s / 2, members - 1);
  const Index start = std::min(std::max<Index>(leader - k / 2, 0), members - k);
  return start <= j && j < start + k;
}

inline bool sees(const Neighborhood& n, Index from, Index to) {
  const std::vector<Index> x = coordinates(n.grid, from), y = coordinates(n.grid, to);
  bool all = true;
  for (size_t a = 0; a < n.grid.size(); ++a)
    all = all && axis_sees(n.grid[a], n.kernel[a], n.stride[a], n.dilation[a], n.causal[a] != 0, x[a], y[a]);
  return all;
}

/// The visibility as a table, as predicates on coordinates are slow.
inline Sees neighborhood_sees(const Neighborhood& n) {
  const Index tokens = n.tokens();
  std::vector<bool> table(static_cast<size_t>(tokens * tokens));
  for (Index i = 0; i < tokens; ++i)
    for (Index j = 0; j < tokens; ++j) table[static_cast<size_t>(i * tokens + j)] = sees(n, i, j);
  return [table, tokens](Index, Index, Index t, Index j) {
    return static_cast<bool>(table[static_cast<size_t>(t * tokens + j)]);
  };
}

/// Attention to `c`'s keys that `sees` allows and to all keys of `extra`, which has the same queries.
inline Naive naive_with_extra(const Case& c, const Sees& sees, const Case& extra) {
  const Naive a = naive_attention(c, sees), b = naive_attention(extra, dense_sees(extra, false));
  Naive both = a;
  both.pairs += b.pairs;
  for (size_t row = 0; row < a.lse.size(); ++row) {
    const double most = std::max(a.lse[row], b.lse[row]);
    const double wa = std::exp(a.lse[row] - most), wb = std::exp(b.lse[row] - most);
    both.lse[row] = most + std::log(wa + wb);
    for (size_t e = 0; e < static_cast<size_t>(c.size.Dv); ++e) {
      const size_t i = row * static_cast<size_t>(c.size.Dv) + e;
      both.o[i] = (wa * a.o[i] + wb * b.o[i]) / (wa + wb);
    }
  }
  return both;
}

}  // namespace heed::test
