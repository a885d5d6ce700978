#include "heed/mechanism/paro_calibration.h"

#include <algorithm>
#include <limits>
#include <numeric>

#include "heed/base/threads.h"
#include "heed/plan/block_weights.h"
#include "heed/plan/permute.h"
#include "heed/plan/select.h"

namespace heed::mechanism {
namespace {

struct Sample {
  const ParoOptions& options;
  const Problem& problem;
  const Queries& queries;
  const KeyValues& kv;
  float scale;
  std::vector<float> lse = {};  // [B, Hq, N]

  /// The map of one head with rows and columns in an order; `keys` are packed so.
  ScoreMap map(Index b, Index head, std::span<const std::int32_t> tokens, const void* keys) const {
    return {&queries, b, head, tokens, kv.layout(), keys, problem.M, scale};
  }
  Index kv_head(Index b, Index head) const { return b * problem.Hk + head / problem.group(); }
  const float* lse_of(Index b, Index head) const { return lse.data() + (b * problem.Hq + head) * problem.N; }
};

void sum_rows(Sample& s) {
  const Problem& p = s.problem;
  constexpr Index rows_at_once = 256;
  const Index runs = ceil_div(p.N, rows_at_once);
  std::vector<std::int32_t> tokens(static_cast<size_t>(p.N));
  std::iota(tokens.begin(), tokens.end(), 0);
  s.lse.resize(static_cast<size_t>(p.B * p.Hq * p.N));
  parallel_for(p.B * p.Hq * runs, [&](Index unit, int) {
    const Index head = unit / runs, first = unit % runs * rows_at_once;
    const Index b = head / p.Hq, h = head % p.Hq;
    row_lse(s.map(b, h, tokens, s.kv.keys(s.kv_head(b, h))), first, std::min(rows_at_once, p.N - first),
            s.lse.data() + head * p.N);
  });
}

/// Calls visit(h, I, rows, weights) for every query head of `heads`, batch and block of rows from rank `first` on;
/// batches of one (h, I) come one after the other from one thread.
template <class Visit>
void visit_blocks(const Sample& s, Index order, std::span<const std::int32_t> heads, Index first, Visit visit) {
  const Problem& p = s.problem;
  const Index block = s.options.block, count = ceil_div(p.N - first, block);
  const std::vector<std::int32_t> tokens = paro_tokens(s.options, order);
  std::vector<std::int32_t> kv_heads;
  for (Index b = 0; b < p.B; ++b)
    for (const std::int32_t h : heads) kv_heads.push_back(static_cast<std::int32_t>(s.kv_head(b, h)));
  std::sort(kv_heads.begin(), kv_heads.end());
  kv_heads.erase(std::unique(kv_heads.begin(), kv_heads.end()), kv_heads.end());
  const auto keys = permute(s.kv, tokens, kv_heads);
  parallel_for(static_cast<Index>(heads.size()) * count, [&](Index unit, int) {
    const Index h = heads[static_cast<size_t>(unit / count)], at = unit % count;
    const Index row = first + at * block, rows = std::min(block, p.N - row);
    Scratch& scratch = thread_scratch();
    const Scratch::Mark mark(scratch);
    const std::span<BlockWeight> weights = scratch.take<BlockWeight>(count);
    for (Index b = 0; b < p.B; ++b) {
      const auto view = std::lower_bound(kv_heads.begin(), kv_heads.end(), s.kv_head(b, h)) - kv_heads.begin();
      const void* packed = keys->source.views[static_cast<size_t>(view)].keys;
      block_weights(s.map(b, h, tokens, packed), row, rows, s.lse_of(b, h), first, block, s.options.eps, weights);
      visit(h, at, rows, weights);
    }
  });
}

std::vector<std::int32_t> every_head(const Problem& p) {
  std::vector<std::int32_t> heads(static_cast<size_t>(p.Hq));
  std::iota(heads.begin(), heads.end(), 0);
  return heads;
}

/// The lowest number of every order that is another sequence of the grid's tokens.
std::vector<Index> different_orders(const Extents& grid) {
  std::vector<Index> different;
  std::vector<std::vector<std::int32_t>> seen;
  for (size_t o = 0; o < axis_orders.size(); ++o) {
    std::vector<std::int32_t> tokens = tokens_by_axes(grid, axis_orders[o]);
    if (std::find(seen.begin(), seen.end(), tokens) != seen.end()) continue;
    different.push_back(static_cast<Index>(o));
    seen.push_back(std::move(tokens));
  }
  return different;
}

// Step 2: M_sparse and M_quant of every head under one order.
void measure(const Sample& s, Index order, ParoCalibration& out) {
  const Problem& p = s.problem;
  const Index tokens = p.N - s.options.text, block = s.options.block, count = s.options.blocks(tokens);
  struct Row {
    Index sparse = 0;
    double unevenness = 0;
  };
  std::vector<Row> rows_of(static_cast<size_t>(p.Hq * count));  // sums over batches and columns of blocks
  visit_blocks(s, order, every_head(p), s.options.text,
               [&](Index h, Index at, Index rows, std::span<const BlockWeight> weights) {
                 Row& row = rows_of[static_cast<size_t>(h * count + at)];
                 for (Index j = 0; j < count; ++j) {
                   const BlockWeight& w = weights[static_cast<size_t>(j)];
                   const auto pairs = static_cast<double>(rows * std::min(block, tokens - j * block));
                   row.sparse += static_cast<double>(w.below) >= (s.options.sigma - 1e-9) * pairs ? 1 : 0;
                   row.unevenness += pairs / static_cast<double>(w.sum);
                 }
               });
  const auto maps = static_cast<double>(p.B * count * count);
  for (Index h = 0; h < p.Hq; ++h) {
    double sparse = 0, unevenness = 0;
    for (Index at = 0; at < count; ++at) {
      sparse += static_cast<double>(rows_of[static_cast<size_t>(h * count + at)].sparse);
      unevenness += rows_of[static_cast<size_t>(h * count + at)].unevenness;
    }
    out.sparse[static_cast<size_t>(h)][static_cast<size_t>(order)] = sparse / maps;
    out.unevenness[static_cast<size_t>(h)][static_cast<size_t>(order)] = unevenness / maps;
  }
}

Index best_order(const std::vector<Index>& orders, const std::array<double, 6>& sparse,
                 const std::array<double, 6>& unevenness, double alpha) {
  const double all_sparse = std::accumulate(sparse.begin(), sparse.end(), 0.0);
  const double all_uneven = std::accumulate(unevenness.begin(), unevenness.end(), 0.0);
  const auto score = [&](Index o) {
    const double share = all_sparse > 0 ? sparse[static_cast<size_t>(o)] / all_sparse : 0;
    return alpha * share - (1 - alpha) * unevenness[static_cast<size_t>(o)] / all_uneven;
  };
  double best = score(orders.front());
  for (const Index o : orders) best = std::max(best, score(o));
  return *std::find_if(orders.begin(), orders.end(), [&](Index o) { return score(o) >= best - 1e-6; });
}

// Step 3: what to keep of one head, masses [nb, nb]; those of forced blocks are lost.
void keep_blocks(const ParoOptions& options, Index tokens, std::span<float> masses, std::uint8_t* mask) {
  constexpr float forced = std::numeric_limits<float>::max();
  const Index count = options.blocks(tokens), text = options.blocks(options.text);
  const bool ragged = tokens % options.block != 0;
  Index kept = 0;
  for (Index i = 0; i < count; ++i) {
    float* const row = masses.data() + i * count;
    const auto is_forced = [&](Index at) { return at < text || (ragged && at == count - 1); };
    bool any = false;
    for (Index j = 0; j < count; ++j)
      if (is_forced(i) || is_forced(j)) row[j] = forced, any = true, ++kept;
    if (!any) *std::max_element(row, row + count) = forced, ++kept;  // the first of equal ones
  }
  const double wanted = options.density * static_cast<double>(count * count);
  kept = std::max(kept, std::min(count * count, static_cast<Index>(std::ceil(wanted - 1e-9))));
  std::vector<std::int32_t> chosen(static_cast<size_t>(kept));
  choose_top(masses.data(), count * count, kept, Ties::lower, chosen.data());
  for (const std::int32_t at : chosen) mask[at] = 1;
}

}  // namespace

std::vector<std::int32_t> paro_tokens(const ParoOptions& options, Index order) {
  std::vector<std::int32_t> tokens(static_cast<size_t>(options.text));
  std::iota(tokens.begin(), tokens.end(), 0);
  for (const std::int32_t t : tokens_by_axes(options.grid, axis_orders[static_cast<size_t>(order)]))
    tokens.push_back(static_cast<std::int32_t>(options.text) + t);
  return tokens;
}

ParoCalibration calibrate_paro(const ParoOptions& options, const Problem& problem, const Queries& queries,
                               const KeyValues& kv, float scale, const Tensor* order) {
  const Index heads = problem.Hq, count = options.blocks(problem.N);
  Sample sample{options, problem, queries, kv, scale};
  sum_rows(sample);

  ParoCalibration out;
  out.order = Tensor(DType::i32, {heads});
  out.mask = Tensor(DType::u8, {heads, count, count});
  auto* const chosen = out.order.as<std::int32_t>();
  if (order != nullptr) {
    std::copy_n(order->as<std::int32_t>(), heads, chosen);
  } else if (const std::vector<Index> orders = different_orders(options.grid); orders.size() > 1) {
    out.sparse.resize(static_cast<size_t>(heads)), out.unevenness.resize(static_cast<size_t>(heads));
    for (const Index o : orders) measure(sample, o, out);
    for (size_t h = 0; h < out.sparse.size(); ++h)
      chosen[h] = static_cast<std::int32_t>(best_order(orders, out.sparse[h], out.unevenness[h], options.alpha));
  }

  std::vector<float> masses(static_cast<size_t>(count * count));  // of one head at a time
  for (std::int32_t h = 0; h < static_cast<std::int32_t>(heads); ++h) {
    std::fill(masses.begin(), masses.end(), 0.0f);
    visit_blocks(sample, chosen[h], {&h, 1}, 0, [&](Index, Index at, Index, std::span<const BlockWeight> weights) {
      float* const row = masses.data() + at * count;
      for (Index j = 0; j < count; ++j) row[j] += static_cast<float>(weights[static_cast<size_t>(j)].mass());
    });
    keep_blocks(options, problem.N, masses, out.mask.as<std::uint8_t>() + h * count * count);
  }
  return out;
}

}  // namespace heed::mechanism
