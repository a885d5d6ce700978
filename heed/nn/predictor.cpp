#include "heed/nn/predictor.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/softmax.h>

#include <cmath>

#include "heed/mechanism/mechanism.h"
#include "heed/torch/attend.h"

namespace heed::nn {

Predictor predictor_of(const MechanismCall& call, const std::map<std::string, at::Tensor, std::less<>>& parts) {
  const Params p(call.name, find_mechanism(call.name).params, call.params);
  Predictor predictor{parts.at("p_q"),   parts.at("p_q_b"), parts.at("p_k"),
                      parts.at("p_k_b"), parts.at("w_dn"),  parts.at("w_up")};
  predictor.scale =
      p.given("pred_scale") ? p.number("pred_scale") : 1 / std::sqrt(static_cast<double>(predictor.p_q.size(0)));
  return predictor;
}

at::Tensor imitation_loss(const at::Tensor& q_in, const at::Tensor& k_in, const Predictor& p) {
  const at::Tensor q = q_in.detach().to(at::kFloat), k = k_in.detach().to(at::kFloat);
  const Index b = q.size(0), n = q.size(2), group = q.size(1) / k.size(1), r = p.w_up.size(1);
  const at::Tensor reduced = at::matmul(at::linear(k, p.p_k, p.p_k_b).transpose(2, 3), p.w_dn);  // [B, Hk, c, r]
  const at::Tensor logits = at::matmul(at::linear(q, p.p_q, p.p_q_b), reduced.repeat_interleave(group, 1)) * p.scale;
  const auto but_first = [&](const at::Tensor& x) { return x.narrow(2, 1, n - 1); };
  const at::Tensor shares = but_first(at::softmax(logits, -1));

  const double scale = 1 / std::sqrt(static_cast<double>(q.size(3)));
  const aten::Attended dense = aten::attend(q, k, p.w_up.expand({b, k.size(1), n, r}), {.scale = scale});
  const aten::Attended doubled = aten::attend(q, k, p.w_up.detach().expand({b, k.size(1), n, r}), {.scale = 2 * scale});
  const at::Tensor guessed = (at::matmul(shares, at::matmul(p.w_up.t(), p.w_up)) * shares).sum();
  const at::Tensor shared = (shares * but_first(dense.o)).sum();
  const at::Tensor attended = but_first(doubled.lse - 2 * dense.lse).exp().sum();
  return 0.01 * (guessed - 2 * shared + attended);
}

}  // namespace heed::nn
