// Rows choose blocks of columns; blocks then want the rows that chose them.
#pragma once

#include <algorithm>
#include <span>

#include "heed/plan/select.h"
#include "heed/plan/summary.h"

namespace heed {

/// Rows [begin, end) (ranks of a row block) that stand in the same block.
struct OwnRows {
  Index block = 0, begin = 0, end = 0;
};

/// scores[i·stride + j] = <query of row + i, summary j>, j < ranks, for `count` rows of the block.
inline void score_rows(const Queries& queries, const RowBlock& rows, Index row, Index count, const Summary& summary,
                       Index head, Index ranks, float* scores, Index stride, Scratch& scratch) {
  const Scratch::Mark mark(scratch);
  float* q = scratch.take<float>(count * summary.d).data();
  for (Index i = 0; i < count; ++i) queries.read(rows.b, rows.head, rows.token(row + i), q + i * summary.d);
  summary.score(head, q, count, ranks, scores, stride);
}

/// Each row of a row block picks up to `k` blocks; kept as lists both ways, O(rows · k).
class Choice {
 public:
  /// `blocks` ascend and cover every position. Memory is the scratch's.
  Choice(const RowBlock& rows, std::span<const BlockRange> blocks, Index k, Scratch& scratch)
      : rows_(rows), blocks_(blocks), k_(k), scratch_(scratch) {
    const Index last = block_at(rows.position(rows.rows - 1));
    own_ = scratch.take<OwnRows>(std::min(rows.rows, last - block_at(rows.position(0)) + 1));
    size_t n = 0;
    for (Index begin = 0, end; begin < rows.rows; begin = end) {
      const Index block = block_at(rows.position(begin));
      end = std::min(rows.rows, begin + blocks[static_cast<size_t>(block)].end - rows.position(begin));
      own_[n++] = {block, begin, end};
    }
    own_ = own_.first(n);
    chosen_ = scratch.take<std::int32_t>(rows.rows * k);
    counts_ = scratch.take<std::int32_t>(rows.rows);
    std::fill(counts_.begin(), counts_.end(), 0);
  }

  /// The block that holds a position.
  Index block_at(Index position) const {
    return std::partition_point(blocks_.begin(), blocks_.end(),
                                [&](const BlockRange& r) { return r.end <= position; }) -
           blocks_.begin();
  }
  std::span<const OwnRows> own_blocks() const { return own_; }
  /// One past the last block that some row could choose.
  Index end() const { return end_; }

  /// Lets the rows of `own` pick the best `k` of blocks [first, end) by score(row, count, blocks,
  /// scores, stride), which must fill scores of blocks 0 … blocks-1 for a few rows.
  template <class Score>
  void choose(const OwnRows& own, Index first, Index end, Ties ties, Score score) {
    const Index candidates = end - first;
    end_ = std::max(end_, end);
    inverted_ = false;
    if (candidates <= 0 || k_ == 0) return;
    constexpr Index rows_at_once = 48;
    const Scratch::Mark mark(scratch_);
    const Index stride = round_up(end, panel_columns);
    // All candidates: nothing to score.
    const bool all = candidates <= k_;
    float* scores = scratch_.take<float>(all ? 1 : rows_at_once * stride).data();
    for (Index begin = own.begin; begin < own.end; begin += rows_at_once) {
      const Index count = std::min(rows_at_once, own.end - begin);
      if (!all) score(begin, count, end, scores, stride);
      for (Index i = 0; i < count; ++i) {
        std::int32_t* picked = chosen_.data() + (begin + i) * k_;
        const Index n = choose_top(scores + (all ? 0 : i * stride + first), candidates, k_, ties, picked);
        for (Index j = 0; j < n; ++j) picked[j] += static_cast<std::int32_t>(first);
        counts_[static_cast<size_t>(begin + i)] = static_cast<std::int32_t>(n);
      }
    }
  }

  /// The rows that chose block b, ascending.
  std::span<const std::int32_t> rows_of(Index b) {
    invert();
    const Index begin = starts_[static_cast<size_t>(b)], end = starts_[static_cast<size_t>(b) + 1];
    return {members_.data() + begin, static_cast<size_t>(end - begin)};
  }

  /// The rows past block b, standing before position `end`, that did not choose it, ascending.
  std::span<const std::int32_t> rows_past_without(Index b, Index end) {
    const std::span<const std::int32_t> with = rows_of(b);
    const Index past = blocks_[static_cast<size_t>(b)].end;
    auto list = scratch_.take<std::int32_t>(rows_.rows);
    size_t n = 0, next = 0;
    for (Index row = 0; row < rows_.rows; ++row) {
      if (next < with.size() && with[next] == row) {
        ++next;
      } else if (rows_.position(row) >= past && rows_.position(row) < end) {
        list[n++] = static_cast<std::int32_t>(row);
      }
    }
    return list.first(n);
  }

 private:
  // Counting sort of (row, chosen block) by block.
  void invert() {
    if (inverted_) return;
    inverted_ = true;
    starts_ = scratch_.take<std::int32_t>(end_ + 2);
    std::fill(starts_.begin(), starts_.end(), 0);
    std::int32_t total = 0;
    each([&](Index, std::int32_t b) { ++starts_[static_cast<size_t>(b) + 2], ++total; });
    for (size_t b = 2; b < starts_.size(); ++b) starts_[b] += starts_[b - 1];
    members_ = scratch_.take<std::int32_t>(total);
    each([&](Index row, std::int32_t b) {
      members_[static_cast<size_t>(starts_[static_cast<size_t>(b) + 1]++)] = static_cast<std::int32_t>(row);
    });
  }
  template <class Visit>
  void each(Visit visit) const {
    for (Index row = 0; row < rows_.rows; ++row)
      for (Index j = 0; j < counts_[static_cast<size_t>(row)]; ++j)
        visit(row, chosen_[static_cast<size_t>(row * k_ + j)]);
  }

  RowBlock rows_;
  std::span<const BlockRange> blocks_;
  Index k_, end_ = 0;
  Scratch& scratch_;
  std::span<OwnRows> own_;
  std::span<std::int32_t> chosen_, counts_, starts_, members_;
  bool inverted_ = false;
};

}  // namespace heed
