// Choosing how far each head looks: of some rules each has its loss per head and its cost, and the costs must
// meet a budget. Offline work, done once for a model.
#pragma once

#include <span>
#include <vector>

#include "heed/base/types.h"

namespace heed {

/// A head keeps alpha + beta·N of N tokens: first ones and a window.
struct SpanRule {
  double alpha = 0, beta = 1;
};

/// The lengths that rules must make sense for, in tokens.
struct RuleGrid {
  Index shortest = 2048, longest = 8192;  // that influence is measured at
  Index extended = 16384;                 // that rules shall serve as well
  Index alpha_step = 1024;                // alpha: -shortest … longest
  Index betas = 9;                        // beta: 0 … 1 in betas - 1 equal steps
};

/// The rules of the grid that keep at least a token of `shortest`, and no more than there are of `longest` and of
/// `extended`. Throws Error when there is none.
std::vector<SpanRule> candidate_rules(const RuleGrid& grid);

/// Blocks of `block` tokens that the last row of `tokens` keeps while rules are chosen: a window of
/// max(1, floor(alpha / block) + floor(beta · tokens / block)), its own included, and one first block beside it.
Index kept_blocks(const SpanRule& rule, Index tokens, Index block);

/// What a rule loses: the sum of influence [n, n], n = ceil(tokens / block), row-major, over the blocks that it hides
/// of those not above the diagonal.
double lost_influence(std::span<const float> influence, const SpanRule& rule, Index tokens, Index block);

/// Rules for the heads of all layers.
struct RuleProblem {
  Index layers = 0, heads = 0, rules = 0;
  std::vector<double> loss = {};              // [layers, heads, rules]
  std::vector<std::vector<Index>> cost = {};  // per length: [rules], in any unit, >= 0
  std::vector<Index> most = {};               // per length: budget of all heads together
  double least_share = 0.9;              // and its share that must be used
  Index rules_per_layer = 2;             // 1 or 2
};

/// The rule of every head, [layers, heads]: of all choices with at most rules_per_layer different rules in a layer and
/// least_share · most <= sum of costs <= most at every length, one of least total loss. Exact while budgets are at most
/// 1024 units (128 with more than one length); beyond, partial sums nearer than most / 1024 (/ 128) count as equal, of
/// which the one with less loss goes on: what is returned keeps to the budget all the same. At most 4 lengths.
/// Throws Error when sizes disagree or no choice fits.
std::vector<Index> choose_rules(const RuleProblem& problem);

}  // namespace heed
