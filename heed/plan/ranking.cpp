#include "heed/plan/ranking.h"

#include <bit>
#include <cmath>
#include <vector>

namespace heed {
namespace {

// Integers that order as floats do, and back. Both zeros are one.
std::uint32_t ordered(float x) {
  const auto bits = std::bit_cast<std::uint32_t>(x + 0.0f);
  return (bits & 0x80000000u) != 0 ? ~bits : bits | 0x80000000u;
}
float unordered(std::uint32_t key) { return std::bit_cast<float>((key & 0x80000000u) != 0 ? key & 0x7fffffffu : ~key); }

struct Totals {
  float least = std::numeric_limits<float>::infinity(), most = -std::numeric_limits<float>::infinity();
  double sum = 0, own = 0;  // of scores
  Index rows = 0;
};

// Pairs of equal keys, or of keys in one bin.
struct Bin {
  Index pairs = 0;
  double above_least = 0;  // sum of score - least
};

Totals total(const ScoredRows& rows, Index blocks, std::span<const std::int32_t> own) {
  Totals t;
  rows([&](Index token, const float* scores) {
    double sum = 0;
    for (Index c = 0; c < blocks; ++c) {
      t.least = std::min(t.least, scores[c]), t.most = std::max(t.most, scores[c]);
      sum += static_cast<double>(scores[c]);
    }
    t.sum += sum;
    t.own += static_cast<double>(scores[own[static_cast<size_t>(token)]]);
    ++t.rows;
  });
  return t;
}

// Of the pairs that score exactly `score`, the one that `rank` (from 0) others precede.
RankCut equal_pair(const ScoredRows& rows, Index blocks, std::span<const std::int32_t> own, float score, Index rank) {
  std::vector<Index> count(static_cast<size_t>(blocks), 0);
  rows([&](Index token, const float* scores) {
    for (Index c = 0; c < blocks; ++c)
      count[static_cast<size_t>(c)] += scores[c] == score && c != own[static_cast<size_t>(token)] ? 1 : 0;
  });
  Index block = 0;
  while (rank >= count[static_cast<size_t>(block)]) rank -= count[static_cast<size_t>(block++)];
  std::vector<Index> tokens;
  rows([&](Index token, const float* scores) {
    if (scores[block] == score && block != own[static_cast<size_t>(token)]) tokens.push_back(token);
  });
  std::nth_element(tokens.begin(), tokens.begin() + rank, tokens.end());
  return {score, block, tokens[static_cast<size_t>(rank)]};
}

}  // namespace

RankCut cut_at_mass(const ScoredRows& rows, Index blocks, std::span<const std::int32_t> own, double mass) {
  if (blocks <= 1) return RankCut::nothing();
  if (mass >= 1) return RankCut::everything();
  const Totals all = total(rows, blocks, own);
  const double least = static_cast<double>(all.least), distance = static_cast<double>(all.most) - least;
  const double unit = distance > 1e-6 ? distance : 1;
  const double weight = (all.sum - static_cast<double>(all.rows * blocks) * least) / unit + 1e-6;
  const double own_weight = (all.own - static_cast<double>(all.rows) * least) / unit;
  const double target = std::max(0.0, mass * weight - own_weight) * unit;  // of other pairs' score - least

  // The cut lies among keys low … high, above which pairs weigh `taken`. Each look narrows them 4096-fold.
  constexpr int bin_bits = 12;
  std::vector<Bin> bins(std::size_t{1} << bin_bits);
  std::uint32_t low = ordered(all.least), high = ordered(all.most);
  double taken = 0;
  Bin cut{all.rows * (blocks - 1), 0};
  for (bool first = true; low < high; first = false) {
    const int shift = std::max(0, 32 - std::countl_zero(high - low) - bin_bits);
    std::fill(bins.begin(), bins.end(), Bin{});
    rows([&](Index token, const float* scores) {
      const Index self = own[static_cast<size_t>(token)];
      for (Index c = 0; c < blocks; ++c) {
        const std::uint32_t key = ordered(scores[c]);
        if (key < low || key > high || c == self) continue;
        Bin& bin = bins[(key - low) >> shift];
        ++bin.pairs, bin.above_least += static_cast<double>(scores[c]) - least;
      }
    });
    // Downwards to the bin in which the target is met; rounding may miss it at the end of a narrowed range.
    size_t found = bins.size(), lowest = bins.size();
    for (size_t b = bins.size(); b-- > 0 && found == bins.size();) {
      if (bins[b].pairs == 0) continue;
      lowest = b;
      if (taken + bins[b].above_least >= target) found = b;
      else taken += bins[b].above_least;
    }
    if (found == bins.size()) {
      if (first) return RankCut::everything();
      found = lowest, taken -= bins[lowest].above_least;
    }
    cut = bins[found];
    low += static_cast<std::uint32_t>(found << shift);
    high = std::min<std::uint64_t>(high, low + (std::uint64_t{1} << shift) - 1);
  }

  // Pairs of one score are left, of which as many are in as the target asks for.
  const float score = unordered(low);
  const double each = static_cast<double>(score) - least, missing = target - taken;
  Index in = cut.pairs;
  if (missing <= 0) in = 1;
  else if (each > 0) in = static_cast<Index>(std::min(std::ceil(missing / each), static_cast<double>(cut.pairs)));
  return equal_pair(rows, blocks, own, score, std::max<Index>(1, in) - 1);
}

WantedBlocks::WantedBlocks(Index rows, Index blocks, Scratch& scratch)
    : rows_(rows), blocks_(blocks), scratch_(scratch),
      words_(scratch.take<std::uint64_t>(ceil_div(rows, 64) * blocks)) {
  std::fill(words_.begin(), words_.end(), 0);
}

void WantedBlocks::want(Index row, Index block) {
  words_[static_cast<size_t>(row / 64 * blocks_ + block)] |= std::uint64_t{1} << (row % 64);
}

void WantedBlocks::want_ranked(Index row, Index token, const float* scores, const RankCut& cut) {
  // Of the blocks before the cut's, pairs as good as the last one are in too.
  std::uint64_t* words = words_.data() + row / 64 * blocks_;
  const int bit = static_cast<int>(row % 64);
  for (Index c = 0; c < cut.block; ++c) words[c] |= static_cast<std::uint64_t>(scores[c] >= cut.score) << bit;
  for (Index c = cut.block; c < blocks_; ++c) words[c] |= static_cast<std::uint64_t>(scores[c] > cut.score) << bit;
  if (cut.block < blocks_ && scores[cut.block] == cut.score && token <= cut.token) want(row, cut.block);
}

Set WantedBlocks::rows_of(Index block) const {
  const Index words = ceil_div(rows_, 64);
  const auto word = [&](Index w) { return words_[static_cast<size_t>(w * blocks_ + block)]; };
  Index count = 0;
  for (Index w = 0; w < words; ++w) count += std::popcount(word(w));
  if (count == rows_) return Set::range(0, rows_);
  const auto list = scratch_.take<std::int32_t>(count);
  size_t n = 0;
  for (Index w = 0; w < words; ++w)
    for (std::uint64_t bits = word(w); bits != 0; bits &= bits - 1)
      list[n++] = static_cast<std::int32_t>(w * 64 + std::countr_zero(bits));
  return Set::list(list);
}

}  // namespace heed
