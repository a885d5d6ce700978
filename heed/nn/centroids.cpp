#include "heed/nn/centroids.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/bincount.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/layer_norm.h>
#include <ATen/ops/zeros_like.h>
#include <c10/core/GradMode.h>

#include <vector>

#include "heed/mechanism/mechanism.h"
#include "heed/plan/clusters.h"

namespace heed::nn {
namespace {

at::Tensor normalised(const at::Tensor& x, double eps) {
  return at::layer_norm(x.to(at::kFloat), {x.size(-1)}, {}, {}, eps, false);
}

}  // namespace

CentroidOptions centroid_options(const MechanismCall& call, Index kv_heads, Index head_size) {
  const Params p(call.name, find_mechanism(call.name).params, call.params);
  CentroidOptions options{.kv_heads = kv_heads, .clusters = p.integer("clusters"), .head_size = head_size};
  if (options.clusters < 1)
    fail_usage("{}: clusters = {}, expected >= 1 where a model learns them", call.name, options.clusters);
  options.ln_eps = p.number("ln_eps"), options.shared_qk = p.boolean("shared_qk");
  return options;
}

void Centroids::initialise() const {
  const c10::NoGradGuard frozen;
  mean_.copy_(normalised(mean_, options_.ln_eps));
  sum_.copy_(mean_), count_.fill_(1);
}

at::Tensor Centroids::follow(const at::Tensor& q, const at::Tensor& k) const {
  const Index d = options_.head_size, clusters = options_.clusters;
  at::Tensor loss, sum = at::zeros_like(sum_), count = at::zeros_like(count_);
  const auto meet = [&](const at::Tensor& x) {
    // [Hk, rows, D]: every row of a KV head.
    const at::Tensor rows = normalised(x, options_.ln_eps)
                                .unflatten(1, {options_.kv_heads, -1})
                                .transpose(0, 1)
                                .reshape({options_.kv_heads, -1, d});
    const at::Tensor values = rows.detach().contiguous(), nearest = at::empty(values.sizes(), at::kFloat);
    const Index n = values.size(1);
    for (Index head = 0; head < options_.kv_heads; ++head) {
      const at::Tensor own = mean_[head];
      const at::Tensor list = at::empty({n}, at::kInt);
      nearest_centroids(values[head].const_data_ptr<float>(), n, d,
                        {own.const_data_ptr<float>(), static_cast<size_t>(clusters * d)},
                        list.data_ptr<std::int32_t>());
      nearest[head].copy_(own.index_select(0, list));
      sum[head].index_add_(0, list, values[head]);
      count[head].add_(at::bincount(list, {}, clusters));
    }
    const at::Tensor part = (rows - nearest).square().mean();
    loss = loss.defined() ? loss + part : part;
  };
  meet(q);
  if (!options_.shared_qk) meet(k);
  if (c10::GradMode::is_enabled()) {
    const c10::NoGradGuard frozen;
    count_.mul_(options_.decay).add_(count, 1 - options_.decay);
    sum_.mul_(options_.decay).add_(sum, 1 - options_.decay);
    const at::Tensor total = count_.sum(-1, true), eps = at::zeros_like(total).fill_(options_.count_eps);
    const at::Tensor share = (count_ + eps) / (total + static_cast<double>(clusters) * eps) * total;
    mean_.copy_(sum_ / share.unsqueeze(-1));
  }
  return loss * options_.commitment;
}

}  // namespace heed::nn
