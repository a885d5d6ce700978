// BiFormer: the tokens of each region of an image attend to the few regions that suit theirs best.
// "BiFormer: Vision Transformer with Bi-Level Routing Attention", arXiv:2303.08810.

#include <algorithm>

#include "heed/base/threads.h"
#include "heed/mechanism/extra.h"
#include "heed/mechanism/grids.h"
#include "heed/mechanism/registry.h"
#include "heed/plan/grid_tiles.h"
#include "heed/plan/select.h"
#include "heed/plan/stretches.h"
#include "heed/plan/summary.h"

namespace heed::mechanism {
namespace {

// Regions of floor(H / S) × floor(W / S) tokens. What is left over at the far borders makes regions of its own,
// cut short: there is no padded key that would have to be hidden.
Boxes read_regions(const Params& p, const Inputs& in) {
  const GridShape grid = read_grid(p, in.problem);
  const Index regions = p.integer("regions"), top_k = p.integer("top_k");
  if (grid.axes != 2) fail_usage("biformer: grid = {}, expected two axes, such as 14x14", grid.text);
  const Index height = grid.length[1], width = grid.length[2];
  if (regions > std::min(height, width))
    fail_usage("biformer: regions = {}, expected at most {}, the shorter side of grid = {}", regions,
               std::min(height, width), grid.text);
  if (top_k > regions * regions)
    fail_usage("biformer: top_k = {}, expected at most {}, the square of regions", top_k, regions * regions);
  return {grid.length, {1, 1, 1}, {1, height / regions, width / regions}};
}

// The routing graph of one batch: the top_k regions of each region, ascending, one after the other.
using Routes = std::vector<std::int32_t>;

// Steps 3 and 4: means over all tokens of a region, all heads together, so one graph serves all heads. A region may
// leave itself out. Nothing of the graph but its lists is kept.
std::vector<Routes> route(const Inputs& in, const Boxes& regions, Index top_k) {
  const Problem& problem = in.problem;
  const std::vector<std::int32_t> tokens = regions.tokens();
  const Summary keys = mean_keys(*in.kv, in.problem, tokens, regions.begins());
  const Tensor queries = mean_queries(in.q, problem, tokens, regions.begins());
  const Index count = regions.count(), stride = round_up(count, panel_columns);
  std::vector<Routes> routes(static_cast<size_t>(problem.B), Routes(static_cast<size_t>(count * top_k)));
  constexpr Index at_once = 48;
  const Index runs = ceil_div(count, at_once);
  parallel_for(problem.B * runs, [&](Index unit, int) {
    const Index b = unit / runs, first = unit % runs * at_once, rows = std::min(at_once, count - first);
    Scratch& scratch = thread_scratch();
    const Scratch::Mark mark(scratch);
    float* scores = scratch.take<float>(rows * stride).data();
    for (Index h = 0; h < problem.Hq; ++h) {
      const float* q = queries.as<float>() + ((b * problem.Hq + h) * count + first) * problem.D;
      keys.score(b * problem.Hk + h / problem.group(), q, rows, count, scores, stride, h > 0);
    }
    for (Index i = 0; i < rows; ++i)
      choose_top(scores + i * stride, count, top_k, Ties::lower,
                 routes[static_cast<size_t>(b)].data() + (first + i) * top_k);
  });
  return routes;
}

// Step 6, the depthwise convolution of the values, ready to be added: weights [Hk][s·s][Dv], bias [Hk·Dv].
struct Lepe {
  Index side = 0;  // 0: none
  std::vector<float> weights, bias;
};

Lepe read_lepe(const Inputs& in) {
  const TensorView *w = in.find("lepe_w"), *b = in.find("lepe_b");
  const Index dv = in.problem.Dv, channels = in.problem.Hk * dv;
  if (w == nullptr && b != nullptr) fail("biformer: tensor lepe_w is missing, expected it beside lepe_b");
  if (w == nullptr) return {};
  const Index side = w->shape[1];
  if (w->shape[0] != channels || side != w->shape[2] || side % 2 == 0)
    fail("lepe_w: shape = {}, expected [{}, s, s] with an odd s", to_string(w->shape), channels);
  if (b != nullptr && b->shape[0] != channels) fail("lepe_b: shape = {}, expected [{}]", to_string(b->shape), channels);
  Lepe lepe{.side = side, .weights = std::vector<float>(static_cast<size_t>(channels * side * side)), .bias = {}};
  lepe.bias = b == nullptr ? std::vector<float>(static_cast<size_t>(channels)) : values_of(*b);
  for (Index c = 0; c < channels; ++c)
    for (Index tap = 0; tap < side * side; ++tap)
      read_f32(w->at({c, tap / side, tap % side}), w->dtype, 1, 1,
               &lepe.weights[static_cast<size_t>((c / dv * side * side + tap) * dv + c % dv)]);
  return lepe;
}

Plan plan_biformer(const Params& p, const Inputs& in) {
  const Boxes boxes = read_regions(p, in);
  read_lepe(in);  // refused now or never
  const Index top_k = p.integer("top_k"), count = boxes.count(), keys = in.problem.M;
  Plan plan = make_plan(in.problem, in.q, *in.kv, in.rule, Lanes::per_kv_head);
  if (top_k == count) {
    plan.emit = [keys](const RowBlock& rows, Tiles& tiles) {
      tiles.add(Set::range(0, rows.rows), Set::range(0, keys), Mask::full());
    };
    return plan;
  }
  // Small regions share a row block.
  std::vector<Index> cuts{0};
  for (Index r = 1; r < count; ++r)
    if (boxes.begins()[static_cast<size_t>(r) + 1] - cuts.back() > 128)
      cuts.push_back(boxes.begins()[static_cast<size_t>(r)]);
  cuts.push_back(keys);
  order_rows(plan, boxes.tokens(), cuts);
  const auto regions = std::make_shared<const Boxes>(boxes);
  const auto columns = std::make_shared<const BoxColumns>(lay_out(boxes));
  const auto routes = std::make_shared<const std::vector<Routes>>(route(in, boxes, top_k));
  const Index source = add_permuted(plan, *in.kv, columns->tokens);  // a region is a range of columns
  plan.keep.insert(plan.keep.end(), {regions, columns, routes});

  plan.emit = [=, regions = regions.get(), columns = columns.get(), routes = routes.get()](const RowBlock& rows,
                                                                                           Tiles& tiles) {
    const std::vector<Index>& begins = regions->begins();
    const Index first = regions->box_at(rows.first), last = regions->box_at(rows.first + rows.rows - 1);
    const auto stretches = tiles.take<Stretch>((last - first + 1) * top_k);
    size_t n = 0;
    for (Index r = first; r <= last; ++r) {
      const Index row = begins[static_cast<size_t>(r)] - rows.first,
                  row_end = begins[static_cast<size_t>(r) + 1] - rows.first;
      for (Index i = 0; i < top_k; ++i) {
        const auto j = static_cast<size_t>((*routes)[static_cast<size_t>(rows.b)][static_cast<size_t>(r * top_k + i)]);
        const Index column = columns->begins[j];
        stretches[n++] = {row, row_end, column, column + begins[j + 1] - begins[j]};
      }
    }
    add_stretches(stretches, source, tiles);
  };
  return plan;
}

// Calls visit(tap, from, to, count) for all taps of a filter at line y of the grid: outputs [to, to + count) of that
// line meet inputs from `from` on, as tokens. Beyond the grid's borders there are zeros.
template <class Visit>
void for_taps(const Lepe& lepe, const GridShape& grid, Index y, const Visit& visit) {
  const Index height = grid.length[1], width = grid.length[2], reach = lepe.side / 2;
  for (Index dy = std::max<Index>(0, reach - y); dy < std::min(lepe.side, height + reach - y); ++dy)
    for (Index dx = 0; dx < lepe.side; ++dx) {
      const Index first = std::max<Index>(0, reach - dx), end = std::min(width, width + reach - dx);
      if (first < end)
        visit(dy * lepe.side + dx, (y + dy - reach) * width + first + dx - reach, y * width + first, end - first);
    }
}

// [B · Hk, N, Dv]: of values, or of sums over the query heads of a KV head.
struct Lines {
  Tensor x;
  float* at(Index head, Index token) { return x.as<float>() + (head * x.shape()[1] + token) * x.shape()[2]; }
};

Lines read_values(const Inputs& in) {
  const Problem& p = in.problem;
  Lines v{Tensor(DType::f32, {p.B * p.Hk, p.N, p.Dv})};
  parallel_for(p.B * p.Hk, [&](Index head, int) {
    for (Index t = 0; t < p.N; ++t) in.kv->read_value(head, t, v.at(head, t));
  });
  return v;
}

bool has_lepe(const Params&, const Inputs& in) { return in.find("lepe_w") != nullptr; }

// Step 6: o += lepe_w * v + lepe_b on the whole grid, zeros beyond its borders; lse stays attention's.
void finish_biformer(const Params& p, const Inputs& in, const Plan&, AttendOutput& out) {
  const Lepe lepe = read_lepe(in);
  if (lepe.side == 0) return;
  const Problem& problem = in.problem;
  const GridShape grid = read_grid(p, problem);
  const Index height = grid.length[1], width = grid.length[2], dv = problem.Dv, taps = lepe.side * lepe.side;
  Lines v = read_values(in);
  parallel_for(problem.B * problem.Hk * height, [&](Index unit, int) {
    const Index head = unit / height, y = unit % height, g = head % problem.Hk;
    Scratch& scratch = thread_scratch();
    const Scratch::Mark mark(scratch);
    float* sum = scratch.take<float>(width * dv).data();
    for (Index x = 0; x < width; ++x) std::copy_n(lepe.bias.data() + g * dv, dv, sum + x * dv);
    for_taps(lepe, grid, y, [&](Index tap, Index from, Index to, Index count) {
      const float *w = lepe.weights.data() + (g * taps + tap) * dv, *value = v.at(head, from);
      float* line = sum + (to - y * width) * dv;
      for (Index i = 0; i < count; ++i)
        for (Index e = 0; e < dv; ++e) line[i * dv + e] += w[e] * value[i * dv + e];
    });
    for (Index h = 0; h < problem.group(); ++h) {
      float* o = out.o.as<float>() + ((head * problem.group() + h) * problem.N + y * width) * dv;
      for (Index i = 0; i < width * dv; ++i) o[i] += sum[i];
    }
  });
}

// The convolution's gradients: of its input, on top of attention's, and of its weights, added up line by line.
void finish_gradient_biformer(const Params& p, const Inputs& in, const Differentiated& done, AttendGradients& out) {
  const Lepe lepe = read_lepe(in);
  if (lepe.side == 0) return;
  const Problem& problem = in.problem;
  const GridShape grid = read_grid(p, problem);
  const Index height = grid.length[1], dv = problem.Dv, taps = lepe.side * lepe.side, group = problem.group();
  Lines v = read_values(in), dsum{Tensor(DType::f32, {problem.B * problem.Hk, problem.N, dv})};
  parallel_for(problem.B * problem.Hk, [&](Index head, int) {
    std::vector<float> row(static_cast<size_t>(dv));
    for (Index h = head * group; h < (head + 1) * group; ++h)
      for (Index t = 0; t < problem.N; ++t) {
        read_f32(done.dout.at({h / problem.Hq, h % problem.Hq, t}), done.dout.dtype, done.dout.stride[3], dv,
                 row.data());
        for (Index e = 0; e < dv; ++e) dsum.at(head, t)[e] += row[static_cast<size_t>(e)];
      }
  });
  Tensor dw(DType::f32, {problem.Hk * dv, lepe.side, lepe.side}), db(DType::f32, {problem.Hk * dv});
  parallel_for(problem.Hk, [&](Index g, int) {
    std::vector<double> weight(static_cast<size_t>(taps * dv)), bias(static_cast<size_t>(dv));
    for (Index b = 0; b < problem.B; ++b) {
      const Index head = b * problem.Hk + g;
      for (Index y = 0; y < height; ++y)
        for_taps(lepe, grid, y, [&](Index tap, Index from, Index to, Index count) {
          const float *w = lepe.weights.data() + (g * taps + tap) * dv, *value = v.at(head, from),
                      *d = dsum.at(head, to);
          float* dvalue = out.dv.as<float>() + (head * problem.N + from) * dv;
          for (Index i = 0; i < count * dv; ++i) {
            dvalue[i] += w[i % dv] * d[i];
            weight[static_cast<size_t>(tap * dv + i % dv)] += static_cast<double>(value[i]) * static_cast<double>(d[i]);
          }
        });
      for (Index t = 0; t < problem.N; ++t)
        for (Index e = 0; e < dv; ++e) bias[static_cast<size_t>(e)] += static_cast<double>(dsum.at(head, t)[e]);
    }
    for (Index e = 0; e < dv; ++e) {
      db.as<float>()[g * dv + e] = static_cast<float>(bias[static_cast<size_t>(e)]);
      for (Index tap = 0; tap < taps; ++tap)
        dw.as<float>()[(g * dv + e) * taps + tap] = static_cast<float>(weight[static_cast<size_t>(tap * dv + e)]);
    }
  });
  out.extra.emplace("lepe_w", std::move(dw));
  if (in.find("lepe_b") != nullptr) out.extra.emplace("lepe_b", std::move(db));
}

}  // namespace

const Mechanism& biformer() {
  static const std::vector<DType> real{DType::f32, DType::f16, DType::bf16};
  static const Mechanism m{
      .name = "biformer",
      .title = "BiFormer: bi-level routing attention",
      .paper = "arXiv:2303.08810",
      .year = 2023,
      .stage = "layout, summarize, select, attend, combine",
      .training = Training::required,
      .idea = "A grid of tokens is cut into regions. Each region compares its mean query with the mean keys of all "
              "regions,\n"
              "and its tokens attend to every token of the top_k best: first coarse routing, then fine attention. All "
              "heads\n"
              "share one routing; a region need not choose itself. A depthwise convolution of the values adds local "
              "detail.\n"
              "Where regions does not divide the grid, what is left over makes smaller regions of its own.",
      .equations = "qbar_i, kbar_j = means over the tokens of regions i and j, all heads' channels together [Hq·D]\n"
                   "I(i) = the top_k regions j of largest <qbar_i, kbar_j>\n"
                   "o_t = softmax over keys in the regions I(region of t) of scale·<q_t, k_j>, times v_j\n"
                   "o = o + (lepe_w * v + lepe_b), a convolution per channel on the grid, zeros beyond its borders",
      .cost = "regions^4·Hq·D multiply-adds to route, N·N·top_k/regions^2·(D + Dv) to attend",
      .causality = Causality::refused,
      .square = true,
      .params = {required_grid_spec("56x56"),
                 integer("regions", 7, 1, "regions along each side; at most the shorter side's tokens"),
                 integer("top_k", 4, 1, "regions that a region attends to; at most regions^2")},
      .extras =
          {{"lepe_w", real, {"*", "*", "*"}, false, "[Hk·Dv, s, s], a filter per channel of the values, s odd", true},
           {"lepe_b", real, {"*"}, false, "[Hk·Dv], its bias", true}},
      .not_on_models = "it is not causal, and its regions lie on grids of images",
      .plan = plan_biformer,
      .finishes = has_lepe,
      .finish_gradient = finish_gradient_biformer,
      .finish = finish_biformer,
  };
  return m;
}

}  // namespace heed::mechanism
