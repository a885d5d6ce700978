#include "heed/plan/gram.h"

#include <algorithm>
#include <vector>

#include "heed/base/threads.h"
#include "heed/kernel/kernels.h"
#include "heed/kernel/right_factor.h"

namespace heed {

Tensor feature_gram(const Problem& p, const Queries& queries, const KeyValues& kv) {
  constexpr Index run = 256, slab = 16 * run;  // a slab is a thread's unit of work
  const Index d = p.D, wide = round_up(d, panel_columns), slabs = ceil_div(p.N, slab), heads = p.B * p.Hq;
  std::vector<double> sums(static_cast<size_t>(heads * slabs * d * d), 0);
  parallel_for(heads * slabs, [&](Index unit, int) {
    const Index head = unit / slabs, b = head / p.Hq, h = head % p.Hq, first = unit % slabs * slab;
    double* sum = sums.data() + unit * d * d;
    Scratch& scratch = thread_scratch();
    const Scratch::Mark mark(scratch);
    float* x = scratch.take<float>(d).data();
    float* q = scratch.take<float>(d * run).data();    // [feature, token]
    float* k = scratch.take<float>(wide * run).data();  // panels: [feature / 64][token][feature % 64]
    float* part = scratch.take<float>(d * wide).data();
    std::fill_n(k, wide * run, 0.0f);
    for (Index begin = first; begin < std::min(p.N, first + slab); begin += run) {
      const Index tokens = std::min(run, p.N - begin);
      for (Index t = 0; t < tokens; ++t) {
        queries.read(b, h, begin + t, x);
        for (Index i = 0; i < d; ++i) q[i * run + t] = x[i];
        kv.read_key(b * p.Hk + h / p.group(), begin + t, x);
        for (Index i = 0; i < d; ++i) k[(i / panel_columns * tokens + t) * panel_columns + i % panel_columns] = x[i];
      }
      kernels().gemm_f32(d, d, tokens, q, run, k, part, wide, false);
      for (Index i = 0; i < d; ++i)
        for (Index j = 0; j < d; ++j) sum[i * d + j] += static_cast<double>(part[i * wide + j]);
    }
  });
  Tensor gram(DType::f32, {p.B, p.Hq, d, d});
  for (Index head = 0; head < heads; ++head)
    for (Index i = 0; i < d * d; ++i) {
      double total = 0;
      for (Index s = 0; s < slabs; ++s) total += sums[static_cast<size_t>((head * slabs + s) * d * d + i)];
      gram.as<float>()[head * d * d + i] = static_cast<float>(total);
    }
  return gram;
}

FeatureGradients feature_gram_gradient(const Problem& p, const Queries& queries, const KeyValues& kv,
                                       const Tensor& dgram) {
  constexpr Index run = 256;
  const Index d = p.D, wide = round_up(d, panel_columns), group = p.group(), runs = ceil_div(p.N, run);
  FeatureGradients out{Tensor(DType::f32, {p.B, p.Hq, p.N, d}), Tensor(DType::f32, {p.B, p.Hk, p.N, d})};
  std::vector<std::vector<float>> straight, transposed;  // dgram of each head, for dk and for dq
  for (Index head = 0; head < p.B * p.Hq; ++head) {
    const float* g = dgram.as<float>() + head * d * d;
    straight.push_back(right_factor(g, d, d)), transposed.push_back(right_factor(g, d, d, 1, d));
  }
  parallel_for(p.B * p.Hk * runs, [&](Index unit, int) {
    const Index kv_head = unit / runs, first = unit % runs * run, tokens = std::min(run, p.N - first);
    Scratch& scratch = thread_scratch();
    const Scratch::Mark mark(scratch);
    float *q = scratch.take<float>(run * d).data(), *k = scratch.take<float>(run * d).data();
    float *dq = scratch.take<float>(run * wide).data(), *dk = scratch.take<float>(run * wide).data();
    const auto store = [&](const float* from, float* to) {
      for (Index t = 0; t < tokens; ++t) std::copy_n(from + t * wide, d, to + t * d);
    };
    for (Index t = 0; t < tokens; ++t) kv.read_key(kv_head, first + t, k + t * d);
    for (Index h = 0; h < group; ++h) {
      const Index head = kv_head * group + h;
      for (Index t = 0; t < tokens; ++t) queries.read(head / p.Hq, head % p.Hq, first + t, q + t * d);
      kernels().gemm_f32(tokens, d, d, k, d, transposed[static_cast<size_t>(head)].data(), dq, wide, false);
      kernels().gemm_f32(tokens, d, d, q, d, straight[static_cast<size_t>(head)].data(), dk, wide, h > 0);
      store(dq, out.dq.as<float>() + (head * p.N + first) * d);
    }
    store(dk, out.dk.as<float>() + (kv_head * p.N + first) * d);
  });
  return out;
}

}  // namespace heed
