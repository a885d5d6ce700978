// Runs of tokens at several scales, and the search for the best of them from coarse to fine.
#pragma once

#include <span>
#include <vector>

#include "heed/plan/plan.h"

namespace heed {

/// Level 0 is the tokens; a run of level l is made of `branch` runs of level l - 1, the last one of a level
/// perhaps of fewer. So run i of level l holds tokens [i·branch^l, (i + 1)·branch^l) that exist.
struct Levels {
  Index tokens = 0, branch = 2, top = 1;  // branch >= 2; top: the coarsest level

  /// Tokens of a whole run; `tokens` or a little more where branch^level is beyond it.
  Index width(Index level) const {
    Index w = 1;
    for (; level > 0 && w < tokens; --level) w *= branch;
    return w;
  }
  Index count(Index level) const { return ceil_div(tokens, width(level)); }
  /// The level from which on there is a single run: coarser ones are copies of it. At least 1.
  Index single() const {
    Index level = 1;
    while (width(level) < tokens) ++level;
    return level;
  }
};

/// What every run of queries chose among the runs of keys of its level, for levels 1 … top of every query head.
class LevelChoice {
 public:
  /// Runs are compared by <mean query, mean key>, not scaled, in f32 whatever the arithmetic. At the top level a run
  /// of queries takes the `top_k` best of all runs of keys, below that the best children of those that its parent
  /// took; equal ones: the lower. N = M = levels.tokens. Takes count(top)² products a head and, at each level
  /// below, count·top_k·branch; keeps count·top_k numbers a level. The work is done in parallel.
  LevelChoice(const Levels& levels, Index top_k, const Problem& problem, const Queries& queries, const KeyValues& kv);

  /// The chosen runs of keys, ascending: of query head `head` (b·Hq + h) at `level` >= 1. At most top_k.
  std::span<const std::int32_t> of(Index level, Index head, Index run) const {
    const Lists& lists = lists_[static_cast<size_t>(level)];
    if (lists.all) return {everything_.data(), static_cast<size_t>(lists.runs)};
    const Index row = head * lists.runs + run;
    return {lists.chosen.data() + row * lists.stride, static_cast<size_t>(lists.counts[static_cast<size_t>(row)])};
  }
  /// Every run chose all there are.
  bool all(Index level) const { return lists_[static_cast<size_t>(level)].all; }

 private:
  struct Lists {
    bool all = false;
    Index runs = 0, stride = 0;
    std::vector<std::int32_t> chosen, counts;  // [heads, runs, stride], [heads, runs]
  };
  std::vector<Lists> lists_;              // [level]; the first is empty
  std::vector<std::int32_t> everything_;  // 0, 1, …
};

}  // namespace heed
