#include "heed/nn/optimizer.h"

#include <ATen/ops/matmul.h>
#include <ATen/ops/zeros_like.h>
#include <c10/core/GradMode.h>

#include <cmath>
#include <numbers>

namespace heed::nn {

at::Tensor orthogonalise(const at::Tensor& u) {
  constexpr double a = 3.4445, b = -4.7750, c = 2.0315;
  const bool tall = u.size(0) > u.size(1);
  at::Tensor x = tall ? u.t() : u;  // products on the short side
  x = x / (x.norm() + 1e-7);
  for (int i = 0; i < 5; ++i) {
    const at::Tensor gram = at::matmul(x, x.t());
    x = a * x + at::matmul(b * gram + c * at::matmul(gram, gram), x);
  }
  return tall ? x.t() : x;
}

Optimizer::Optimizer(const NamedParameters& parameters, const OptimizerOptions& options) : options_(options) {
  for (const auto& [name, w] : parameters) {
    const bool by_muon = options.muon && name.starts_with("blk.") && w.dim() == 2;
    slots_.push_back({name, w, at::zeros_like(w), by_muon ? at::Tensor() : at::zeros_like(w)});
  }
}

double Optimizer::clip(double most) {
  double squares = 0;
  for (const Slot& s : slots_)
    if (s.w.grad().defined()) squares += std::pow(s.w.grad().norm().item<double>(), 2);
  const double length = std::sqrt(squares);
  if (most > 0 && length > most)
    for (const Slot& s : slots_)
      if (s.w.grad().defined()) s.w.grad().mul_(most / length);
  return length;
}

void Optimizer::decay(Slot& s, double rate) const {
  if (s.w.dim() == 2) s.w.mul_(1 - rate * options_.weight_decay);
}

void Optimizer::adamw(Slot& s, const at::Tensor& g, double rate) const {
  const auto t = static_cast<double>(steps_);
  const double fresh1 = 1 - std::pow(options_.beta1, t), fresh2 = 1 - std::pow(options_.beta2, t);
  s.m.mul_(options_.beta1).add_(g, 1 - options_.beta1);
  s.v.mul_(options_.beta2).addcmul_(g, g, 1 - options_.beta2);
  decay(s, rate);
  s.w.addcdiv_(s.m, (s.v / fresh2).sqrt_().add_(options_.eps), -rate / fresh1);
}

void Optimizer::muon(Slot& s, const at::Tensor& g, double rate) const {
  s.m.mul_(options_.momentum).add_(g);
  const auto longer = static_cast<double>(std::max(s.w.size(0), s.w.size(1)));
  const at::Tensor direction = orthogonalise(g + options_.momentum * s.m);
  decay(s, rate);
  s.w.add_(direction, -rate * 0.2 * std::sqrt(longer));
}

void Optimizer::step(double rate) {
  const c10::NoGradGuard frozen;
  ++steps_;
  for (Slot& s : slots_) {
    const at::Tensor g = s.w.grad();
    if (!g.defined()) continue;
    if (s.v.defined()) adamw(s, g, rate);
    else muon(s, g, rate);
    s.w.mutable_grad().reset();
  }
}

NamedParameters Optimizer::state() const {
  NamedParameters list;
  for (const Slot& s : slots_) {
    list.emplace_back("m." + s.name, s.m);
    if (s.v.defined()) list.emplace_back("v." + s.name, s.v);
  }
  return list;
}

double rate_share(Index step, Index steps, Index warmup, double last) {
  if (step < warmup) return static_cast<double>(step + 1) / static_cast<double>(warmup);
  const double done = static_cast<double>(step - warmup) / static_cast<double>(std::max<Index>(1, steps - warmup));
  return last + (1 - last) * 0.5 * (1 + std::cos(std::numbers::pi * std::min(1.0, done)));
}

}  // namespace heed::nn
