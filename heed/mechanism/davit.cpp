// Dual attention: tokens attend to tokens inside windows, or channels attend to channels over all tokens.
// "DaViT: Dual Attention Vision Transformers", arXiv:2204.03645.

#include <algorithm>
#include <cmath>

#include "heed/base/threads.h"
#include "heed/mechanism/grids.h"
#include "heed/mechanism/registry.h"
#include "heed/plan/gram.h"
#include "heed/plan/grid_tiles.h"

namespace heed::mechanism {
namespace {

Plan plan_window(const Params& p, const Inputs& in) {
  if (!p.given("grid")) fail_usage("davit: grid is missing, expected lengths of the token grid's axes, such as 14x14");
  const GridShape grid = read_grid(p, in.problem);
  Extents size;
  for (size_t a = 0; a < 3; ++a) size[a] = std::min(p.integer("window"), grid.length[a]);
  Plan plan = make_plan(in.problem, in.q, *in.kv, in.rule, Lanes::per_kv_head);
  const auto own = std::make_shared<OwnBoxTiles>(Boxes(grid.length, {1, 1, 1}, size));
  own->prepare(plan, *in.kv);
  plan.keep.push_back(own);
  plan.emit = [own = own.get()](const RowBlock& rows, Tiles& tiles) { own->emit(rows, tiles); };
  return plan;
}

// The rows are channels. Their scores are sums over all tokens, made beforehand; as attention a channel's
// query is its row of scores and the key of channel j the unit vector e_j. Values are channels of v.
Plan plan_channel(const Params& p, const Inputs& in) {
  const Problem& tokens = in.problem;
  if (tokens.Dv != tokens.D)
    fail("v: head size {}, expected that of q, {}, where channels attend to channels", tokens.Dv, tokens.D);
  Problem channels = tokens;
  channels.N = channels.M = tokens.D;
  channels.Dv = tokens.N;
  const Index heads = tokens.B * tokens.Hk, c = tokens.D, n = tokens.N;

  const auto scores = std::make_shared<Tensor>(feature_gram(tokens, in.q, *in.kv));
  Tensor unit(DType::f32, {c, c}), values(DType::f32, {heads, n, c});
  for (Index i = 0; i < c; ++i) unit.as<float>()[i * c + i] = 1;
  parallel_for(heads, [&](Index head, int) {
    for (Index t = 0; t < n; ++t) in.kv->read_value(head, t, values.as<float>() + (head * n + t) * c);
  });
  const auto kv = std::make_shared<KeyValues>(heads, c, n, c, DType::f32);
  kv->append(TensorView(unit.data(), DType::f32, {heads, c, c}, {0, c, 1}),
             TensorView(values.data(), DType::f32, {heads, c, n}, {n * c, 1, c}));

  Rule rule = in.rule;
  if (p.text("scale_mode") == "tokens" && !in.scale_given) rule.scale = 1 / std::sqrt(static_cast<float>(n));
  Plan plan = make_plan(channels, Queries(scores->view(), DType::f32), *kv, rule, Lanes::per_kv_head);
  plan.keep = {scores, kv};
  plan.emit = [c](const RowBlock& rows, Tiles& tiles) {
    tiles.add(Set::range(0, rows.rows), Set::range(0, c), Mask::full());
  };
  return plan;
}

Plan plan_davit(const Params& p, const Inputs& in) {
  return p.text("kind") == "window" ? plan_window(p, in) : plan_channel(p, in);
}

bool between_channels(const Params& p, const Inputs&) { return p.text("kind") == "channel"; }

// [a, b, m, n] becomes [a, b, n, m], f32: channels by tokens, and tokens by channels.
Tensor transposed(const TensorView& x) {
  constexpr Index run = 64;
  const Index a = x.shape[0], b = x.shape[1], m = x.shape[2], n = x.shape[3], runs = ceil_div(n, run);
  Tensor y(DType::f32, {a, b, n, m});
  parallel_for(a * b * runs, [&](Index unit, int) {
    const Index head = unit / runs, first = unit % runs * run, count = std::min(run, n - first);
    float row[run], *out = y.as<float>() + (head * n + first) * m;
    for (Index i = 0; i < m; ++i) {
      read_f32(x.at({head / b, head % b, i, first}), x.dtype, x.stride[3], count, row);
      for (Index j = 0; j < count; ++j) out[j * m + i] = row[j];
    }
  });
  return y;
}

void finish_davit(const Params& p, const Inputs& in, const Plan&, AttendOutput& out) {
  if (between_channels(p, in)) out.o = transposed(out.o.view());
}

Tensor unfinish_davit(const Params&, const Inputs&, const Plan&, const TensorView& dout) { return transposed(dout); }

// The plan's queries are the channels' scores: dS = P ⊙ (dP - rowsum(dP ⊙ P)), times scale.
void finish_gradient_davit(const Params& p, const Inputs& in, const Differentiated&, AttendGradients& out) {
  if (!between_channels(p, in)) return;
  FeatureGradients tokens = feature_gram_gradient(in.problem, in.q, *in.kv, out.dq);
  out.dq = std::move(tokens.dq), out.dk = std::move(tokens.dk);
  out.dv = transposed(out.dv.view());
}

}  // namespace

const Mechanism& davit() {
  static const Mechanism m{
      .name = "davit",
      .title = "Dual attention: windows and channels",
      .paper = "arXiv:2204.03645",
      .year = 2022,
      .stage = "layout, attend",
      .training = Training::required,
      .idea = "Two kinds of layers in turn. In one, tokens attend to each other inside separate windows of the grid. "
              "In the\n"
              "other, the channels of a head attend to each other, each described by its values at all tokens: global\n"
              "mixing at a cost that is linear in tokens. Windows that the grid's border cuts are smaller windows.",
      .equations = "window: o_i = softmax over j in the window of i of scale·<q_i, k_j>, times v_j\n"
                   "channel: A = softmax of each row of scale·Q^T·K, [D, D];  O = (A·V^T)^T\n"
                   "channel's scale: D^(-1/2), or N^(-1/2) with scale_mode = tokens",
      .cost = "window: N·window^2·(D + Dv) multiply-adds (two axes); channel: 2·N·D·D",
      .causality = Causality::refused,
      .square = true,
      .params = {choice("kind", "channel", {"channel", "window"}, "what attends to what"),
                 choice("scale_mode", "head", {"head", "tokens"}, "channel: the default scale, D^-1/2 or N^-1/2"),
                 integer("window", 7, 1, "window: its tokens along each axis"), grid_spec()},
      .extras = {},
      .not_on_models = "it is not causal: its windows lie on grids of images, its channels see all tokens",
      .plan = plan_davit,
      // A channel's log-sum-exp belongs to no token.
      .without_lse = [](const Params& p) { return p.text("kind") == "channel"; },
      .finishes = between_channels,
      .unfinish = unfinish_davit,
      .finish_gradient = finish_gradient_davit,
      .finish = finish_davit,
  };
  return m;
}

}  // namespace heed::mechanism
