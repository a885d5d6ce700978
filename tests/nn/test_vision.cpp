// A vision transformer learns with mechanisms that see both ways; sparsifiner's predictor first learns to guess.
#include "support/doctest_with_torch.h"

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>

#include <cmath>

#include "heed/nn/optimizer.h"
#include "heed/nn/predictor.h"
#include "heed/nn/vision.h"
#include "heed/torch/attend.h"
#include "support/refusal.h"

using namespace heed;
using namespace heed::test;

namespace {

using Calls = std::vector<std::string>;  // of the layers in turn

nn::VisionOptions options(const Calls& calls, Index lepe = 0) {
  nn::VisionOptions o;
  o.mechanisms.clear(), o.lepe = lepe;
  for (const std::string& call : calls) o.mechanisms.push_back(MechanismCall::parse(call));
  o.class_token = o.mechanisms[0].name == "sparsifiner";
  return o;
}
nn::VisionOptions options(const char* call, Index lepe = 0) { return options(Calls{call}, lepe); }

// Mean loss of pictures that no training saw.
double held_out(nn::VisionTransformer& model) {
  const c10::NoGradGuard frozen;
  const nn::Pictures p = nn::draw_pictures(1, 256, model.options().side);
  return at::cross_entropy_loss(model.forward(p.images), p.labels).item<double>();
}

void train(nn::VisionTransformer& model, int steps, std::uint64_t seed) {
  nn::Optimizer optimizer(nn::parameters_of(model), {.weight_decay = 0.01});
  for (int step = 0; step < steps; ++step) {
    const nn::Pictures p = nn::draw_pictures(seed + static_cast<std::uint64_t>(step), 32, model.options().side);
    at::cross_entropy_loss(model.forward(p.images), p.labels).backward();
    optimizer.clip(1);
    optimizer.step(1e-2 * nn::rate_share(step, steps, 5, 0.1));
  }
}

}  // namespace

TEST_CASE("pictures: four figures, the same for the same seed") {
  const nn::Pictures p = nn::draw_pictures(3, 400, 16), again = nn::draw_pictures(3, 400, 16);
  CHECK(p.images.equal(again.images));
  CHECK(p.labels.equal(again.labels));
  CHECK(!p.images.equal(nn::draw_pictures(4, 400, 16).images));
  const at::Tensor counts = at::bincount(p.labels, {}, 4);
  CHECK(counts.min().item<Index>() > 70);
  // Ink: 5, 5, 9 and 16 pixels.
  const at::Tensor ink = p.images.gt(0.5).to(at::kDouble).sum({1, 2, 3});
  const double want[] = {5, 5, 9, 16};
  for (Index kind = 0; kind < 4; ++kind)
    CHECK(std::abs(ink.masked_select(p.labels == kind).mean().item<double>() - want[kind]) < 2.5);
}

TEST_CASE("every mechanism that sees both ways learns to tell figures") {
  const std::vector<std::pair<Calls, Index>> all{
      {{"dense"}, 0},
      {{"biformer:grid=8x8,regions=4,top_k=4"}, 0},
      {{"biformer:grid=8x8,regions=4,top_k=4"}, 3},
      {{"llsa:block=4,top_k=4,levels=2"}, 0},
      {{"sparsifiner:keep=0.4"}, 0},
      {{"natten:grid=8x8,kernel_size=5x5"}, 0},
      {{"hilo:grid=8x8,alpha=0.5,window=2"}, 0},
      {{"davit:kind=window,grid=8x8,window=4", "davit"}, 0},
      {{"davit:kind=window,grid=8x8,window=4", "davit:scale_mode=tokens"}, 0}};
  for (const auto& [calls, lepe] : all) {
    CAPTURE(calls[0]);
    CAPTURE(calls.back());
    CAPTURE(lepe);
    nn::VisionTransformer model(options(calls, lepe));
    model.initialise(0);
    const double before = held_out(model);
    CHECK(before > 1.2);  // ln 4 = 1.39
    train(model, 120, 100);
    const double after = held_out(model);
    CAPTURE(after);
    CHECK(after < 0.7);
    for (const auto& [name, w] : nn::parameters_of(model)) CHECK(std::isfinite(w.abs().max().item<double>()));
  }
}

