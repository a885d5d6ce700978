// Query and gate rows that a checkpoint keeps in one matrix, against the layouts' definitions in f64.
#include "support/doctest_with_torch.h"

#include <ATen/ops/randn.h>
#include <ATen/ops/zeros.h>
#include <c10/core/GradMode.h>

#include <cmath>

#include "heed/nn/attention.h"
#include "heed/nn/gate_layout.h"
#include "support/refusal.h"

using namespace heed;
using namespace heed::test;

namespace {

constexpr Index width = 20, d = 6, tokens = 11;

// Where a layout keeps feature i of head h: of the query, and of its gate, `each` rows a head.
struct Rows {
  Index q, gate;
};
Rows rows_of(nn::GateLayout layout, Index heads, Index kv_heads, Index each, Index h, Index i) {
  const Index gate = each == 1 ? 0 : i;
  if (layout == nn::GateLayout::per_head) {
    const Index start = h * (d + each);
    return {start + i, start + d + gate};
  }
  const Index group = heads / kv_heads, start = h / group * group * (d + each), inside = h % group;
  return {start + inside * d + i, start + group * d + inside * each + gate};
}

using Matrix = at::TensorAccessor<float, 2>;
double dot(const Matrix& w, Index row, const Matrix& x, Index t) {
  double sum = 0;
  for (Index c = 0; c < x.size(1); ++c) sum += static_cast<double>(w[row][c]) * static_cast<double>(x[t][c]);
  return sum;
}

// y [tokens, width] of causal attention whose output is gated, from x [tokens, width] and the joined matrix.
std::vector<double> naive(const at::Tensor& x_in, const at::Tensor& joined_in, const at::Tensor& k_in,
                          const at::Tensor& v_in, const at::Tensor& output_in, nn::GateLayout layout, Index heads,
                          Index kv_heads) {
  const Matrix x = x_in.accessor<float, 2>(), joined = joined_in.accessor<float, 2>(), k = k_in.accessor<float, 2>(),
               v = v_in.accessor<float, 2>(), output = output_in.accessor<float, 2>();
  const Index each = joined.size(0) / heads - d;
  std::vector<double> y(static_cast<size_t>(tokens * width));
  for (Index t = 0; t < tokens; ++t)
    for (Index h = 0; h < heads; ++h) {
      const Index g = h / (heads / kv_heads);
      std::vector<double> weight;
      double sum = 0;
      for (Index j = 0; j <= t; ++j) {
        double score = 0;
        for (Index i = 0; i < d; ++i)
          score += dot(joined, rows_of(layout, heads, kv_heads, each, h, i).q, x, t) * dot(k, g * d + i, x, j);
        sum += weight.emplace_back(std::exp(score / std::sqrt(static_cast<double>(d))));
      }
      for (Index i = 0; i < d; ++i) {
        double o = 0;
        for (Index j = 0; j <= t; ++j) o += weight[static_cast<size_t>(j)] / sum * dot(v, g * d + i, x, j);
        o /= 1 + std::exp(-dot(joined, rows_of(layout, heads, kv_heads, each, h, i).gate, x, t));
        for (Index c = 0; c < width; ++c)
          y[static_cast<size_t>(t * width + c)] += o * static_cast<double>(output[c][h * d + i]);
      }
    }
  return y;
}

double worst(const at::Tensor& got, const std::vector<double>& want) {
  const at::Tensor flat = got.contiguous();
  double error = 0, largest = 0;
  for (size_t i = 0; i < want.size(); ++i) {
    largest = std::max(largest, std::fabs(want[i]));
    error = std::max(error, std::fabs(static_cast<double>(flat.data_ptr<float>()[i]) - want[i]));
  }
  return error / largest;
}

}  // namespace

