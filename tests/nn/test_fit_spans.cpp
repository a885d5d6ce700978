// MoA's rules from a model: influence maps against hiding keys in the equations' own model, and rules that keep to
// their budget.
#include "support/doctest_with_torch.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/roll.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros_like.h>
#include <c10/core/GradMode.h>

#include <cmath>
#include <set>

#include "heed/nn/fit_spans.h"
#include "heed/nn/gguf.h"
#include "heed/plan/span_rules.h"
#include "support/folder.h"
#include "support/naive.h"
#include "support/tiny_session.h"
#include "support/torch_models.h"

using namespace heed;
using namespace heed::test;

namespace {

// What attention of one layer gave, so that a loss can be computed for other outputs of it.
struct Probe {
  std::shared_ptr<nn::LanguageModel> model;
  at::Tensor tokens;
  // The loss with `change` [1, Hq, N, D] added to the output of `layer`'s attention.
  double loss(Index layer, const at::Tensor& change) const {
    model->layer(layer).attention().observe([&](const nn::AttentionPass& pass) {
      if (change.defined()) at::Tensor(pass.o).add_(change);
    });
    const c10::NoGradGuard frozen;
    const Index n = tokens.size(1) - 1;
    const double loss =
        model->losses(tokens, at::roll(tokens, -1, 1)).narrow(1, 0, n).to(at::kDouble).mean().item<double>();
    model->layer(layer).attention().observe({});
    return loss;
  }
};

model::MechanismUse use_of(const std::string& call) {
  model::MechanismUse use;
  use.call = MechanismCall::parse(call);
  return use;
}

}  // namespace

TEST_CASE("influence of a model is what the loss suffers, to first order, where a key is hidden") {
  const Index n = 24;
  const std::string file = TinyModel(TinySizes{}).file();
  const Probe probe{nn::read_model(parsed(file), {}), tensor_of(random_tokens(n))};
  for (const auto& [name, parameter] : nn::parameters_of(*probe.model)) parameter.requires_grad_(false);
  const auto maps = nn::influence_of(*probe.model, probe.tokens, {0, 1}, 1);  // every pair alone
  REQUIRE(maps.size() == 2);
  for (const auto& [layer, map] : maps) {
    REQUIRE(map.sizes() == at::IntArrayRef({4, n, n}));
    nn::AttentionPass pass;
    probe.model->layer(layer).attention().observe([&](const nn::AttentionPass& p) { pass = p; });
    probe.model->hidden(probe.tokens);
    const double largest = map.max().item<double>();
    Random random(static_cast<std::uint64_t>(layer));
    for (int trial = 0; trial < 60; ++trial) {
      const Index h = random.below(4), i = 1 + random.below(n - 1), j = random.below(i + 1);
      // The row's weights without key j, grown to one again, in f64.
      const at::Tensor q = pass.q[0][h][i].detach().to(at::kDouble), k = pass.k[0][h / 2].detach().to(at::kDouble),
                       v = pass.v[0][h / 2].detach().to(at::kDouble);
      at::Tensor w = at::matmul(k.narrow(0, 0, i + 1), q).div(std::sqrt(12.0)).exp();
      const at::Tensor all = at::matmul(w / w.sum(), v.narrow(0, 0, i + 1));
      w[j] = 0;
      const at::Tensor less = at::matmul(w / w.sum(), v.narrow(0, 0, i + 1));
      // A small step that way: its slope is the first order.
      const double step = 0.02;
      at::Tensor change = at::zeros_like(pass.o.detach());
      change[0][h][i] = (step * (less - all)).to(at::kFloat);
      const double slope = (probe.loss(layer, change) - probe.loss(layer, -change)) / (2 * step);
      CHECK(std::abs(std::abs(slope) - map[h][i][j].item<double>()) < 2e-3 * largest);
    }
  }
}

TEST_CASE("rules keep to the budget, and hide less of influence than one rule for all") {
  TinySizes sizes;
  sizes.heads = 4, sizes.kv_heads = 4, sizes.layers = 3;
  const std::string file = TinyModel(sizes).file();
  const model::Gguf gguf = parsed(file);
  const Index length = 256, block = 8;
  const nn::Pieces pieces{random_tokens(length, 1), random_tokens(length, 2)};
  const auto use = use_of("moa:block=8,sink=8,min_span=16");
  const nn::Fitted fitted = nn::fit_spans(gguf, use, pieces, 0.5);
  REQUIRE(fitted.layers.size() == 3);
  double before = 0, after = 0;
  for (const auto& l : fitted.layers) before += l.before, after += l.after;
  CHECK(after > 0);
  CHECK(after < before);
  for (const Index tokens : {length / 2, length, 2 * length}) {
    Index kept = 0;
    for (const auto& [layer, named] : fitted.calibration.layers) {
      std::set<std::pair<float, float>> different;
      REQUIRE(named.at("alpha").shape() == Shape{4});
      for (Index h = 0; h < 4; ++h) {
        const float alpha = named.at("alpha").as<float>()[h], beta = named.at("beta").as<float>()[h];
        CHECK(alpha >= 0);
        different.emplace(alpha, beta);
        kept += kept_blocks({alpha, beta}, tokens, block);
      }
      CHECK(different.size() <= 2);
    }
    const double share = static_cast<double>(kept) / static_cast<double>(3 * 4 * tokens / block);
    CHECK(share <= 0.5);
    CHECK(share >= 0.3);
  }

  const Folder folder;
  model::write_calibration(folder / "spans", fitted.calibration);
  model::SessionOptions o = test::options(256, 64, "moa");
  o.use.calibration = std::make_shared<model::Calibration>(model::read_calibration(folder / "spans"));
  const auto loaded = load(file);
  model::Session session(*loaded, o);
  session.prefill(pieces[0]);
  CHECK(session.stats().attend.pairs < session.stats().dense_pairs);
  sizes.kv_heads = 2;
  CHECK_THROWS_AS(model::Session(*load(TinyModel(sizes).file()), o), Error);

  CHECK_FAILS(nn::fit_spans(gguf, use_of("moa:beta=0.5,block=8"), pieces, 0.5), UsageError,
              "moa: beta = 0.5, expected none where rules are fitted");
  CHECK_FAILS(nn::fit_spans(gguf, use, {random_tokens(255)}, 0.5), Error,
              "pieces of 255 tokens, expected at least 32 blocks of 8");
  CHECK_THROWS_AS(nn::fit_spans(gguf, use, pieces, 1e-4), Error);
  CHECK_THROWS_AS(nn::fit_spans(gguf, use, pieces, 0.5, [](const std::string&, Index, Index) { return false; }),
                  model::Interrupted);
}
