// One ranking of all (row, block) pairs of a head, cut where the best of them hold enough.
#pragma once

#include <functional>
#include <limits>
#include <span>

#include "heed/plan/choice.h"

namespace heed {

/// Pairs rank by falling score, equal ones by block, then token. This is the last pair that is in.
struct RankCut {
  float score = std::numeric_limits<float>::infinity();
  Index block = 0, token = 0;

  static RankCut nothing() { return {}; }
  static RankCut everything() { return {-std::numeric_limits<float>::infinity(), 0, 0}; }
};

/// Calls visit(token, scores) for every row of a head, scores [blocks]. It is called several times, and must give
/// the same bits in the same order each time: scores are made anew rather than kept, as there may be many.
using ScoredRows = std::function<void(const std::function<void(Index token, const float* scores)>& visit)>;

/// Cuts the ranking of all pairs but the own ones (own[token] is its row's own block, and always in). A pair's
/// weight is its score's place between the least and the largest score of all pairs, own ones included: 0 … 1, with
/// a distance below 1e-6 taken as 1. The cut is after the shortest prefix, of one pair at least, that together with
/// the own pairs holds `mass` of the weight of all pairs + 1e-6; after all pairs where none does, or mass >= 1.
/// Sums are f64. Memory O(blocks), whatever the number of rows.
RankCut cut_at_mass(const ScoredRows& rows, Index blocks, std::span<const std::int32_t> own, double mass);

/// Calls visit(row, scores) for every row of a row block, scores [summary.blocks]. The same bits each time.
template <class Visit>
void visit_scores(const Queries& queries, const RowBlock& rows, const Summary& summary, Index head, Scratch& scratch,
                  Visit visit) {
  constexpr Index rows_at_once = 48;
  const Index blocks = summary.blocks[static_cast<size_t>(head)], stride = round_up(blocks, panel_columns);
  const Scratch::Mark mark(scratch);
  float* scores = scratch.take<float>(rows_at_once * stride).data();
  for (Index row = 0; row < rows.rows; row += rows_at_once) {
    const Index count = std::min(rows_at_once, rows.rows - row);
    score_rows(queries, rows, row, count, summary, head, blocks, scores, stride, scratch);
    for (Index i = 0; i < count; ++i) visit(row + i, scores + i * stride);
  }
}

/// Which rows of a row block want which blocks: a bit each, then block by block the rows.
class WantedBlocks {
 public:
  WantedBlocks(Index rows, Index blocks, Scratch& scratch);
  void want(Index row, Index block);
  /// The row of `token` wants the blocks whose pairs are in.
  void want_ranked(Index row, Index token, const float* scores, const RankCut& cut);
  /// The rows that want a block, ascending; as a range where all do.
  Set rows_of(Index block) const;

 private:
  Index rows_, blocks_;
  Scratch& scratch_;
  std::span<std::uint64_t> words_;  // [rows / 64, blocks], bit row % 64
};

}  // namespace heed
