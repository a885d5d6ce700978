#include "heed/nn/fit_boundaries.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/cosine_similarity.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/eye.h>
#include <ATen/ops/layer_norm.h>
#include <ATen/ops/log_sigmoid.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/softmax.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros.h>
#include <c10/core/GradMode.h>

#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "heed/base/random.h"
#include "heed/mechanism/attend.h"
#include "heed/mechanism/boundary_predictor.h"
#include "heed/nn/optimizer.h"
#include "heed/nn/tensors.h"

namespace heed::nn {
namespace {

constexpr Index stretch = 256;  // tokens: a step sees many layers and places
constexpr Index apart = 4;      // gaps: neighbours say nearly the same
constexpr Index usual_units = 256;
constexpr double positive_weight = 1.3;

at::Tensor normal(std::vector<Index> shape, double scale, Random& random) {
  const at::Tensor x = at::empty(shape, at::kFloat);
  float* values = x.mutable_data_ptr<float>();
  for (Index i = 0; i < x.numel(); ++i) values[i] = static_cast<float>(scale * random.normal());
  return x;
}

// Windows of 2ω tokens of x [P, N, heads·d], `stride` apart: [P, G, heads, 2ω, d], G = N - 2ω + 1 without a stride.
at::Tensor windows_of(const at::Tensor& x, Index half_window, Index heads, Index stride) {
  const at::Tensor w = x.unfold(1, 2 * half_window, stride);  // [P, G, C, 2ω]
  return w.reshape({w.size(0), w.size(1), heads, -1, 2 * half_window}).transpose(-1, -2);
}

// The labels of the gaps that have logits.
at::Tensor inner(const at::Tensor& labels, Index half_window, Index stride) {
  return labels.slice(-1, half_window - 1, labels.size(-1) - half_window, stride);
}

// A lesson's tokens [first, first + count).
BoundaryLesson part(const BoundaryLesson& lesson, Index first, Index count) {
  return {lesson.keys.narrow(0, first, count), lesson.labels.narrow(0, first, count)};
}

// One over the root mean square of each feature over all lessons: [C].
at::Tensor inverse_sizes(const std::vector<BoundaryLesson>& lessons) {
  at::Tensor sum = at::zeros({lessons.front().keys.size(1)}, at::kDouble);
  double tokens = 0;
  for (const BoundaryLesson& l : lessons) {
    sum = sum + l.keys.square().sum(0, false, at::kDouble);
    tokens += static_cast<double>(l.keys.size(0));
  }
  return (sum / tokens + 1e-12).rsqrt().to(at::kFloat);
}

}  // namespace

FitOptions boundary_fit_options() {
  FitOptions options;
  options.steps = 400, options.lr = 3e-3, options.batch = 8;
  return options;
}

BoundaryWeights first_boundary_weights(Index features, Index units, std::uint64_t seed) {
  Random random(seed);
  const Index c = features;
  const auto scale = [](Index inputs) { return 1 / std::sqrt(static_cast<double>(inputs)); };
  BoundaryWeights w;
  w.qkv = at::eye(c, at::kFloat).repeat({3, 1, 1});
  w.out = at::eye(c, at::kFloat);
  w.norm = at::stack({at::ones({c}, at::kFloat), at::zeros({c}, at::kFloat)});
  w.hidden = normal({4 * c + 2, units}, scale(2 * c), random);
  w.score = normal({units + 1}, 0.1 * scale(units), random);
  w.hidden.select(0, 4 * c + 1).zero_();
  w.score.narrow(0, units, 1).zero_();
  return w;
}

at::Tensor boundary_logits(const at::Tensor& keys, const BoundaryWeights& w, Index half_window, Index heads,
                           Index stride) {
  const Index c = w.features();
  const auto windows = [&](Index i) {
    return windows_of(at::matmul(keys, w.qkv.select(0, i)), half_window, heads, stride);
  };
  const double scale = 1 / std::sqrt(static_cast<double>(c / heads));
  const at::Tensor weights = at::softmax(at::matmul(windows(0) * scale, windows(1).transpose(-1, -2)), -1);
  const at::Tensor mixed = at::matmul(weights, windows(2)).transpose(2, 3).flatten(-2);  // [P, G, 2ω, C]
  const at::Tensor y = at::layer_norm(at::matmul(mixed, w.out), {c}, w.norm.select(0, 0), w.norm.select(0, 1), 1e-5);
  const at::Tensor l = y.narrow(2, 0, half_window).mean(2), r = y.narrow(2, half_window, half_window).mean(2);
  const at::Tensor same = at::cosine_similarity(l, r, -1, 1e-8).unsqueeze(-1);
  const at::Tensor features = at::cat({l, r, (l - r).abs(), l * r, same, at::ones_like(same)}, -1);
  const Index units = w.hidden.size(1);
  return at::matmul(at::matmul(features, w.hidden).relu(), w.score.narrow(0, 0, units)) + w.score.select(0, units);
}

at::Tensor boundary_loss(const at::Tensor& logits, const at::Tensor& labels) {
  const at::Tensor known = labels.ge(0).to(logits.scalar_type()), y = labels.clamp_min(0).to(logits.scalar_type());
  const at::Tensor bce = -positive_weight * y * at::log_sigmoid(logits) - (1 - y) * at::log_sigmoid(-logits);
  const at::Tensor missed = at::sigmoid((1 - 2 * y) * logits);  // 1 - p_t
  return (missed.square() * bce * known).sum() / known.sum().clamp_min(1);
}

BoundaryFit fit_boundary_predictor(const std::vector<BoundaryLesson>& lessons, Index half_window, Index heads,
                                   const FitOptions& options, const FitProgress& progress) {
  for (const BoundaryLesson& l : lessons)
    if (const Index tokens = l.keys.size(0); tokens < 4 * half_window)
      fail("pieces of {} tokens, expected at least {}: four times half_window = {}", tokens, 4 * half_window,
           half_window);
  const Index features = lessons.front().keys.size(1);
  mechanism::check_predictor_heads(features, heads);
  const at::Tensor inverse = inverse_sizes(lessons);
  BoundaryWeights w = first_boundary_weights(features, usual_units, options.seed);
  NamedParameters parameters{
      {"qkv", w.qkv}, {"out", w.out}, {"norm", w.norm}, {"hidden", w.hidden}, {"score", w.score}};
  for (auto& [name, x] : parameters) x.requires_grad_();
  OptimizerOptions adamw;
  adamw.weight_decay = 0;
  Optimizer optimizer(parameters, adamw);
  std::vector<double> losses;
  for (Index step = 0; step < options.steps; ++step) {
    say(progress, "predictor", step, options.steps);
    Random random(Random(options.seed).next() + static_cast<std::uint64_t>(step));
    std::vector<at::Tensor> keys, labels;
    for (Index i = 0; i < options.batch; ++i) {
      const BoundaryLesson& lesson = lessons[static_cast<size_t>(random.below(static_cast<Index>(lessons.size())))];
      const Index tokens = lesson.keys.size(0), count = std::min(stretch, tokens);
      const BoundaryLesson some = part(lesson, random.below(tokens - count + 1), count);
      keys.push_back(some.keys * inverse), labels.push_back(inner(some.labels, half_window, apart));
    }
    const at::Tensor loss =
        boundary_loss(boundary_logits(at::stack(keys), w, half_window, heads, apart), at::stack(labels));
    losses.push_back(loss.item<double>());
    loss.backward();
    optimizer.step(options.lr * rate_share(step, options.steps, options.warmup, 0));
  }
  return {
      {w.qkv.detach() * inverse.unsqueeze(-1), w.out.detach(), w.norm.detach(), w.hidden.detach(), w.score.detach()},
      std::move(losses)};
}

namespace {

// The logits of a lesson's gaps with a label, `stride` apart, and these labels, one after the other.
std::pair<at::Tensor, at::Tensor> judged(const BoundaryLesson& lesson, const BoundaryWeights& w, Index half_window,
                                         Index heads, Index stride) {
  const c10::NoGradGuard frozen;
  std::vector<at::Tensor> logits, labels;
  const Index gaps = lesson.keys.size(0) - 2 * half_window + 1;
  for (Index first = 0; first < gaps; first += stretch) {  // a multiple of any stride in use
    const BoundaryLesson some = part(lesson, first, std::min(stretch, gaps - first) + 2 * half_window - 1);
    const at::Tensor y = inner(some.labels, half_window, stride), known = y.ge(0);
    logits.push_back(
        boundary_logits(some.keys.unsqueeze(0), w, half_window, heads, stride).squeeze(0).masked_select(known));
    labels.push_back(y.masked_select(known));
  }
  return {at::cat(logits), at::cat(labels)};
}

}  // namespace

BoundaryCounts count_boundaries(const std::vector<BoundaryLesson>& lessons, const BoundaryWeights& w, Index half_window,
                                Index heads, double threshold) {
  BoundaryCounts c;
  for (const BoundaryLesson& lesson : lessons) {
    const auto [logits, labels] = judged(lesson, w, half_window, heads, 1);
    const at::Tensor above = logits.gt(threshold).to(at::kFloat);
    c.labelled += labels.sum().item<double>(), c.predicted += above.sum().item<double>();
    c.both += (labels * above).sum().item<double>(), c.gaps += static_cast<double>(labels.numel());
  }
  return c;
}

double best_boundary_threshold(const std::vector<BoundaryLesson>& lessons, const BoundaryWeights& w, Index half_window,
                               Index heads) {
  std::vector<std::pair<float, bool>> all;  // logit, label
  double labelled = 0;
  for (const BoundaryLesson& lesson : lessons) {
    const auto [logits, labels] = judged(lesson, w, half_window, heads, apart);
    for (Index i = 0; i < logits.numel(); ++i) {
      all.emplace_back(logits.const_data_ptr<float>()[i], labels.const_data_ptr<float>()[i] > 0);
      labelled += all.back().second ? 1 : 0;
    }
  }
  std::sort(all.begin(), all.end());
  // Taking logits from the largest on.
  double best = 0, both = 0, threshold = 0;
  for (size_t i = all.size(); i-- > 1;) {
    both += all[i].second ? 1 : 0;
    const double f1 = 2 * both / (labelled + static_cast<double>(all.size() - i));
    if (all[i - 1].first < all[i].first && f1 > best) best = f1, threshold = static_cast<double>(all[i - 1].first);
  }
  return threshold;
}

Fitted fit_boundaries(const model::Model& model, const model::MechanismUse& use, const Pieces& pieces, Index chunk,
                      DType kv, const FitOptions& options, const FitProgress& progress) {
  const Mechanism& m = find_mechanism("dhsa");
  const Params params(m.name, m.params, use.call.params);
  const Index half = params.integer("half_window"), heads = params.integer("predictor_heads");
  const Index count = static_cast<Index>(pieces.size()), trained = std::max<Index>(1, count - 1);

  Fitted fitted;
  std::vector<BoundaryLesson> lessons;
  std::map<Index, BoundaryLesson> held_out;
  const auto seen = [&](Index piece, Index layer, const NamedTensors& tensors) {
    const auto of = [&](const char* name) { return torch_copy(tensors.at(name).view()).squeeze(0); };  // B = 1
    const BoundaryLesson lesson{of("keys"), of("labels")};
    if (piece < trained) lessons.push_back(lesson);
    if (piece == count - 1) held_out.emplace(layer, lesson);
  };
  fitted.calibration = read_pieces(model, use, pieces, chunk, kv, progress, seen);

  const BoundaryWeights w = fit_boundary_predictor(lessons, half, heads, options, progress).weights;
  say(progress, "threshold", 0, 1);
  double threshold = params.number("threshold");
  if (!params.given("threshold")) {
    threshold = best_boundary_threshold(lessons, w, half, heads);
    fitted.calibration.params.emplace_back("threshold", fmt::format("{:.4g}", threshold));
  }
  keep_params(fitted.calibration, params, {"half_window", "predictor_heads"});
  for (const auto& [layer, lesson] : held_out) {
    const BoundaryCounts found = count_boundaries({lesson}, w, half, heads, threshold);
    const BoundaryCounts every{
        .gaps = found.gaps, .labelled = found.labelled, .predicted = found.gaps, .both = found.labelled};
    fitted.layers.push_back({layer, every.f1(), found.f1()});
  }
  fitted.measure = "F1 of boundaries, every gap called one before";
  for (const auto& [name, x] : {std::pair{"predictor_qkv", w.qkv},
                                {"predictor_out", w.out},
                                {"predictor_norm", w.norm},
                                {"predictor_hidden", w.hidden},
                                {"predictor_score", w.score}})
    fitted.calibration.all.emplace(name, heed_copy(x));
  return fitted;
}

}  // namespace heed::nn