namespace {

// Along the gradient of each parameter.
void check_differences(const nn::VisionOptions& o) {
  nn::VisionTransformer model(o);
  model.initialise(2);
  const nn::Pictures p = nn::draw_pictures(9, 4, 16);
  const auto loss = [&] { return at::cross_entropy_loss(model.forward(p.images).to(at::kDouble), p.labels); };
  loss().backward();
  const c10::NoGradGuard frozen;
  for (const auto& [name, w] : nn::parameters_of(model)) {
    CAPTURE(name);
    REQUIRE(w.grad().defined());
    const double length = w.grad().norm().item<double>();
    const at::Tensor kept = w.clone(), way = w.grad() / length;
    const double step = 2e-3 * std::max(kept.norm().item<double>(), 0.5);
    w.copy_(kept + step * way);
    const double more = loss().item<double>();
    w.copy_(kept - step * way);
    const double less = loss().item<double>();
    w.copy_(kept);
    CHECK((more - less) / (2 * step) == doctest::Approx(length).epsilon(0.02));
  }
}

}  // namespace

TEST_CASE("gradients are central differences of the loss, for biformer's filter and between channels too") {
  check_differences(options("biformer:grid=8x8,regions=2,top_k=4", 3));  // all regions: nothing is selected
  check_differences(options(Calls{"davit:kind=window,grid=8x8,window=3", "davit"}));
}

TEST_CASE("the predictor's loss is its definition, with gradients for the predictor alone") {
  for (const auto& [heads, kv_heads] : std::vector<std::pair<Index, Index>>{{4, 2}, {1, 1}}) {
    const Index b = 2, n = 19, d = 6, c = 3, r = 4;
    at::manual_seed(5);
    const at::Tensor q = at::randn({b, heads, n, d}).requires_grad_(),
                     k = at::randn({b, kv_heads, n, d}).requires_grad_();
    nn::Predictor p{at::randn({c, d}),
                    at::randn({c}),
                    at::randn({c, d}),
                    at::randn({c}),
                    at::randn({n, r}),
                    at::randn({n, r}),
                    0.7};
    std::vector<at::Tensor> parts{p.p_q, p.p_q_b, p.p_k, p.p_k_b, p.w_dn, p.w_up}, wide;
    for (at::Tensor& x : parts) x.requires_grad_(), wide.push_back(x.detach().to(at::kDouble).requires_grad_());
    const at::Tensor got = nn::imitation_loss(q, k, p);
    got.backward();

    const at::Tensor qw = q.detach().to(at::kDouble),
                     kw = k.detach().to(at::kDouble).repeat_interleave(heads / kv_heads, 1);
    const at::Tensor attention = at::softmax(at::matmul(qw, kw.transpose(2, 3)) / std::sqrt(6.0), -1);
    const at::Tensor z = at::matmul(at::matmul(qw, wide[0].t()) + wide[1],
                                    at::matmul((at::matmul(kw, wide[2].t()) + wide[3]).transpose(2, 3), wide[4])) *
                         0.7;
    const at::Tensor guess = at::matmul(at::softmax(z, -1), wide[5].t());
    const at::Tensor want = 0.01 * (guess - attention).narrow(2, 1, n - 1).square().sum();
    want.backward();
    CHECK(got.item<double>() == doctest::Approx(want.item<double>()).epsilon(1e-4));
    for (size_t i = 0; i < parts.size(); ++i)
      CHECK((parts[i].grad().to(at::kDouble) - wide[i].grad()).abs().max().item<double>() <
            1e-4 * wide[i].grad().abs().max().item<double>() + 1e-6);
    CHECK(!q.grad().defined());
    CHECK(!k.grad().defined());
  }
}

