// Gradients of derived columns sent home to the tokens that they are made of.

#include "heed/base/threads.h"
#include "heed/exec/backward.h"

namespace heed {

void fold(const Plan& plan, PlanGradients& gradients) {
  const Problem& p = plan.problem;
  SourceGradients& home = gradients.sources.at(0);
  const Index tokens = home.dk.shape()[1];
  parallel_for(p.B * p.Hk, [&](Index head, int) {
    for (size_t s = 1; s < plan.sources.size(); ++s) {
      const Source& source = plan.sources[s];
      const Index each = source.per_query_head ? p.group() : 1;
      for (Index v = head * each; v < (head + 1) * each; ++v) {
        const SourceView& view = source.views[static_cast<size_t>(v)];
        if (view.members == nullptr) continue;
        const auto& [members, begins] = *view.members;
        const auto send = [&](const Tensor& from, Tensor& to, Index width) {
          for (Index c = 0; c < view.columns; ++c) {
            const float* x = from.as<float>() + (v * view.columns + c) * width;
            const Index begin = begins.empty() ? c : begins[static_cast<size_t>(c)];
            const Index end = begins.empty() ? c + 1 : begins[static_cast<size_t>(c) + 1];
            const float share = 1 / static_cast<float>(end - begin);
            for (Index m = begin; m < end; ++m) {
              const Index token = members[static_cast<size_t>(m)];
              if (token < 0) continue;
              float* out = to.as<float>() + (head * tokens + token) * width;
              for (Index i = 0; i < width; ++i) out[i] += x[i] * share;
            }
          }
        };
        send(gradients.sources[s].dk, home.dk, p.D);
        send(gradients.sources[s].dv, home.dv, p.Dv);
      }
    }
  });
}

}  // namespace heed
