// PAROAttention: every head takes the tokens of a video or image in the order of axes that gathers its attention into
// few blocks; the others are never computed.
// "PAROAttention: Pattern-Aware ReOrdering for Efficient Sparse and Quantized Attention in Visual Generation
// Models", arXiv:2506.16054.

#include <algorithm>
#include <memory>

#include "heed/mechanism/grids.h"
#include "heed/mechanism/paro_calibration.h"
#include "heed/mechanism/registry.h"
#include "heed/plan/permute.h"

namespace heed::mechanism {
namespace {

ParoOptions read_options(const Params& p, const Problem& problem) {
  ParoOptions options{.text = p.integer("text_len"),
                      .block = p.integer("block"),
                      .density = p.number("density"),
                      .alpha = p.number("alpha"),
                      .eps = p.number("eps"),
                      .sigma = p.number("sigma")};
  if (options.text >= problem.N)
    fail_usage("paro: text_len = {}, expected fewer than the {} tokens", options.text, problem.N);
  options.grid = read_grid(p, problem, options.text).length;
  options.block = std::min(options.block, problem.N);
  return options;
}

/// `order`, each element 0 … 5, or nothing when the caller did not give it.
std::optional<Tensor> read_order(const Inputs& in) {
  const TensorView* x = in.find("order");
  if (x == nullptr) return std::nullopt;
  Tensor order(DType::i32, {in.problem.Hq});
  for (Index h = 0; h < in.problem.Hq; ++h) {
    const std::int32_t o = *static_cast<const std::int32_t*>(x->at({h}));
    if (o < 0 || o > 5) fail("order: element {} = {}, expected 0 … 5", h, o);
    order.as<std::int32_t>()[h] = o;
  }
  return order;
}

/// `mask`, or nothing when the caller did not give it.
std::optional<Tensor> read_mask(const Inputs& in, const ParoOptions& options) {
  const TensorView* x = in.find("mask");
  if (x == nullptr) return std::nullopt;
  const Index heads = in.problem.Hq, count = options.blocks(in.problem.N);
  if (x->shape != Shape{heads, count, count})
    fail("mask: shape = {}, expected {}: blocks of {} over {} tokens", to_string(x->shape),
         to_string({heads, count, count}), options.block, in.problem.N);
  Tensor mask(DType::u8, x->shape);
  auto* out = mask.as<std::uint8_t>();
  for (Index h = 0; h < heads; ++h)
    for (Index i = 0; i < count; ++i)
      for (Index j = 0; j < count; ++j) *out++ = *static_cast<const std::uint8_t*>(x->at({h, i, j})) != 0 ? 1 : 0;
  return mask;
}

ParoCalibration read_or_calibrate(const Inputs& in, const ParoOptions& options) {
  std::optional<Tensor> order = read_order(in), mask = read_mask(in, options);
  if (!mask) return calibrate_paro(options, in.problem, in.q, *in.kv, in.rule.scale, order ? &*order : nullptr);
  // A mask alone speaks of the tokens as they stand.
  ParoCalibration given;
  given.order = order ? std::move(*order) : Tensor(DType::i32, {in.problem.Hq});
  given.mask = std::move(*mask);
  return given;
}

NamedTensors calibrate(const Params& p, const Inputs& in) {
  ParoCalibration c = read_or_calibrate(in, read_options(p, in.problem));
  NamedTensors tensors;
  tensors.emplace("order", std::move(c.order));
  tensors.emplace("mask", std::move(c.mask));
  return tensors;
}

/// Rows and columns of every head in its order. Keys and values are permuted once for all heads that share both them
/// and the order. Returns the source's index.
Index order_tokens(Plan& plan, const KeyValues& kv, const ParoOptions& options, const std::int32_t* order) {
  const Problem& p = plan.problem;
  const std::vector<std::int32_t> as_is = paro_tokens(options, 0);
  Source source{.layout = kv.layout(), .per_query_head = true, .views = {}};
  source.views.resize(static_cast<size_t>(p.B * p.Hq));
  plan.row_tokens.assign(source.views.size(), as_is);
  bool permuted = false;
  for (Index o = 0; o < static_cast<Index>(axis_orders.size()); ++o) {
    const std::vector<std::int32_t> tokens = paro_tokens(options, o);
    std::vector<std::int32_t> heads;      // packed ones, each once
    for (Index lane = 0; lane < p.B * p.Hq; ++lane) {
      const auto head = static_cast<std::int32_t>(lane / p.group());  // b·Hk + kv head
      if (order[lane % p.Hq] == o && (heads.empty() || heads.back() != head)) heads.push_back(head);
    }
    if (heads.empty()) continue;
    const bool same = tokens == as_is;
    const auto copy = same ? nullptr : permute(kv, tokens, heads);
    permuted = permuted || !same;
    const auto members = std::make_shared<const Members>(Members{tokens, {}});
    plan.keep.push_back(members);
    if (!same) plan.keep.push_back(copy);
    for (Index lane = 0; lane < p.B * p.Hq; ++lane) {
      if (order[lane % p.Hq] != o) continue;
      const auto head = lane / p.group();
      const auto view = std::lower_bound(heads.begin(), heads.end(), head) - heads.begin();
      const size_t at = static_cast<size_t>(lane);
      source.views[at] =
          same ? plan.sources[0].views[static_cast<size_t>(head)] : copy->source.views[static_cast<size_t>(view)];
      source.views[at].members = members.get();
      plan.row_tokens[at] = tokens;
    }
  }
  if (!permuted) {
    plan.row_tokens.clear();
    return 0;
  }
  plan.sources.push_back(std::move(source));
  return 1;
}

Plan plan_paro(const Params& p, const Inputs& in) {
  const ParoOptions options = read_options(p, in.problem);
  const auto calibration = std::make_shared<const ParoCalibration>(read_or_calibrate(in, options));

  // Step 1.
  Plan plan = make_plan(in.problem, in.q, *in.kv, in.rule, Lanes::per_query_head);
  const Index source = order_tokens(plan, *in.kv, options, calibration->order.as<std::int32_t>());
  const Index block = options.block, tokens = in.problem.N, count = options.blocks(tokens);
  plan.cut_rows_every(block);
  plan.keep.push_back(calibration);

  // Step 4. Kept blocks side by side are one tile. The softmax is over what is kept; a row of blocks that keeps nothing
  // gives zeros.
  plan.emit = [=, mask = calibration->mask.as<std::uint8_t>()](const RowBlock& rows, Tiles& tiles) {
    const std::uint8_t* const kept = mask + (rows.head * count + rows.first / block) * count;
    for (Index j = 0, end; j < count; j = end) {
      for (end = j + 1; end < count && kept[end] == kept[j];) ++end;
      if (kept[j] != 0)
        tiles.add(Set::range(0, rows.rows), Set::range(j * block, std::min(end * block, tokens)), Mask::full(), source);
    }
  };
  return plan;
}

ParamSpec above_zero(ParamSpec spec) {
  spec.above_least = true;
  return spec;
}

}  // namespace

const Mechanism& paro() {
  static const Mechanism m{
      .name = "paro",
      .title = "PAROAttention: reordered block-sparse attention for images and video",
      .paper = "arXiv:2506.16054",
      .year = 2025,
      .stage = "layout, select (calibrated), attend",
      .training = Training::none,
      .idea =
          "For diffusion transformers. A head that looks along one axis of a video spreads its attention thinly over "
          "all\n"
          "blocks of the map, unless that axis runs fastest in the token order. So every head gets the best of the "
          "six\n"
          "orders of the axes, and a fixed mask of the blocks that hold the most weight. Both are found on samples\n"
          "beforehand and given as tensors; without them they are found on the input itself, which takes several "
          "times\n"
          "as long as dense attention. The paper's INT8 and INT4 products are left out: values keep their precision.",
      .equations =
          "orders of (F, H, W), slowest first: 0 FHW, 1 FWH, 2 HWF, 3 HFW, 4 WHF, 5 WFH;  P = softmax(scale·Q K^T)\n"
          "Ms = share of blocks with >= sigma of their entries < eps;  Mq = mean over blocks of max / mean entry\n"
          "order = argmax alpha·Ms/ΣMs - (1 - alpha)·Mq/ΣMq, Σ over the orders\n"
          "mask = the ceil(density·nb²) blocks of the largest ΣP, among them all that hold text, and the last ones if "
          "short\n"
          "o_i = softmax over j in kept blocks of scale·<q_i, k_j>, times v_j",
      .cost = "density·N·N·(D + Dv) multiply-adds; calibrating takes up to 8·N·N·D",
      .causality = Causality::refused,
      .square = true,
      .params = {required_grid_spec("13x30x45"),
                 integer("text_len", 0, 0, "tokens before the grid, which stay in place"),
                 integer("block", 64, 1, "tokens per block"),
                 above_zero(number("density", 0.5, 0, 1, "share of the blocks that are computed")),
                 number("alpha", 0.5, 0, 1, "weight of sparsity against evenness in the choice of the order"),
                 above_zero(number("eps", 1e-3, 0, 1, "weights below count as nothing; about 0.1/N for few tokens")),
                 number("sigma", 0.9, 0, 1, "share of such weights that makes a block sparse")},
      .extras = {{"order", {DType::i32}, {"Hq"}, false, "order of the axes of each head, 0 … 5"},
                 {"mask",
                  {DType::u8},
                  {"Hq", "*", "*"},
                  false,
                  "[Hq, nb, nb], blocks to compute, in the head's order; without `order`, in that of the tokens"}},
      .not_on_models = "it is not causal, and its tokens lie on grids of images or video",
      .plan = plan_paro,
      .calibrate = calibrate,
  };
  return m;
}

}  // namespace heed::mechanism
