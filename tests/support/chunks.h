// Mechanisms as a model calls them: some queries of a prompt, the keys up to the last of them.
#pragma once

#include <cmath>
#include <cstring>
#include <memory>
#include <vector>

#include "support/cases.h"

namespace heed::test {

/// Attention of queries [first, end) of a case with N = M over keys [0, end), in a prompt of `prompt` tokens.
inline Got run_part(const std::string& call, const Case& c, Index first, Index end, Index prompt,
                    const std::map<std::string, TensorView, std::less<>>& extra = {}) {
  const auto& s = c.size;
  const MechanismCall parsed = MechanismCall::parse(call);
  const Mechanism& m = find_mechanism(parsed.name);
  const auto part = [](TensorView x, Index from, Index to) {
    x.data = static_cast<const std::byte*>(x.data) + from * x.stride[2] * size_of(x.dtype);
    x.shape[2] = to - from;
    return x;
  };
  KeyValues kv(s.B * s.Hk, s.D, s.Dv, end, c.arithmetic);
  kv.append(part(c.k.view(), 0, end), part(c.v.view(), 0, end));
  Inputs in;
  in.problem = {.B = s.B, .Hq = s.Hq, .Hk = s.Hk, .N = end - first, .M = end, .D = s.D, .Dv = s.Dv, .causal = true};
  in.rule.scale = static_cast<float>(1 / std::sqrt(static_cast<double>(s.D)));
  in.q = Queries(part(c.q.view(), first, end), c.arithmetic);
  in.kv = &kv;
  in.prompt = prompt;
  in.extra = extra;
  return run(m.plan(Params(m.name, m.params, parsed.params), in));
}

/// Rows that differ in any bit between queries [first, end) in `part` and the same in `whole` (N queries).
inline Index rows_that_differ(const Got& whole, const Got& part, const Case& c, Index first, Index end) {
  const auto& s = c.size;
  Index count = 0;
  for (Index lane = 0; lane < s.B * s.Hq; ++lane)
    for (Index t = first; t < end; ++t) {
      const auto a = static_cast<size_t>(lane * s.N + t), b = static_cast<size_t>(lane * (end - first) + t - first);
      const auto width = static_cast<size_t>(s.Dv);
      count +=
          std::memcmp(&whole.o[a * width], &part.o[b * width], width * 4) != 0 || whole.lse[a] != part.lse[b] ? 1 : 0;
    }
  return count;
}

}  // namespace heed::test