TEST_CASE("a trained predictor finds where dense attention looks, better than a guess and than the nearest tokens") {
  // Tokens attend to those of their own kind, which stand anywhere.
  const Index n = 66, d = 16, heads = 2, r = 11;
  const at::Tensor kinds = at::arange(n).mul(29).remainder(n).remainder(4);
  const auto tokens = [&] {
    at::Tensor x = at::randn({4, heads, n, d}) * 0.3;
    for (Index t = 0; t < n; ++t) x.select(2, t).select(2, kinds[t].item<Index>()).add_(4);
    return x;
  };
  at::manual_seed(7);
  nn::Predictor p{at::randn({8, d}) / 4, at::zeros({8}),           at::randn({8, d}) / 4, at::zeros({8}),
                  at::randn({n, r}) / 8, at::randn({n, r}) * 0.02, 1 / std::sqrt(8.0)};
  const std::vector<std::pair<std::string, at::Tensor>> parts{{"p_q", p.p_q},     {"p_q_b", p.p_q_b}, {"p_k", p.p_k},
                                                              {"p_k_b", p.p_k_b}, {"w_dn", p.w_dn},   {"w_up", p.w_up}};
  // The share of dense attention that a mask leaves: both lse are over the same scores.
  const at::Tensor q = tokens(), k = tokens(), v = tokens();
  const at::Tensor all = aten::attend(q, k, v).lse;
  const auto recall = [&] {
    aten::AttendOptions how{.mechanism = "sparsifiner:keep=0.25,basis_threshold=0"};
    for (const auto& [name, x] : parts) how.extra[name] = x.detach();
    return (aten::attend(q, k, v, how).lse - all).narrow(2, 1, n - 1).exp().mean().item<double>();
  };
  const double guessed = recall(), nearest = (aten::attend(q, k, v, {.mechanism = "natten:kernel_size=17"}).lse - all)
                                                 .narrow(2, 1, n - 1)
                                                 .exp()
                                                 .mean()
                                                 .item<double>();
  CHECK(guessed < 0.5);
  for (const auto& [name, x] : parts) at::Tensor(x).requires_grad_();
  nn::Optimizer optimizer(parts, {.weight_decay = 0});
  double first = 0, last = 0;
  for (int step = 0; step < 300; ++step) {
    const at::Tensor loss = nn::imitation_loss(tokens(), tokens(), p);
    loss.backward();
    optimizer.step(1e-2);
    (step == 0 ? first : last) = loss.item<double>();
  }
  CHECK(last < 0.5 * first);
  CAPTURE(guessed);
  CAPTURE(nearest);
  CHECK(recall() > 0.8);
  CHECK(recall() > nearest + 0.3);
}

TEST_CASE("sparsifiner in two phases: the predictor imitates a dense model, then the model learns its pattern") {
  nn::VisionOptions dense_options = options("dense");
  dense_options.class_token = true;
  nn::VisionTransformer dense(dense_options), sparse(options("sparsifiner:keep=0.25"));
  dense.initialise(0), sparse.initialise(0);
  train(dense, 120, 100);
  {
    const c10::NoGradGuard frozen;
    const auto from = dense.named_parameters();
    for (const auto& [name, w] : nn::parameters_of(sparse))
      if (from.contains(name)) at::Tensor(w).copy_(from[name]);
  }

  // Phase 1: only the predictor learns, attention is dense.
  sparse.imitate(true);
  CHECK(std::abs(held_out(sparse) - held_out(dense)) < 1e-5);
  nn::NamedParameters predictor;
  for (const auto& [name, w] : nn::parameters_of(sparse))
    if (!dense.named_parameters().contains(name)) predictor.emplace_back(name, w);
  CHECK(predictor.size() == 12);
  nn::Optimizer optimizer(predictor, {.weight_decay = 0});
  double first = 0, last = 0;
  for (int step = 0; step < 200; ++step) {
    sparse.forward(nn::draw_pictures(1000 + static_cast<std::uint64_t>(step), 16, 16).images);
    const at::Tensor loss = sparse.auxiliary();
    loss.backward();
    optimizer.step(5e-3);
    (step == 0 ? first : last) = loss.item<double>();
  }
  CHECK(last < 0.7 * first);  // this model's attention has more than the predictor's rank of 10
  sparse.imitate(false);

  // Phase 2: the predictor is a constant.
  std::vector<at::Tensor> before;
  for (const auto& [name, w] : predictor) before.push_back(w.detach().clone());
  train(sparse, 60, 500);
  for (size_t i = 0; i < predictor.size(); ++i) CHECK(predictor[i].second.equal(before[i]));
  CHECK(held_out(sparse) < 0.5);
  CHECK(!sparse.auxiliary().defined());
}

TEST_CASE("what does not fit is refused in one line") {
  CHECK(refusal([] { nn::VisionTransformer m(options("landmark")); }) ==
        "mechanism = landmark: it is causal, expected one whose tokens see each other both ways");
  nn::VisionOptions o = options("sparsifiner");
  o.class_token = false;
  CHECK(refusal([&] { nn::VisionTransformer m(o); }) ==
        "sparsifiner: class_token = false, expected true: its first row is the class token's");
  o = options("dense"), o.patch = 3;
  CHECK(refusal([&] { nn::VisionTransformer m(o); }) == "vision: patch = 3, expected a divisor of side = 16");
  nn::VisionTransformer model(options("dense"));
  model.initialise(0);
  CHECK(refusal([&] { model.forward(at::zeros({2, 1, 16, 15})); }) ==
        "images: shape = [2, 1, 16, 15], expected [2, 1, 16, 16]");
}
