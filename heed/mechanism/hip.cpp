// HiP: each block of queries searches a binary tree over the keys for those that score highest, and
// attends to them, to a window and to the first tokens.
// "HiP Attention: Sparse Sub-Quadratic Attention with Hierarchical Attention Pruning", arXiv:2406.09827.

#include "heed/mechanism/registry.h"
#include "heed/plan/beam.h"
#include "heed/plan/sampled.h"
#include "heed/plan/selection.h"

namespace heed::mechanism {
namespace {

struct Search {
  Index budget, query_stride, key_block, key_stride, window, sink;
  Representative representative;
  Index beam() const { return ceil_div(budget, key_block); }
  // Keys that no sink and no window of a block's last query, at position `last`, holds. A window is at
  // least as long as a query block, so none of them is after any of its queries.
  KeyBlocks range(Index last) const { return {sink, std::max(sink, last + 1 - window), key_block, key_stride}; }
};

// A search that decode steps share (step 7): the position it was made at, and what it found.
struct Searched {
  Index at = 0;
  Select found;
};

// A search of B blocks scores 2·budget·log2(B / beam) keys against query_block / query_stride queries.
Plan plan_hip(const Params& p, const Inputs& in) {
  const Index query_block = p.integer("query_block"), refresh = p.integer("refresh");
  const std::string& speaker = p.text("representative");
  const Search search{.budget = p.integer("budget"),
                      .query_stride = p.integer("query_stride"),
                      .key_block = p.integer("key_block"),
                      .key_stride = p.integer("key_stride"),
                      .window = p.integer("window"),
                      .sink = p.integer("sink"),
                      .representative = speaker == "first"  ? Representative::first
                                        : speaker == "last" ? Representative::last
                                                            : Representative::centre};
  if (search.key_block > search.budget)
    fail_usage("hip: key_block = {}, expected at most budget = {}", search.key_block, search.budget);
  if (search.window < query_block)
    fail_usage("hip: window = {}, expected at least query_block = {}", search.window, query_block);
  if (in.memory != nullptr && search.window < refresh)
    fail_usage("hip: window = {}, expected at least refresh = {}", search.window, refresh);

  Plan plan = make_plan(in.problem, in.q, *in.kv, in.rule, Lanes::per_query_head);  // every head searches for itself
  plan.cuts = {0};
  while (plan.cuts.back() < in.problem.N) plan.cuts.push_back(std::min(plan.cuts.back() + query_block, in.problem.N));

  const Queries queries = in.q;
  // The last query's range is the longest.
  const bool searches = in.problem.M - search.window - search.sink > search.budget;
  const KeyRows keys = searches ? in.kv->key_rows() : KeyRows{};
  if (searches) show_key_rows(plan, *in.kv);
  const PanelLayout layout = in.kv->layout();
  const Index heads = in.problem.Hk;
  const auto blocks_in = [search](const KeyBlocks& range) {
    return ceil_div(range.end - range.begin, search.key_block);
  };
  // Steps 3 and 4.
  const auto find = [=](const RowBlock& rows, Scratch& scratch) -> std::span<const std::int32_t> {
    const KeyBlocks range = search.range(rows.position(rows.rows - 1));
    if (blocks_in(range) <= search.beam()) return {};
    const SampledQueries sampled(queries, rows, search.query_stride, layout, scratch);
    return beam_search(blocks_in(range), search.beam(), search.representative, scratch,
                       [&](std::span<const std::int32_t> blocks, float* scores) {
                         sampled.score(keys, rows.b * heads + rows.kv_head, range, blocks, search.window, scores);
                       });
  };

  // Step 7. Decode steps use what one of them found until it is `refresh` steps old. The window then begins
  // where it began for that step, so that no key falls between it and the range that was searched.
  Index age = 0;  // steps since the search
  Select select;
  if (in.memory != nullptr && in.problem.N == 1) {
    const Index now = in.problem.M - 1;
    const auto* searched = std::any_cast<Searched>(in.memory);
    if (searched == nullptr || now < searched->at || now - searched->at >= refresh)
      *in.memory = Searched{now, select_now(plan, find)}, searched = std::any_cast<Searched>(in.memory);
    age = now - searched->at, select = searched->found;
  } else {
    select = find;
  }

  plan.emit = [=](const RowBlock& rows, Tiles& tiles) {
    const Set all = Set::range(0, rows.rows);
    const Index last = rows.position(rows.rows - 1), window = search.window + age;
    const KeyBlocks range = search.range(last - age);
    const Index blocks = blocks_in(range);
    // Step 2: a short range is taken whole, which is dense attention.
    if (blocks <= search.beam()) {
      tiles.add(all, Set::range(0, last + 1), Mask::causal());
      return;
    }
    // Step 5. The window of query p is (p - window, p]; sinks and selected keys inside it count there.
    const Mask before_window = Mask::band(-Mask::unbounded, -window);
    const std::span<const std::int32_t> chosen = select(rows, tiles.scratch());
    const Index cut_off = chosen.back() == blocks - 1 ? range.begin + blocks * search.key_block - range.end : 0;
    tiles.add(all, Set::range(0, search.sink), before_window);
    tiles.add(all,
              Set{search.sink, static_cast<Index>(chosen.size()) * search.key_block - cut_off, chosen.data(),
                  search.key_block},
              before_window);
    tiles.add(all, Set::range(std::max<Index>(0, rows.position(0) - window + 1), last + 1), Mask::band(-window + 1, 0));
  };
  return plan;
}

}  // namespace

const Mechanism& hip() {
  static const Mechanism m{
      .name = "hip",
      .title = "HiP: hierarchically pruned attention",
      .paper = "arXiv:2406.09827",
      .year = 2024,
      .stage = "select, attend",
      .training = Training::none,
      .idea = "Nearby keys score alike, so one key can speak for its neighbours. Each block of queries halves "
              "stretches of\n"
              "keys again and again, keeping those whose middle scores highest, until `budget` single keys are left.\n"
              "It attends to them, to its window and to the first tokens. An isolated key among indifferent ones may "
              "be missed.",
      .equations =
          "node [a, e) of key blocks is judged by block a + floor((e - a) / 2): max over sampled q_i, its k_j, of "
          "<q_i, k_j>\n"
          "budget / key_block nodes; halve all, keep the best budget / key_block; repeat until they are single blocks\n"
          "S(i) = {j < sink} + {selected j <= i - window} + {i - window < j <= i}\n"
          "o_i = softmax over j in S(i) of scale·<q_i, k_j>, times v_j",
      .cost = "N·2·budget·log2(N / budget)·D / query_stride multiply-adds to search, N·(budget + window + sink)·(D + "
              "Dv) to attend",
      .causality = Causality::implied,
      .square = false,
      .params = {integer("budget", 512, 1, "keys that a query block selects"),
                 integer("query_block", 64, 1, "queries that search together"),
                 integer("query_stride", 2, 1, "of those, every how many-th is scored"),
                 integer("key_block", 2, 1, "keys that are selected together"),
                 integer("key_stride", 1, 1, "of those, every how many-th is scored"),
                 integer("window", 256, 1, "latest tokens that a query sees, its own included; at least query_block"),
                 integer("sink", 16, 0, "first tokens that every query sees"),
                 choice("representative", "centre", {"centre", "first", "last"}, "the block that speaks for a stretch"),
                 integer("refresh", 8, 1, "decode steps that share one search; at most window")},
      .extras = {},
      .not_on_models = "",
      .plan = plan_hip,
  };
  return m;
}

}  // namespace heed::mechanism