TEST_CASE("three layouts of a gated projection load to one function, which is its definition") {
  const c10::NoGradGuard frozen;
  at::manual_seed(3);
  for (const auto& [heads, kv_heads] : std::vector<std::pair<Index, Index>>{{4, 2}, {4, 1}, {3, 3}, {1, 1}})
    for (const bool headwise : {false, true}) {
      CAPTURE(heads);
      CAPTURE(kv_heads);
      CAPTURE(headwise);
      const nn::AttentionOptions options{.width = width,
                                         .heads = heads,
                                         .kv_heads = kv_heads,
                                         .head_size = d,
                                         .mechanism = MechanismCall::parse("gated-attention"),
                                         .rope_base = 0,
                                         .headwise_gate = headwise};
      nn::Attention module(options);
      const auto parameters = module.named_parameters();
      for (const auto& item : parameters) item.value().copy_(at::randn(item.value().sizes()) / std::sqrt(20.0));
      const at::Tensor q = parameters["q"].clone(), gate = parameters["gate"].clone();  // separate
      const at::Tensor x = at::randn({1, tokens, width}), separate = module.forward(x);
      const Index each = headwise ? 1 : d;
      for (const nn::GateLayout layout : {nn::GateLayout::per_head, nn::GateLayout::kv_grouped}) {
        const at::Tensor joined = at::zeros({heads * (d + each), width});
        for (Index h = 0; h < heads; ++h)
          for (Index i = 0; i < d; ++i) {
            const Rows at = rows_of(layout, heads, kv_heads, each, h, i);
            joined[at.q].copy_(q[h * d + i]);
            joined[at.gate].copy_(gate[headwise ? h : h * d + i]);
          }
        const nn::GatedProjection loaded = nn::split_gated(joined, layout, heads, kv_heads, d);
        CHECK(loaded.q.equal(q));
        CHECK(loaded.gate.equal(gate));
        parameters["q"].copy_(loaded.q), parameters["gate"].copy_(loaded.gate);
        CHECK(module.forward(x).equal(separate));
        const auto by_definition = [&](nn::GateLayout as) {
          return naive(x[0], joined, parameters["k"], parameters["v"], parameters["output"], as, heads, kv_heads);
        };
        CHECK(worst(separate[0], by_definition(layout)) < 1e-5);
        // Read as the other layout it is another function, unless every head has keys of its own.
        const nn::GateLayout other =
            layout == nn::GateLayout::per_head ? nn::GateLayout::kv_grouped : nn::GateLayout::per_head;
        if (heads == kv_heads) CHECK(worst(separate[0], by_definition(other)) < 1e-5);
        else CHECK(worst(separate[0], by_definition(other)) > 1e-2);
      }
    }
}

TEST_CASE("a gate reads its own token alone") {
  const c10::NoGradGuard frozen;
  at::manual_seed(4);
  // A gate that is shut for tokens whose first feature is large, whatever stands before them.
  nn::Attention module({.width = width,
                        .heads = 2,
                        .kv_heads = 1,
                        .head_size = d,
                        .mechanism = MechanismCall::parse("gated-attention")});
  for (const auto& item : module.named_parameters()) item.value().copy_(at::randn(item.value().sizes()) * 0.2);
  const at::Tensor gate = module.named_parameters()["gate"];
  gate.zero_(), gate.select(1, 0).fill_(-100);
  at::Tensor x = at::randn({1, tokens, width});
  x.select(2, 0).fill_(0);
  x[0][7][0] = 5;
  at::Tensor o;
  module.observe([&](const nn::AttentionPass& pass) { o = pass.o.clone(); });
  module.forward(x);
  const at::Tensor before = o;
  x.narrow(1, 0, 7).copy_(at::randn({1, 7, width}));
  x.narrow(1, 0, 7).select(2, 0).fill_(0);
  module.forward(x);
  CHECK(before.select(2, 7).abs().max().item<double>() < 1e-6);  // still shut
  CHECK(o.select(2, 7).abs().max().item<double>() < 1e-6);
  CHECK((o.select(2, 8) - before.select(2, 8)).abs().max().item<double>() > 1e-3);  // outputs see other tokens
}

TEST_CASE("matrices that hold no such rows are refused in one line") {
  const auto refused = [](at::IntArrayRef shape, Index heads, Index kv_heads) {
    return refusal([&] { nn::split_gated(at::zeros(shape), nn::GateLayout::per_head, heads, kv_heads, d); });
  };
  CHECK(refused({24, width}, 4, 2) ==
        "gate: shape = [24, 20], expected [48, width], or [28, width] with a gate for every head");
  CHECK(refused({49, width}, 4, 2) ==
        "gate: shape = [49, 20], expected [48, width], or [28, width] with a gate for every head");
  CHECK(refused({48}, 4, 2) == "gate: shape = [48], expected [48, width], or [28, width] with a gate for every head");
  CHECK(refused({48, width}, 4, 3) == "gate: kv_heads = 3, expected a divisor of heads = 4");
}
