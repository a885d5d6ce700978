// Combiner: a query meets a few tokens directly and all others through summaries of regions, in one softmax.
// "Combiner: Full Attention Transformer with Sparse Computation Cost", arXiv:2107.05768.

#include <algorithm>
#include <bit>
#include <memory>

#include "heed/base/threads.h"
#include "heed/exec/spans.h"
#include "heed/mechanism/registry.h"
#include "heed/plan/largest.h"
#include "heed/plan/permute.h"

namespace heed::mechanism {
namespace {

// Summaries of one kind. A region is a run of ranks; `tokens` gives the token of a rank, or is empty: rank = token.
// Queries meet columns: column c is region order[c] (-1: none, to be masked), at position[c], that of its last member.
struct Summaries {
  std::vector<std::int32_t> tokens;
  std::vector<BlockRange> regions;
  std::vector<std::int32_t> order, position;
};

// p(j | region) is the same for every query, so a region's value is computed once: softmax(q·k) v over its tokens, with
// q the largest of each feature of the scaled queries. `rule` has the scale alone.
Rule rule_of_regions(const Inputs& in) {
  Rule rule;
  rule.scale = in.rule.scale;
  return rule;
}

// Adds them as a source whose columns differ by query head. A key is the largest of each feature of its region's keys.
// No log-weight: a region counts like one token. `from` of the plan's sources has the tokens by rank.
Index add_summaries(Plan& plan, const Inputs& in, Index from, const Summaries& s) {
  const Problem& p = in.problem;
  const Rule rule = rule_of_regions(in);
  const Largest most = largest_features(p, in.q, *in.kv, rule.scale, s.tokens, s.regions);
  const Tensor v = attend_spans(p, Queries(most.q.view(), in.q.arithmetic()), plan.sources[static_cast<size_t>(from)],
                                rule, s.regions);
  KeyValues summaries(p.B * p.Hq, p.D, p.Dv, static_cast<Index>(s.regions.size()), in.q.arithmetic());
  summaries.append(most.k.view(), v.view());

  const Index at = static_cast<Index>(plan.sources.size());
  const std::shared_ptr<const PermutedSource> permuted = permute(summaries, s.order);
  const auto positions = std::make_shared<const std::vector<std::int32_t>>(s.position);
  Source& source = plan.sources.emplace_back(permuted->source);
  source.per_query_head = true;
  // The members are summaries, not tokens.
  for (SourceView& view : source.views) view.position = positions->data(), view.members = nullptr;
  plan.keep.insert(plan.keep.end(), {permuted, positions});
  return at;
}

// The gradients of such a source go home both ways: a column's key and its region's query to the tokens that had the
// largest features, its value through the softmax that made it, which leads to the region's query, too. A query so
// hears from later queries that met its region.
void take_home(const Inputs& in, const Source& from, const Summaries& s, const SourceGradients& columns,
               AttendGradients& out) {
  const Problem& p = in.problem;
  const Index regions = static_cast<Index>(s.regions.size()), count = static_cast<Index>(s.order.size());
  Largest dmost{Tensor(DType::f32, {p.B, p.Hq, regions, p.D}), Tensor(DType::f32, {p.B, p.Hq, regions, p.D})};
  Tensor dvalue(DType::f32, {p.B, p.Hq, regions, p.Dv});
  parallel_for(p.B * p.Hq, [&](Index head, int) {
    const auto add = [&](const Tensor& x, Tensor& to, Index width) {
      for (Index c = 0; c < count; ++c)
        if (const Index region = s.order[static_cast<size_t>(c)]; region >= 0)
          for (Index i = 0; i < width; ++i)
            to.as<float>()[(head * regions + region) * width + i] += x.as<float>()[(head * count + c) * width + i];
    };
    add(columns.dk, dmost.k, p.D), add(columns.dv, dvalue, p.Dv);
  });
  const Rule rule = rule_of_regions(in);
  const Largest most = largest_features(p, in.q, *in.kv, rule.scale, s.tokens, s.regions);
  SpanGradients inside =
      attend_spans_backward(p, Queries(most.q.view(), in.q.arithmetic()), from, rule, s.regions, dvalue.view());
  dmost.q = std::move(inside.dq);
  largest_features_backward(p, in.q, *in.kv, rule.scale, s.tokens, s.regions, dmost, out.dq, out.dk);
  parallel_for(p.B * p.Hk, [&](Index head, int) {
    const auto add = [&](const Tensor& x, Tensor& to, Index width) {
      for (Index rank = 0; rank < p.M; ++rank) {
        const Index token = s.tokens.empty() ? rank : s.tokens[static_cast<size_t>(rank)];
        for (Index i = 0; i < width; ++i)
          to.as<float>()[(head * p.M + token) * width + i] += x.as<float>()[(head * p.M + rank) * width + i];
      }
    };
    add(inside.source.dk, out.dk, p.D), add(inside.source.dv, out.dv, p.Dv);
  });
}

// Fixed: every block of the tokens.
Summaries whole_blocks(Index N, Index block) {
  Summaries s;
  for (Index begin = 0; begin < N; begin += block) {
    s.order.push_back(static_cast<std::int32_t>(s.regions.size()));
    s.position.push_back(static_cast<std::int32_t>(begin + block - 1));
    s.regions.push_back({begin, begin + block});
  }
  return s;
}

// Fixed: the own block directly, earlier blocks as regions. Not causal: all of the own block, and every block as a
// region, the own one too, as released.
Plan plan_fixed(const Inputs& in, Index block) {
  const bool causal = in.problem.causal;
  Plan plan = make_plan(in.problem, in.q, *in.kv, in.rule, Lanes::per_query_head);
  const Summaries blocks = whole_blocks(in.problem.N, block);
  const Index summaries = add_summaries(plan, in, 0, blocks);
  plan.emit = [=, all = static_cast<Index>(blocks.regions.size())](const RowBlock& rows, Tiles& tiles) {
    for (Index begin = 0, end; begin < rows.rows; begin = end) {
      const Index own = rows.position(begin) / block;
      end = std::min(rows.rows, begin + (own + 1) * block - rows.position(begin));
      const Set queries = Set::range(begin, end);
      tiles.add(queries, Set::range(0, causal ? own : all), Mask::full(), summaries);
      const Index columns_end = causal ? rows.position(end - 1) + 1 : (own + 1) * block;
      tiles.add(queries, Set::range(own * block, columns_end), causal ? Mask::causal() : Mask::full());
    }
  };
  return plan;
}

// Logsparse: rows come in blocks of 64. What they see: of levels 1 … 5 the 31 even blocks inside their own 64
// positions, and of each higher level one block, the same for all of them. That fits one panel; level 0 is the input
// itself.
constexpr Index rows_at_once = 64, low_levels = 6, low_columns = 31;

// The column, in its rows' panel, of the block of 2^level tokens that begins there.
Index slot(Index level, Index begin) {
  if (level >= low_levels) return low_columns + level - low_levels;
  return (rows_at_once >> 1) - (rows_at_once >> level) + (begin % rows_at_once >> (level + 1));
}

Index levels_of(Index N) { return std::max<Index>(1, std::bit_width(static_cast<std::uint64_t>(N - 1))); }

// Even blocks of 2, 4, 8 … tokens that some query needs.
Summaries even_blocks(Index N) {
  Summaries s;
  std::vector<Index> first(1, 0);  // first[l] numbers the blocks of level l, block 2x being first[l] + x
  const Index levels = levels_of(N);
  for (Index level = 1; level < levels; ++level) {
    const Index size = Index{1} << level;
    first.push_back(static_cast<Index>(s.regions.size()));
    for (Index begin = 0; begin + size < N; begin += 2 * size) s.regions.push_back({begin, begin + size});
  }
  s.order.assign(static_cast<size_t>(round_up(N, rows_at_once)), -1), s.position.assign(s.order.size(), 0);
  for (Index i = 0; i < N; ++i)
    for (Index level = 1; level < levels; ++level) {
      if (((i >> level) & 1) == 0) continue;
      const Index begin = ((i >> level) - 1) << level;
      const auto column = static_cast<size_t>(i / rows_at_once * rows_at_once + slot(level, begin));
      s.order[column] = static_cast<std::int32_t>(first[static_cast<size_t>(level)] + (begin >> (level + 1)));
      s.position[column] = static_cast<std::int32_t>(begin + (Index{1} << level) - 1);
    }
  return s;
}

// Logsparse: query i meets itself and, for each bit l of i that is set, the aligned block of 2^l tokens just before
// its own block of that size: together 0 … i, once each.
Plan plan_logsparse(const Inputs& in) {
  const Index N = in.problem.N, levels = levels_of(N);
  Plan plan = make_plan(in.problem, in.q, *in.kv, in.rule, Lanes::per_query_head);
  plan.cut_rows_every(rows_at_once);
  const Index summaries = levels == 1 ? 0 : add_summaries(plan, in, 0, even_blocks(N));
  plan.emit = [=](const RowBlock& rows, Tiles& tiles) {
    const auto own = tiles.take<std::uint64_t>(rows.rows), pooled = tiles.take<std::uint64_t>(rows.rows);
    const Index begin = rows.position(0);
    for (Index i = 0; i < rows.rows; ++i) {
      const auto row = static_cast<size_t>(i);
      own[row] = std::uint64_t{i % 2 == 0 ? 1u : 3u} << (i - i % 2);  // level 0: the even token before an odd one
      pooled[row] = 0;
      for (Index level = 1; level < levels; ++level)
        if ((((begin + i) >> level) & 1) != 0)
          pooled[row] |= std::uint64_t{1} << slot(level, (((begin + i) >> level) - 1) << level);
    }
    const Set all = Set::range(0, rows.rows);
    if (summaries != 0)
      tiles.add(all, Set::range(begin, begin + rows_at_once), Mask::bits(pooled.data(), 1), summaries);
    tiles.add(all, Set::range(begin, begin + rows.rows), Mask::bits(own.data(), 1));
  };
  return plan;
}

// Mixture: tokens as a matrix of n rows of `block`. Query (r, c) meets (a) its column above it and (b) its row up to
// itself directly; (c) every other column as the summary of its rows before r; of every row above, the summaries
// of (d) what is left of column c and (e) what is right of it. Here are (c), (d) and (e).
std::vector<Summaries> running_parts(Index N, Index block) {
  const Index n = N / block;
  const auto all = static_cast<size_t>(N);
  Summaries above, left, right;
  above.tokens.resize(all);
  for (Summaries* s : {&above, &left, &right}) s->order.resize(all), s->position.resize(all);
  for (Index t = 0; t < N; ++t) {
    // Column by column: rank c·n + r is token r·block + c.
    const Index r = t / block, c = t % block, from_end = N - 1 - t;
    const auto rank = static_cast<size_t>(c * n + r), token = static_cast<size_t>(t);
    above.tokens[rank] = static_cast<std::int32_t>(t);
    // Regions grow from one to the next: those right of a column in descending order.
    above.regions.push_back({t / n * n, t + 1});  // of rank t
    left.regions.push_back({r * block, t + 1});
    right.regions.push_back({from_end, (from_end / block + 1) * block});
    // (c) in the order of tokens: column c of rows 0 … r. (d) and (e) by column, for the query's column c.
    above.order[token] = static_cast<std::int32_t>(rank), above.position[token] = static_cast<std::int32_t>(t);
    left.order[rank] = static_cast<std::int32_t>(c > 0 ? t - 1 : -1);
    left.position[rank] = static_cast<std::int32_t>(t - 1);
    right.order[rank] = static_cast<std::int32_t>(c + 1 < block ? N - 1 - (t + 1) : -1);
    right.position[rank] = static_cast<std::int32_t>((r + 1) * block - 1);
  }
  return {std::move(above), std::move(left), std::move(right)};
}

Plan plan_mixture(const Inputs& in, Index block) {
  const Index N = in.problem.N, n = N / block;
  Plan plan = make_plan(in.problem, in.q, *in.kv, in.rule, Lanes::per_query_head);
  const std::vector<Summaries> parts = running_parts(N, block);
  const Index columns = add_permuted(plan, *in.kv, parts[0].tokens);
  const Index c_source = add_summaries(plan, in, columns, parts[0]);
  const Index d_source = add_summaries(plan, in, 0, parts[1]), e_source = add_summaries(plan, in, 0, parts[2]);

  // A row block holds enough rows of the matrix for a column's queries to share its keys, and a state that a
  // cache holds.
  const Index matrix_rows = std::max<Index>(12, 3072 / block / 6 * 6);
  plan.cut_rows_every(matrix_rows * block);
  plan.emit = [=](const RowBlock& rows, Tiles& tiles) {
    const Index r0 = rows.position(0) / block, r1 = r0 + rows.rows / block, words = ceil_div(block, panel_columns);
    const auto others = tiles.take<std::uint64_t>(block * words);  // every column but the query's
    std::fill(others.begin(), others.end(), ~std::uint64_t{0});
    for (Index c = 0; c < block; ++c) others[static_cast<size_t>(c * words + c / 64)] ^= std::uint64_t{1} << (c % 64);
    for (Index r = r0; r < r1; ++r) {
      const Set row = Set::range((r - r0) * block, (r - r0 + 1) * block);
      if (r > 0) tiles.add(row, Set::range((r - 1) * block, r * block), Mask::bits(others.data(), words), c_source);
      tiles.add(row, Set::range(r * block, (r + 1) * block), Mask::causal());
    }
    for (Index c = 0; c < block; ++c) {
      const auto list = tiles.take<std::int32_t>(r1 - r0);
      for (Index r = r0; r < r1; ++r)
        list[static_cast<size_t>(r - r0)] = static_cast<std::int32_t>((r - r0) * block + c);
      // Rows above: a token of column c there stands at least `block` before the query; what is left of it ends one
      // earlier, what is right of it ends with its row.
      const Set above_it = Set::range(c * n, c * n + r1 - 1);
      tiles.add(Set::list(list), above_it, Mask::band(-Mask::unbounded, -block), columns);
      if (c > 0) tiles.add(Set::list(list), above_it, Mask::band(-Mask::unbounded, -block - 1), d_source);
      if (c + 1 < block) tiles.add(Set::list(list), above_it, Mask::band(-Mask::unbounded, -c - 1), e_source);
    }
  };
  return plan;
}

Plan plan_combiner(const Params& p, const Inputs& in) {
  const Index block = p.integer("block"), N = in.problem.N;
  const std::string& variant = p.text("variant");
  if (variant != "fixed" && !in.problem.causal)
    fail_usage("combiner: causal = false, expected true with variant = {}", variant);
  if (variant == "logsparse") return plan_logsparse(in);
  if (N % block != 0) fail_usage("combiner: block = {}, expected a divisor of N = {}", block, N);
  return variant == "fixed" ? plan_fixed(in, block) : plan_mixture(in, block);
}

// Summaries are the plan's last sources, in this order. Those that read tokens by another order read the source before
// the first of them.
void finish_gradient_combiner(const Params& p, const Inputs& in, const Differentiated& done, AttendGradients& out) {
  const Index N = in.problem.N;
  const std::string& variant = p.text("variant");
  std::vector<Summaries> kinds;
  if (variant == "fixed") kinds.push_back(whole_blocks(N, p.integer("block")));
  else if (variant == "mixture") kinds = running_parts(N, p.integer("block"));
  else if (levels_of(N) > 1) kinds.push_back(even_blocks(N));
  const std::vector<Source>& sources = done.plan.sources;
  const size_t first = sources.size() - kinds.size();
  for (size_t i = 0; i < kinds.size(); ++i)
    take_home(in, sources[kinds[i].tokens.empty() ? 0 : first - 1], kinds[i], done.gradients.sources[first + i], out);
}

}  // namespace

const Mechanism& combiner() {
  static const Mechanism m{
      .name = "combiner",
      .title = "Combiner: full attention through summaries",
      .paper = "arXiv:2107.05768",
      .year = 2021,
      .stage = "summarize, select (static), attend",
      .training = Training::required,
      .idea =
          "A query meets a few tokens directly and every other allowed token as part of a region, which counts like "
          "one\n"
          "token: a key pooled over the region and a value that the region's own pooled query attends to. fixed: the\n"
          "own block and earlier blocks; logsparse: aligned blocks of 1, 2, 4, … tokens that make up the past;\n"
          "mixture: the tokens as rows of `block`, with the own row and column direct, and others as summaries.",
      .equations =
          "q_R, k_R = max of each feature of scale·q_j, k_j over j in R;  p(j | R) = softmax over j in R of <q_R, "
          "k_j>\n"
          "v_R = sum of p(j | R) v_j\n"
          "o_i = softmax over direct tokens j and regions R of scale·<q_i, k_j>, scale·<q_i, k_R>, times v_j, v_R",
      .cost = "(D + Dv) times, fixed N·(block/2 + N/(2·block) + 1), logsparse N·log2(N), mixture N·(2.5·block + "
              "2·N/block) multiply-adds",
      .causality = Causality::either,
      // The summary of a region needs its queries, so all of them must be there.
      .square = true,
      .params = {choice("variant", "fixed", {"fixed", "logsparse", "mixture"},
                        "the regions; logsparse and mixture are causal only"),
                 integer("block", 128, 1, "tokens per block or row, a divisor of N; logsparse has none")},
      .extras = {},
      .not_on_models = "its summaries must be trained with the model",
      .plan = plan_combiner,
      .finish_gradient = finish_gradient_combiner,
  };
  return m;
}

}  // namespace heed::mechanism
