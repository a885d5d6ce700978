#include "heed/plan/gram.h"

#include <algorithm>
#include <vector>

#include "heed/base/threads.h"
#include "heed/kernel/kernels.h"

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

}  // namespace heed
