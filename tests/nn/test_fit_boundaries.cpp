// dhsa's boundary predictor fitted to attention: the function that is trained is the one that runs, its gradient is
// that of the equations, it finds the ends of segments, and what it learned is read again.
#include "support/doctest_with_torch.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>
#include <c10/core/GradMode.h>

#include <cmath>

#include "heed/mechanism/boundary_predictor.h"
#include "heed/nn/fit_boundaries.h"
#include "heed/nn/tensors.h"
#include "support/boundary_predictor.h"
#include "support/folder.h"
#include "support/segments.h"
#include "support/tiny_session.h"

using namespace heed;
using namespace heed::test;

namespace {

at::Tensor tensor_of(const std::vector<float>& x, at::IntArrayRef shape) {
  return at::tensor(x, at::kFloat).reshape(shape);
}

nn::BoundaryWeights on_torch(const PredictorWeights& w) {
  return {tensor_of(w.qkv, {3, w.c, w.c}), tensor_of(w.out, {w.c, w.c}), tensor_of(w.norm, {2, w.c}),
          tensor_of(w.hidden, {4 * w.c + 2, w.h}), tensor_of(w.score, {w.h + 1})};
}

nn::BoundaryWeights wide(const nn::BoundaryWeights& w) {
  const auto f64 = [](const at::Tensor& x) { return x.to(at::kDouble); };
  return {f64(w.qkv), f64(w.out), f64(w.norm), f64(w.hidden), f64(w.score)};
}

// A call of dhsa with this predictor; `w` must live as long.
AttendInput with(const Case& c, const nn::BoundaryWeights& w) {
  AttendInput in = c.input();
  in.extra = {{"predictor_qkv", nn::view_of(w.qkv)},
              {"predictor_out", nn::view_of(w.out)},
              {"predictor_norm", nn::view_of(w.norm)},
              {"predictor_hidden", nn::view_of(w.hidden)},
              {"predictor_score", nn::view_of(w.score)}};
  return in;
}

// The keys of batch 0 as a lesson has them.
at::Tensor keys_of(const Case& c) {
  std::vector<float> keys;
  for (Index t = 0; t < c.size.N; ++t)
    for (Index h = 0; h < c.size.Hk; ++h)
      for (Index f = 0; f < c.size.D; ++f) keys.push_back(static_cast<float>(c.k_at(0, h, t, f)));
  return tensor_of(keys, {c.size.N, c.size.Hk * c.size.D});
}

nn::BoundaryLesson lesson_of(const Segments& s, Index half) {
  const Index n = s.c.size.N;
  std::vector<float> labels;
  for (Index i = 0; i < n; ++i) labels.push_back(i < 2 * half - 1 || i >= n - 2 * half ? -1 : s.ends_after(i) ? 1 : 0);
  return {keys_of(s.c), tensor_of(labels, {n})};
}

model::MechanismUse use_of(const std::string& call) {
  model::MechanismUse use;
  use.call = MechanismCall::parse(call);
  return use;
}

}  // namespace

TEST_CASE("the predictor that is trained is the function that inference computes") {
  for (const auto& [half, heads] : {std::pair<Index, Index>{4, 4}, {1, 1}, {7, 12}}) {
    const Case c({1, 3, 3, 90, 90, 24, 16});
    const nn::BoundaryWeights w = on_torch(PredictorWeights(72, 40, 3));
    const CheckedCall call = check(MechanismCall::parse("dhsa"), with(c, w));
    const std::vector<float> want = mechanism::BoundaryPredictor::of(call.inputs, half, heads)->logits(0);
    const at::Tensor got = nn::boundary_logits(keys_of(c).unsqueeze(0), w, half, heads);
    REQUIRE(got.sizes() == at::IntArrayRef({1, 90 - 2 * half + 1}));
    for (Index i = 0; i < got.size(1); ++i)
      CHECK(std::abs(got[0][i].item<float>() - want[static_cast<size_t>(i + half - 1)]) < 1e-5f);
    const at::Tensor some = nn::boundary_logits(keys_of(c).unsqueeze(0), w, half, heads, 4);
    REQUIRE(some.size(1) == (got.size(1) + 3) / 4);
    for (Index i = 0; i < some.size(1); ++i)
      CHECK(std::abs(some[0][i].item<float>() - got[0][4 * i].item<float>()) < 1e-5f);
  }
}

