#include "heed/plan/span_rules.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <numeric>
#include <unordered_map>

#include "heed/base/error.h"

namespace heed {
namespace {

constexpr size_t most_lengths = 4;
using Costs = std::array<Index, most_lengths>;

// What the heads of one layer may do: the first `seconds` of an order of heads take rule b, the others rule a.
struct Option {
  Costs cost{};
  double loss = 0;
  Index a = 0, b = 0, seconds = 0;
};

// What layers up to some one cost and lose, and how that came about.
struct State {
  Costs cost{};
  double loss = 0;
  size_t parent = 0, option = 0;
};

class Chooser {
 public:
  explicit Chooser(const RuleProblem& p) : p_(p), lengths_(p.most.size()) {
    for (size_t k = 0; k < lengths_; ++k) {
      cell_[k] = std::max<Index>(1, ceil_div(p.most[k], lengths_ == 1 ? 1024 : 128));
      dearest_[k] = *std::max_element(p.cost[k].begin(), p.cost[k].end());
      least_[k] = static_cast<Index>(std::ceil(p.least_share * static_cast<double>(p.most[k]) - 1e-9));
    }
  }

  std::vector<Index> run() {
    std::vector<std::vector<Option>> options;
    std::vector<std::vector<State>> states{{State{}}};
    for (Index layer = 0; layer < p_.layers; ++layer) {
      options.push_back(options_of(layer));
      states.push_back(extend(states.back(), options.back(), p_.layers - layer - 1));
      if (states.back().empty())
        fail("budget = {}, expected one that {} rules for {} heads can use {:g} of", p_.most[0], p_.rules,
             p_.layers * p_.heads, p_.least_share);
    }
    const auto best = std::min_element(states.back().begin(), states.back().end(),
                                       [](const State& x, const State& y) { return x.loss < y.loss; });
    std::vector<Index> chosen(static_cast<size_t>(p_.layers * p_.heads));
    State at = *best;
    for (Index layer = p_.layers; layer-- > 0;) {
      const Option& o = options[static_cast<size_t>(layer)][at.option];
      const std::vector<Index> order = by_gain(layer, o.a, o.b);
      for (Index i = 0; i < p_.heads; ++i)
        chosen[static_cast<size_t>(layer * p_.heads + order[static_cast<size_t>(i)])] = i < o.seconds ? o.b : o.a;
      at = states[static_cast<size_t>(layer)][at.parent];
    }
    return chosen;
  }

 private:
  double loss(Index layer, Index head, Index rule) const {
    return p_.loss[static_cast<size_t>((layer * p_.heads + head) * p_.rules + rule)];
  }
  // Heads, those first that gain the most by rule b instead of a.
  std::vector<Index> by_gain(Index layer, Index a, Index b) const {
    std::vector<Index> order(static_cast<size_t>(p_.heads));
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](Index x, Index y) {
      return loss(layer, x, b) - loss(layer, x, a) < loss(layer, y, b) - loss(layer, y, a);
    });
    return order;
  }
  std::uint64_t cell_of(const Costs& cost) const {
    std::uint64_t key = 0;
    for (size_t k = 0; k < lengths_; ++k) key = key << 16 | static_cast<std::uint64_t>(cost[k] / cell_[k]);
    return key;
  }

  // Of all pairs of rules and all ways to share the heads between them, the best for each cost.
  std::vector<Option> options_of(Index layer) const {
    std::vector<Option> kept;
    std::unordered_map<std::uint64_t, size_t> at;
    for (Index a = 0; a < p_.rules; ++a)
      for (Index b = a; b < (p_.rules_per_layer == 1 ? a + 1 : p_.rules); ++b) {
        const std::vector<Index> order = by_gain(layer, a, b);
        Option o{.a = a, .b = b};
        for (Index head = 0; head < p_.heads; ++head) o.loss += loss(layer, head, a);
        for (; o.seconds <= (a == b ? 0 : p_.heads - 1); ++o.seconds) {  // all heads with b: b's own turn
          bool fits = true;
          for (size_t k = 0; k < lengths_; ++k) {
            const auto& cost = p_.cost[k];
            o.cost[k] =
                (p_.heads - o.seconds) * cost[static_cast<size_t>(a)] + o.seconds * cost[static_cast<size_t>(b)];
            fits = fits && o.cost[k] <= p_.most[k];
          }
          if (fits) keep(kept, at, o);
          const Index head = order[static_cast<size_t>(o.seconds)];
          o.loss += loss(layer, head, b) - loss(layer, head, a);
        }
      }
    return kept;
  }

