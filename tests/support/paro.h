// PAROAttention straight from its definition, in f64: the whole softmax map, its blocks under every order, the mask,
// and attention over what the mask keeps; and queries and keys with patterns to find.
#pragma once

#include <array>
#include <numeric>

#include "heed/base/random.h"
#include "heed/mechanism/paro_calibration.h"
#include "support/grids.h"

namespace heed::test {

struct Paro {
  std::vector<Index> grid;
  Index text = 0, block = 16;
  double density = 0.4, alpha = 0.5, eps = 1e-3, sigma = 0.9;

  Index tokens() const {
    Index n = text;
    Index product = 1;
    for (const Index length : grid) product *= length;
    return n + product;
  }
  std::string call() const {
    return fmt::format("paro:grid={},text_len={},block={},density={},alpha={},eps={},sigma={}", fmt::join(grid, "x"),
                       text, block, density, alpha, eps, sigma);
  }
  mechanism::ParoOptions options() const {
    mechanism::ParoOptions o{
        .text = text, .block = block, .density = density, .alpha = alpha, .eps = eps, .sigma = sigma};
    for (size_t a = 0; a < grid.size(); ++a) o.grid[3 - grid.size() + a] = grid[a];
    return o;
  }
};

constexpr const char* order_names = "FHW FWH HWF HFW WHF WFH ";

/// rank[t]: where a token stands, by sorting tokens by their coordinates in the order that the name spells.
inline std::vector<Index> ranks(const Paro& o, Index order) {
  std::vector<Index> grid(3 - o.grid.size(), 1);
  grid.insert(grid.end(), o.grid.begin(), o.grid.end());
  std::vector<std::array<Index, 4>> keys;
  for (Index t = 0; t < o.tokens() - o.text; ++t) {
    const std::vector<Index> x = coordinates(grid, t);
    std::array<Index, 4> key{};
    for (Index a = 0; a < 3; ++a) {
      const char axis = order_names[order * 4 + a];
      key[static_cast<size_t>(a)] = x[axis == 'F' ? 0 : axis == 'H' ? 1 : 2];
    }
    key[3] = t;
    keys.push_back(key);
  }
  std::sort(keys.begin(), keys.end());
  std::vector<Index> rank(static_cast<size_t>(o.tokens()));
  std::iota(rank.begin(), rank.begin() + o.text, 0);
  for (size_t i = 0; i < keys.size(); ++i)
    rank[static_cast<size_t>(o.text + keys[i][3])] = o.text + static_cast<Index>(i);
  return rank;
}

/// P [N, N] of one head.
inline std::vector<double> softmax_map(const Case& c, Index b, Index h) {
  const Index n = c.size.N;
  std::vector<double> p(static_cast<size_t>(n * n));
  for (Index i = 0; i < n; ++i) {
    double* row = p.data() + i * n;
    double most = -1e300, sum = 0;
    for (Index j = 0; j < n; ++j) {
      row[j] = 0;
      for (Index d = 0; d < c.size.D; ++d) row[j] += c.q_at(b, h, i, d) * c.k_at(b, c.kv_head(h), j, d);
      row[j] /= std::sqrt(static_cast<double>(c.size.D));
      most = std::max(most, row[j]);
    }
    for (Index j = 0; j < n; ++j) sum += row[j] = std::exp(row[j] - most);
    for (Index j = 0; j < n; ++j) row[j] /= sum;
  }
  return p;
}

struct Metrics {
  double sparse = 0, unevenness = 0;
};

inline Metrics metrics_of(const Paro& o, const std::vector<double>& p, Index order, double eps) {
  const Index n = o.tokens(), count = (n - o.text + o.block - 1) / o.block;
  const std::vector<Index> rank = ranks(o, order);
  struct Block {
    double most = 0, sum = 0, small = 0, pairs = 0;
  };
  std::vector<Block> blocks(static_cast<size_t>(count * count));
  for (Index i = o.text; i < n; ++i)
    for (Index j = o.text; j < n; ++j) {
      const double x = p[static_cast<size_t>(i * n + j)];
      const Index row = (rank[static_cast<size_t>(i)] - o.text) / o.block,
                  column = (rank[static_cast<size_t>(j)] - o.text) / o.block;
      Block& block = blocks[static_cast<size_t>(row * count + column)];
      block.most = std::max(block.most, x), block.sum += x, block.small += x < eps ? 1 : 0, block.pairs += 1;
    }
  Metrics m;
  for (const Block& b : blocks) {
    m.sparse += b.small >= o.sigma * b.pairs - 1e-9 ? 1 : 0;
    m.unevenness += b.most == 0 ? 1 : b.most / (b.sum / b.pairs);
  }
  return {m.sparse / static_cast<double>(count * count), m.unevenness / static_cast<double>(count * count)};
}

struct Choice {
  std::array<Metrics, 6> metrics;
  Index order = 0;
  bool undecided = false;
};

/// Of all six orders; where some are the same, both sums count each as often.
inline Choice choose(const Paro& o, const std::vector<std::vector<double>>& samples, double eps) {
  Choice c;
  double sparse = 0, unevenness = 0;
  for (Index order = 0; order < 6; ++order) {
    Metrics& m = c.metrics[static_cast<size_t>(order)];
    for (const std::vector<double>& p : samples) {
      const Metrics one = metrics_of(o, p, order, eps);
      m.sparse += one.sparse / static_cast<double>(samples.size());
      m.unevenness += one.unevenness / static_cast<double>(samples.size());
    }
    sparse += m.sparse, unevenness += m.unevenness;
  }
  std::array<double, 6> score;
  for (size_t i = 0; i < 6; ++i)
    score[i] = o.alpha * (sparse > 0 ? c.metrics[i].sparse / sparse : 0) -
               (1 - o.alpha) * c.metrics[i].unevenness / unevenness;
  const double best = *std::max_element(score.begin(), score.end());
  for (Index i = 5; i >= 0; --i) {
    const double behind = best - score[static_cast<size_t>(i)];
    if (behind <= 1e-6) c.order = i;
    c.undecided = c.undecided || (behind > 1e-7 && behind < 1e-4);
  }
  return c;
}

struct Kept {
  std::vector<char> mask, unsure;  // [nb, nb], [nb]: rows of blocks whose choice is near to flipping
};

inline Kept keep(const Paro& o, const std::vector<std::vector<double>>& samples, Index order) {
  const Index n = o.tokens(), count = (n + o.block - 1) / o.block;
  const std::vector<Index> rank = ranks(o, order);
  std::vector<double> mass(static_cast<size_t>(count * count));
  for (const std::vector<double>& p : samples)
    for (Index i = 0; i < n; ++i)
      for (Index j = 0; j < n; ++j)
        mass[static_cast<size_t>(rank[static_cast<size_t>(i)] / o.block * count +
                                 rank[static_cast<size_t>(j)] / o.block)] += p[static_cast<size_t>(i * n + j)];
  Kept kept{std::vector<char>(mass.size()), std::vector<char>(static_cast<size_t>(count))};
  Index held = 0;
  const auto take = [&](Index at) {
    held += kept.mask[static_cast<size_t>(at)] ? 0 : 1, kept.mask[static_cast<size_t>(at)] = 1;
  };
  for (Index i = 0; i < count; ++i)
    for (Index j = 0; j < count; ++j)
      if (i * o.block < o.text || j * o.block < o.text || (n % o.block != 0 && (i == count - 1 || j == count - 1)))
        take(i * count + j);
  for (Index i = 0; i < count; ++i) {
    const auto row = kept.mask.begin() + i * count;
    if (std::count(row, row + count, 1) == 0)
      take(std::max_element(mass.begin() + i * count, mass.begin() + (i + 1) * count) - mass.begin());
  }
  std::vector<Index> by_mass(mass.size());
  std::iota(by_mass.begin(), by_mass.end(), 0);
  std::stable_sort(by_mass.begin(), by_mass.end(),
                   [&](Index a, Index b) { return mass[static_cast<size_t>(a)] > mass[static_cast<size_t>(b)]; });
  double last = -1;
  for (const Index at : by_mass) {
    if (kept.mask[static_cast<size_t>(at)]) continue;
    const double m = mass[static_cast<size_t>(at)];
    if (static_cast<double>(held) < o.density * static_cast<double>(count * count) - 1e-9) {
      take(at), last = m;
    } else if (last >= 0 && m < last && m > last * (1 - 1e-4)) {
      for (Index other = 0; other < count * count; ++other)
        if (std::fabs(mass[static_cast<size_t>(other)] - last) < 2e-4 * last)
          kept.unsure[static_cast<size_t>(other / count)] = 1;
      break;
    } else {
      break;
    }
  }
  return kept;
}

struct NaiveParo {
  Naive attention;
  std::vector<Choice> choice;  // per head
  std::vector<Kept> kept;
};

inline NaiveParo naive_paro(const Case& c, const Paro& o) {
  const Sizes& s = c.size;
  NaiveParo result;
  std::vector<std::vector<Index>> rank;
  std::vector<char> undecided(static_cast<size_t>(s.B * s.Hq * s.N));
  const Index count = (s.N + o.block - 1) / o.block;
  for (Index h = 0; h < s.Hq; ++h) {
    std::vector<std::vector<double>> samples;
    for (Index b = 0; b < s.B; ++b) samples.push_back(softmax_map(c, b, h));
    Choice choice = choose(o, samples, o.eps);
    for (const double nudged : {o.eps * (1 - 2e-5), o.eps * (1 + 2e-5)})
      choice.undecided = choice.undecided || choose(o, samples, nudged).order != choice.order;
    result.choice.push_back(choice);
    result.kept.push_back(keep(o, samples, choice.order));
    rank.push_back(ranks(o, choice.order));
    for (Index b = 0; b < s.B; ++b)
      for (Index t = 0; t < s.N; ++t)
        undecided[static_cast<size_t>((b * s.Hq + h) * s.N + t)] =
            choice.undecided ||
            result.kept.back().unsure[static_cast<size_t>(rank.back()[static_cast<size_t>(t)] / o.block)];
  }
  result.attention = naive_attention(c, [&](Index, Index h, Index t, Index j) {
    const std::vector<Index>& r = rank[static_cast<size_t>(h)];
    return result.kept[static_cast<size_t>(h)].mask[static_cast<size_t>(r[static_cast<size_t>(t)] / o.block * count +
                                                                        r[static_cast<size_t>(j)] / o.block)] != 0;
  });
  result.attention.undecided = undecided;
  return result;
}

/// Queries and keys of head h become alike where tokens share the axes that `like` keeps, by `strength`.
inline void along_axes(Case& c, const Paro& o, Index h, const std::vector<bool>& like, double strength) {
  std::vector<Index> grid(3 - o.grid.size(), 1);
  grid.insert(grid.end(), o.grid.begin(), o.grid.end());
  for (Index t = 0; t < c.size.N - o.text; ++t) {
    std::vector<Index> x = coordinates(grid, t);
    std::uint64_t seed = 1000;
    for (size_t a = 0; a < 3; ++a) seed = seed * 131 + static_cast<std::uint64_t>(like[a] ? x[a] + 1 : 0);
    Random random(seed);
    for (Index d = 0; d < c.size.D; ++d) {
      const double u = strength * random.normal();
      for (Index b = 0; b < c.size.B; ++b) {
        c.q.set(b, h, o.text + t, d, c.q.get(b, h, o.text + t, d) + u);
        if (h % (c.size.Hq / c.size.Hk) == 0)
          c.k.set(b, c.kv_head(h), o.text + t, d, c.k.get(b, c.kv_head(h), o.text + t, d) + u);
      }
    }
  }
}

/// Heads that look along F, W, and everywhere, in turn.
inline void look_around(Case& c, const Paro& o, double strength = 1.2) {
  for (Index h = 0; h < c.size.Hq; ++h)
    if (h % 3 != 2)
      along_axes(c, o, h, h % 3 == 0 ? std::vector<bool>{false, true, true} : std::vector<bool>{true, true, false},
                 strength);
}

}  // namespace heed::test