TEST_CASE("the predictor's loss and gradient are those of the equations") {
  const Index half = 2, heads = 2, c = 6, n = 14, gaps = n - 2 * half + 1;
  const PredictorWeights own(c, 5, 4);
  at::manual_seed(2);
  const at::Tensor keys = at::randn({2, n, c}, at::kDouble);
  const at::Tensor labels = at::randn({2, gaps}).gt(0.3).to(at::kDouble);
  labels[0][1] = -1, labels[1][gaps - 1] = -1;
  double want = 0;
  for (Index p = 0; p < 2; ++p) {
    std::vector<std::vector<double>> rows(static_cast<size_t>(n));
    for (Index t = 0; t < n; ++t)
      for (Index f = 0; f < c; ++f) rows[static_cast<size_t>(t)].push_back(keys[p][t][f].item<double>());
    for (Index i = 0; i < gaps; ++i) {
      const double y = labels[p][i].item<double>();
      if (y < 0) continue;
      const double probability = 1 / (1 + std::exp(-naive_boundary_logit(rows, i + half - 1, half, heads, own)));
      const double right = y > 0 ? probability : 1 - probability;
      want -= (y > 0 ? 1.3 : 1.0) * (1 - right) * (1 - right) * std::log(right);
    }
  }
  want /= static_cast<double>(2 * gaps - 2);
  nn::BoundaryWeights w = wide(on_torch(own));
  at::Tensor* const tensors[] = {&w.qkv, &w.out, &w.norm, &w.hidden, &w.score};
  for (at::Tensor* x : tensors) x->requires_grad_();
  const auto loss = [&] { return nn::boundary_loss(nn::boundary_logits(keys, w, half, heads), labels); };
  const at::Tensor first = loss();
  CHECK(first.item<double>() == doctest::Approx(want).epsilon(1e-9));
  first.backward();
  for (const at::Tensor* x : tensors) {
    const at::Tensor gradient = x->grad().flatten();
    const double most = gradient.abs().max().item<double>();
    CHECK(most > 1e-6);
    const c10::NoGradGuard frozen;
    at::Tensor flat = x->detach().view({-1});
    for (Index i = 0; i < flat.numel(); i += flat.numel() > 20 ? 7 : 1) {
      const double kept = flat[i].item<double>(), step = 1e-5;
      flat[i] = kept + step;
      const double up = loss().item<double>();
      flat[i] = kept - step;
      const double down = loss().item<double>();
      flat[i] = kept;
      CHECK(std::abs(gradient[i].item<double>() - (up - down) / (2 * step)) < 1e-6 * most + 1e-9);
    }
  }
  // No label: nothing to learn.
  CHECK(nn::boundary_loss(at::zeros({1, 3}), at::zeros({1, 3}) - 1).item<double>() == 0);
}

TEST_CASE("a fitted predictor finds the ends of segments, and its chunks recall more than even ones") {
  constexpr Index n = 2048, block = 32, half = 4, heads = 4, trials = 3;
  std::mt19937_64 random(23);
  std::vector<nn::BoundaryLesson> lessons;
  for (int i = 0; i < 40; ++i) lessons.push_back(lesson_of(Segments(n, 16, block, random), half));
  nn::FitOptions options = nn::boundary_fit_options();
  options.steps = 500, options.lr = 3e-3;
  const nn::BoundaryFit fit = nn::fit_boundary_predictor(lessons, half, heads, options);
  REQUIRE(fit.losses.size() == 500);
  const double threshold = nn::best_boundary_threshold(lessons, fit.weights, half, heads);
  MESSAGE("loss " << fit.losses.front() << ", then " << fit.losses.back() << "; threshold " << threshold);
  CHECK(fit.losses.back() < 0.5 * fit.losses.front());
  double even = 0, dynamic = 0, f1 = 0;
  for (Index trial = 0; trial < trials; ++trial) {
    const Segments s(n, 16, block, random);
    f1 += nn::count_boundaries({lesson_of(s, half)}, fit.weights, half, heads, threshold).f1() / trials;
    // The budget decides: at most as many chunks as even ones of 32 tokens.
    const MechanismCall call = MechanismCall::parse(
        "dhsa:budget=96,query_block=32,chunks_per_block=1,nms_radius=4,threshold=-50,global=0,local=32,dense_tail=0");
    even += s.recall(plan_of(call, s.c.input()), 1024) / trials;
    dynamic += s.recall(plan_of(call, with(s.c, fit.weights)), 1024) / trials;
  }
  MESSAGE("F1 of boundaries " << f1 << "; recall of even chunks " << even << ", of dynamic ones " << dynamic);
  CHECK(f1 > 0.4);  // the very gap
  CHECK(dynamic >= even + 0.1);
  // The same seed, the same bits.
  options.steps = 5;
  const nn::BoundaryFit one = nn::fit_boundary_predictor(lessons, half, heads, options),
                        two = nn::fit_boundary_predictor(lessons, half, heads, options);
  CHECK(at::equal(one.weights.qkv, two.weights.qkv));
  CHECK(at::equal(one.weights.score, two.weights.score));
}