  std::vector<State> extend(const std::vector<State>& from, const std::vector<Option>& options, Index left) const {
    std::vector<State> kept;
    std::unordered_map<std::uint64_t, size_t> at;
    for (size_t i = 0; i < from.size(); ++i)
      for (size_t j = 0; j < options.size(); ++j) {
        State s{.loss = from[i].loss + options[j].loss, .parent = i, .option = j};
        bool fits = true;
        for (size_t k = 0; k < lengths_; ++k) {
          s.cost[k] = from[i].cost[k] + options[j].cost[k];
          fits = fits && s.cost[k] <= p_.most[k] && s.cost[k] + left * p_.heads * dearest_[k] >= least_[k];
        }
        if (fits) keep(kept, at, s);
      }
    return kept;
  }

  template <class T>
  void keep(std::vector<T>& kept, std::unordered_map<std::uint64_t, size_t>& at, const T& x) const {
    const auto [place, fresh] = at.try_emplace(cell_of(x.cost), kept.size());
    if (fresh) kept.push_back(x);
    else if (x.loss < kept[place->second].loss) kept[place->second] = x;
  }

  const RuleProblem& p_;
  size_t lengths_;
  Costs cell_{}, dearest_{}, least_{};
};

Index window_blocks(const SpanRule& rule, Index tokens, Index block) {
  const auto whole = [block](double x) {
    return static_cast<Index>(std::floor(x / static_cast<double>(block) + 1e-9));
  };
  return std::max<Index>(1, whole(rule.alpha) + whole(rule.beta * static_cast<double>(tokens)));
}

}  // namespace

std::vector<SpanRule> candidate_rules(const RuleGrid& grid) {
  if (grid.shortest < 1 || grid.longest < grid.shortest || grid.extended < grid.longest)
    fail("lengths = {}, {}, {}, expected ascending ones >= 1", grid.shortest, grid.longest, grid.extended);
  if (grid.alpha_step < 1) fail("alpha_step = {}, expected >= 1", grid.alpha_step);
  if (grid.betas < 2) fail("betas = {}, expected >= 2", grid.betas);
  std::vector<SpanRule> rules;
  for (Index alpha = -grid.shortest; alpha <= grid.longest; alpha += grid.alpha_step)
    for (Index b = 0; b < grid.betas; ++b) {
      const SpanRule rule{static_cast<double>(alpha), static_cast<double>(b) / static_cast<double>(grid.betas - 1)};
      const auto span = [&](Index tokens) { return rule.alpha + rule.beta * static_cast<double>(tokens); };
      const auto fits = [&](Index tokens) { return span(tokens) <= static_cast<double>(tokens); };
      if (span(grid.shortest) > 0 && fits(grid.longest) && fits(grid.extended)) rules.push_back(rule);
    }
  if (rules.empty()) fail("alpha_step = {}, expected one that leaves a rule", grid.alpha_step);
  return rules;
}

Index kept_blocks(const SpanRule& rule, Index tokens, Index block) {
  return std::min(ceil_div(tokens, block), window_blocks(rule, tokens, block) + 1);
}

double lost_influence(std::span<const float> influence, const SpanRule& rule, Index tokens, Index block) {
  const Index n = ceil_div(tokens, block), window = window_blocks(rule, tokens, block);
  if (static_cast<Index>(influence.size()) != n * n)
    fail("influence: {} blocks, expected {} by {}", influence.size(), n, n);
  double lost = 0;
  for (Index u = 0; u < n; ++u)
    for (Index v = 1; v < u + 1 - window; ++v) lost += static_cast<double>(influence[static_cast<size_t>(u * n + v)]);
  return lost;
}

std::vector<Index> choose_rules(const RuleProblem& p) {
  if (p.layers < 1 || p.heads < 1 || p.rules < 1)
    fail("rules: {} layers, {} heads, {} rules, expected at least one of each", p.layers, p.heads, p.rules);
  if (static_cast<Index>(p.loss.size()) != p.layers * p.heads * p.rules)
    fail("loss: {} values, expected {}", p.loss.size(), p.layers * p.heads * p.rules);
  if (p.most.empty() || p.most.size() > most_lengths || p.cost.size() != p.most.size())
    fail("cost: {} lengths and {} budgets, expected as many of each, 1 … {}", p.cost.size(), p.most.size(),
         most_lengths);
  if (p.rules_per_layer < 1 || p.rules_per_layer > 2) fail("rules_per_layer = {}, expected 1 or 2", p.rules_per_layer);
  for (const std::vector<Index>& cost : p.cost) {
    if (static_cast<Index>(cost.size()) != p.rules) fail("cost: {} values, expected {}", cost.size(), p.rules);
    for (const Index x : cost)
      if (x < 0) fail("cost: {}, expected >= 0", x);
  }
  for (const double x : p.loss)
    if (!std::isfinite(x)) fail("loss: {}, expected finite values", x);
  return Chooser(p).run();
}

}  // namespace heed
