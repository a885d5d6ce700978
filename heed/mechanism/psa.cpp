// PSA: a block of queries sees the blocks of keys that matter most in full, others as means of 2, 4 or 8
// neighbouring tokens, and the rest not at all.
// "PSA: Pyramid Sparse Attention for Efficient Video Understanding and Generation", arXiv:2512.04025.

#include <algorithm>
#include <array>
#include <charconv>
#include <functional>
#include <memory>

#include "heed/mechanism/registry.h"
#include "heed/plan/importance.h"
#include "heed/plan/level_rule.h"
#include "heed/plan/pyramid.h"

namespace heed::mechanism {
namespace {

constexpr std::array<Index, 4> levels_known{1, 2, 4, 8};  // tokens per column; level 0 is a skipped block

std::vector<LevelBound> read_ratios(const Params& p) {
  const std::string& text = p.text("ratios");
  const auto refuse = [&](const char* expected) { fail_usage("psa: ratios = {}, expected {}", text, expected); };
  std::vector<LevelBound> bounds;
  const char *at = text.data(), *end = at + text.size();
  const auto read = [&](auto& x) {
    const auto [next, error] = std::from_chars(at, end, x);
    at = next;
    return error == std::errc();
  };
  while (at != end || bounds.empty()) {
    LevelBound b;
    if (!bounds.empty() && *at++ != ',') refuse("level:share pairs joined by commas, such as 1:.1,2:.15");
    if (!read(b.level) || at == end || *at++ != ':' || !read(b.share))
      refuse("level:share pairs joined by commas, such as 1:.1,2:.15");
    if (std::find(levels_known.begin(), levels_known.end(), b.level) == levels_known.end())
      refuse("levels 1, 2, 4 and 8");
    if (!bounds.empty() && b.level <= bounds.back().level) refuse("ascending levels");
    if (!(b.share >= (bounds.empty() ? 0 : bounds.back().share) && b.share <= 1))
      refuse("cumulative shares from 0 to 1 that do not fall");
    bounds.push_back(b);
  }
  if (bounds.front().level != 1) bounds.insert(bounds.begin(), {1, 0});
  return bounds;
}

// Step 5: the coarsest level that a block's keys allow, [B·Hk, blocks].
std::vector<std::int32_t> similarity_caps(const Params& p, const KeyValues& kv, Index tokens, Index block) {
  std::vector<std::int32_t> caps(static_cast<size_t>(kv.heads() * ceil_div(tokens, block)), 1);
  for (const auto& [z, name] : {std::pair{2, "t2"}, {4, "t4"}, {8, "t8"}}) {
    const std::vector<float> alike = end_similarity(kv, tokens, block, z);
    for (size_t b = 0; b < caps.size(); ++b)
      if (static_cast<double>(alike[b]) > p.number(name)) caps[b] = z;
  }
  return caps;
}

// How query blocks come by their levels: levels[u·blocks + b] of the u-th of a row block for block b of keys.
using Choose = std::function<void(const RowBlock&, std::int32_t* levels, Scratch&)>;

struct Blocks {
  Index query, key;      // tokens
  Index queries, keys;   // how many
};

// Levels that the caller made. They are taken as they stand: causal hides pairs, and forces nothing here.
Choose read_levels(const Problem& problem, const TensorView& given, const Blocks& blocks, std::array<bool, 9>& used) {
  const Shape expected{problem.B, problem.Hq, blocks.queries, blocks.keys};
  if (given.shape != expected)
    fail("levels: shape = {}, expected [B, Hq, query blocks, key blocks] = {}", to_string(given.shape),
         to_string(expected));
  const auto read = [given](Index b, Index h, Index u, Index k) {
    return *(static_cast<const std::int32_t*>(given.at({b, h, u})) + k * given.stride[3]);
  };
  for (Index i = 0; i < elements(expected); ++i) {
    const Index u = i / blocks.keys, head = u / blocks.queries;
    const std::int32_t level = read(head / problem.Hq, head % problem.Hq, u % blocks.queries, i % blocks.keys);
    if (level != 0 && std::find(levels_known.begin(), levels_known.end(), level) == levels_known.end())
      fail("levels: holds {}, expected 0, 1, 2, 4 or 8", level);
    used[static_cast<size_t>(level)] = true;
  }
  return [=](const RowBlock& rows, std::int32_t* levels, Scratch&) {
    const Index first = rows.first / blocks.query, count = ceil_div(rows.rows, blocks.query);
    for (Index i = 0; i < count * blocks.keys; ++i)
      levels[i] = read(rows.b, rows.head, first + i / blocks.keys, i % blocks.keys);
  };
}

// Steps 3 to 5.
Choose select_levels(const Params& p, const Inputs& in, const Blocks& blocks, std::array<bool, 9>& used) {
  const Problem problem = in.problem;
  const LevelRule rule{read_ratios(p), p.text("mode") == "topk" ? ShareOf::blocks : ShareOf::importance,
                       p.number("min_full")};
  const bool capped = p.boolean("similarity_cap");
  double share = 0;
  for (const LevelBound& b : rule.bounds) {
    used[static_cast<size_t>(b.level)] = b.share > share;
    share = b.share;
    for (Index z = 2; capped && z < b.level; z *= 2) used[static_cast<size_t>(z)] = true;
  }
  const Index fold = p.integer("fold");
  if (problem.causal && (blocks.key % fold != 0 || blocks.query % fold != 0))
    fail_usage("psa: fold = {}, expected a divisor of block = {} and of query_block = {}", fold, blocks.key,
               blocks.query);

  std::shared_ptr<const SampledKeys> sampled;
  std::shared_ptr<const FoldedKeys> folded;
  if (problem.causal) folded = std::make_shared<FoldedKeys>(*in.kv, problem.M, fold);
  else sampled = std::make_shared<SampledKeys>(*in.kv, problem.M, blocks.key, p.integer("sample_stride"));
  const auto caps = std::make_shared<const std::vector<std::int32_t>>(
      capped ? similarity_caps(p, *in.kv, problem.M, blocks.key) : std::vector<std::int32_t>{});

  return [=, queries = in.q, scale = in.rule.scale](const RowBlock& rows, std::int32_t* levels, Scratch& scratch) {
    const Scratch::Mark mark(scratch);
    const Index count = ceil_div(rows.rows, blocks.query), head = rows.b * problem.Hk + rows.kv_head;
    const Importance to{.query_block = blocks.query,
                        .block = blocks.key,
                        .scale = scale,
                        .out = scratch.take<float>(count * blocks.keys).data(),
                        .stride = blocks.keys};
    if (problem.causal) folded->score(queries, rows, head, to, scratch);
    else sampled->score(queries, rows, head, to, scratch);
    for (Index u = 0; u < count; ++u, levels += blocks.keys) {
      const Index begin = rows.position(u * blocks.query), end = std::min(begin + blocks.query, problem.M);
      const Index seen = problem.causal ? ceil_div(end, blocks.key) : blocks.keys;
      // Samples are scored by logarithms, which rank as their exponentials do and never meet in zero.
      rule.assign(to.out + u * to.stride, seen, !problem.causal, levels, scratch);
      for (Index b = 0; capped && b < seen; ++b)
        levels[b] = std::min(levels[b], (*caps)[static_cast<size_t>(head * blocks.keys + b)]);
      if (!problem.causal) continue;
      std::fill(levels + begin / blocks.key, levels + seen, 1);  // blocks that overlap the queries
      levels[0] = 1;
    }
  };
}

// Blocks `ids`, ascending, as columns of a source that has `page` columns a block.
Set columns_of(std::span<const std::int32_t> ids, Index page, Index columns) {
  const Index n = static_cast<Index>(ids.size());
  if (n == 0) return {};
  const Index count = n * page - std::max<Index>(0, (ids.back() + 1) * page - columns);
  if (ids.back() - ids.front() == n - 1) return Set::range(ids.front() * page, ids.front() * page + count);
  return {0, count, ids.data(), page};
}

// Choosing takes N·N·D / sample_stride² multiply-adds, or N·N·D / (2·fold) when causal.
Plan plan_psa(const Params& p, const Inputs& in) {
  const Problem problem = in.problem;
  const Index query_block = p.integer("query_block"), block = p.integer("block");
  if (block % 8 != 0) fail_usage("psa: block = {}, expected a multiple of 8", block);
  const Blocks blocks{query_block, block, ceil_div(problem.N, query_block), ceil_div(problem.M, block)};
  std::array<bool, 9> used{};
  const TensorView* given = in.find("levels");
  const Choose choose =
      given != nullptr ? read_levels(problem, *given, blocks, used) : select_levels(p, in, blocks, used);

  Plan plan = make_plan(problem, in.q, *in.kv, in.rule, Lanes::per_query_head);
  // Query blocks of one row block are scored together; there are enough of them to share the work.
  plan.cut_rows_every(query_block * std::clamp<Index>(blocks.queries / 16, 1, 6));
  // Steps 1 and 2: column j of level z is the mean of z tokens and weighs as much as they do.
  std::array<Index, 4> source{};
  for (size_t i = 1; i < 4; ++i)
    if (used[static_cast<size_t>(levels_known[i])])
      source[i] = add_pooled(plan, pool_every(*in.kv, problem.M, levels_known[i]), PooledWeight::tokens);

  plan.emit = [=](const RowBlock& rows, Tiles& tiles) {
    const Index count = ceil_div(rows.rows, query_block);
    std::int32_t* levels = tiles.take<std::int32_t>(count * blocks.keys).data();
    std::int32_t* ids = tiles.take<std::int32_t>(count * blocks.keys).data();
    choose(rows, levels, tiles.scratch());
    for (Index u = 0; u < count; ++u, levels += blocks.keys) {
      const Set these = Set::range(u * query_block, std::min(rows.rows, (u + 1) * query_block));
      // Blocks before `past` are past for every row. Beyond, a group is seen by the rows that its last token is past
      // for.
      const Index first = rows.position(these.first), last = first + these.count - 1;
      const Index past = problem.causal ? (first + 1) / block : blocks.keys;
      const Index end = problem.causal ? last / block + 1 : blocks.keys;
      for (size_t i = 0; i < 4; ++i) {
        const Index z = levels_known[i];
        const auto add = [&](Index from, Index to, const Mask& mask) {
          std::int32_t* list = ids;
          for (Index b = from; b < to; ++b)
            if (levels[b] == z) *ids++ = static_cast<std::int32_t>(b);
          tiles.add(these, columns_of({list, ids}, block / z, ceil_div(problem.M, z)), mask, source[i]);
        };
        add(0, past, Mask::full());
        add(past, end, Mask::causal());
      }
    }
  };
  return plan;
}

ParamSpec ratios_spec() {
  ParamSpec s;
  s.name = "ratios", s.kind = ParamKind::levels, s.fallback = "1:.10,2:.15,4:.15,8:.35";
  s.help =
      "per level the cumulative share, of blocks (topk) or importance (threshold), where it ends; the rest is skipped";
  return s;
}

}  // namespace

const Mechanism& psa() {
  static const Mechanism m{
      .name = "psa",
      .title = "PSA: pyramid sparse attention",
      .paper = "arXiv:2512.04025",
      .year = 2025,
      .stage = "summarize, select, attend",
      .training = Training::none,
      .idea =
          "Instead of keeping or dropping a block of keys, each block of queries gives it a level: in full, as means "
          "of\n"
          "2, 4 or 8 neighbouring tokens, or nothing. Blocks of little importance still say a little, at little cost.\n"
          "Video comes in an order that keeps neighbours together (a Hilbert curve through the grid), as means are\n"
          "only as good as neighbours are alike.",
      .equations =
          "K_z[j], V_z[j] = mean of tokens z·j … z·j + z - 1, as many as there are, n of them;  score: scale·<q_i, "
          "K_z[j]> + ln n\n"
          "o_i = one softmax over the columns of all blocks, each at its level\n"
          "importance of block b for query block a: max over sampled i in a, j in b of exp(s_ij - max_j' s_ij')\n"
          "  causal: sum over folds of softmax(scale/fold · sum over t of <q_(i·fold + fold-1-t), k_(j·fold + t)>)\n"
          "topk: shares of the ranked blocks;  threshold: shares of their cumulated importance, and one block more\n"
          "causal: blocks that overlap the queries, and the first, in full;  group j is seen once all of it is past",
      .cost = "N·N·sum(1/level)/blocks·(D + Dv) multiply-adds to attend, N·N·D/sample_stride² (causal: /(2·fold)) to "
              "choose",
      .causality = Causality::either,
      .square = true,
      .params = {integer("query_block", 128, 1, "queries that share their levels"),
                 integer("block", 64, 8, "tokens per block of keys, a multiple of 8"),
                 choice("mode", "topk", {"topk", "threshold"}, "what the shares are of"), ratios_spec(),
                 number("min_full", 0.06, 0, 1, "threshold: least share of the blocks in full"),
                 integer("sample_stride", 4, 1,
                         "not causal: of a block's queries and keys, every how many-th is scored"),
                 integer("fold", 16, 1, 128, "causal: tokens per antidiagonal; divides both blocks"),
                 boolean("similarity_cap", false, "pool no block coarser than its keys are alike"),
                 number("t2", 0.7, -1, 1, "least mean cosine of neighbours for level 2"),
                 number("t4", 0.65, -1, 1, "of the first and last of 4 for level 4"),
                 number("t8", 0.6, -1, 1, "of the first and last of 8 for level 8")},
      .extras = {{"levels",
                  {DType::i32},
                  {"B", "Hq", "*", "*"},
                  false,
                  "[B, Hq, query blocks, key blocks] of 0 (skipped), 1, 2, 4, 8: taken as they stand"}},
      .not_on_models = "",
      .plan = plan_psa,
  };
  return m;
}

}  // namespace heed::mechanism