TEST_CASE("a fitted predictor comes back from its file and cuts a prompt") {
  TinyModel tiny(TinySizes{});
  for (auto& [name, x] : tiny.tensors)  // attention that is far from even
    if (name.ends_with("attn_q.weight"))
      for (double& v : x.written) v *= 12;
  const auto model = load(tiny.file());
  nn::Pieces pieces;
  for (std::uint64_t seed = 0; seed < 3; ++seed) pieces.push_back(random_tokens(160, seed));
  pieces.push_back(pieces.front());  // random text teaches little about other random text
  nn::FitOptions options = nn::boundary_fit_options();
  options.steps = 150, options.lr = 3e-3;
  const std::string call = "dhsa:budget=48,query_block=16,global=8,local=8,dense_tail=8,nms_radius=2";
  std::vector<std::string> steps;
  const nn::Fitted fitted = nn::fit_boundaries(*model, use_of(call), pieces, 32, DType::f32, options,
                                               [&](const std::string& step, Index, Index) {
                                                 if (steps.empty() || steps.back() != step) steps.push_back(step);
                                                 return true;
                                               });
  CHECK(steps == std::vector<std::string>{"reading", "predictor", "threshold"});
  REQUIRE(fitted.layers.size() == 2);
  for (const nn::Fitted::Layer& l : fitted.layers) {
    CHECK(l.before > 0);
    CHECK(l.after > l.before);
    CHECK(l.after <= 1);
  }
  const Folder folder;
  model::write_calibration(folder / "ends", fitted.calibration);
  const auto read = std::make_shared<model::Calibration>(model::read_calibration(folder / "ends"));
  CHECK(read->layers.empty());
  CHECK(read->all.size() == 5);
  REQUIRE(read->params.size() == 9);
  CHECK(read->params[6].first == "threshold");
  CHECK(read->params[7] == std::pair<std::string, std::string>{"half_window", "4"});
  CHECK(read->params[8] == std::pair<std::string, std::string>{"predictor_heads", "4"});

  // The chunks are those of the predictor: other lists than even chunks give.
  const auto hidden = [&](bool learned) {
    model::SessionOptions o = test::options(160, 32, call);
    if (learned) o.use.calibration = read;
    model::Session session(*model, o);
    std::vector<float> logits = session.prefill(pieces.front());
    CHECK(session.stats().attend.pairs < session.stats().dense_pairs);
    return logits;
  };
  CHECK(hidden(true) != hidden(false));
  // What the user says of the threshold is kept, and used.
  const nn::Fitted told = nn::fit_boundaries(*model, use_of(call + ",threshold=99"), pieces, 32, DType::f32, options);
  CHECK(told.calibration.params[6] == std::pair<std::string, std::string>{"threshold", "99"});
  CHECK(told.layers[0].after == 0);
}

TEST_CASE("a predictor that cannot be fitted is refused") {
  const auto model = load(TinyModel(TinySizes{}).file());
  const auto fit = [&](const char* call, Index tokens) {
    nn::fit_boundaries(*model, use_of(call), {random_tokens(tokens)}, 32, DType::f32, {});
  };
  CHECK_FAILS(fit("dhsa", 15), Error, "pieces of 15 tokens, expected at least 16: four times half_window = 4");
  CHECK_FAILS(fit("dhsa:half_window=9", 35), Error,
              "pieces of 35 tokens, expected at least 36: four times half_window = 9");
  CHECK_FAILS(fit("dhsa:predictor_heads=5", 80), UsageError,
              "dhsa: predictor_heads = 5, expected a divisor of the 24 features of a token's keys");
}
