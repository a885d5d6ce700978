// What regions of tokens say: attention of rows that each see one run of columns, and largest features.
#include <doctest/doctest.h>

#include <cmath>

#include "heed/exec/spans.h"
#include "heed/plan/largest.h"
#include "heed/plan/permute.h"
#include "support/naive.h"

using namespace heed;
using namespace heed::test;

namespace {

Problem problem_of(const Case& c) {
  const auto& s = c.size;
  return {s.B, s.Hq, s.Hk, s.N, s.M, s.D, s.Dv, false};
}

KeyValues packed(const Case& c) {
  KeyValues kv(c.size.B * c.size.Hk, c.size.D, c.size.Dv, c.size.M, c.arithmetic);
  kv.append(c.k.view(), c.v.view());
  return kv;
}

}  // namespace

TEST_CASE("rows see their spans of a source, by rank, and nothing else") {
  const Case c({2, 4, 2, 300, 700, 24, 40});
  const KeyValues kv = packed(c);
  const Queries queries(c.q.view(), c.arithmetic);
  std::vector<std::int32_t> reversed;
  for (Index j = 0; j < 700; ++j) reversed.push_back(static_cast<std::int32_t>(699 - j));
  std::vector<BlockRange> spans;
  for (Index r = 0; r < 300; ++r)
    spans.push_back({r * 37 % 500, r % 7 == 3 ? r * 37 % 500 : r * 37 % 500 + r % 200 + 1});
  Rule rule;
  rule.scale = static_cast<float>(1 / std::sqrt(24.0));

  const Plan plain = make_plan(problem_of(c), queries, kv, rule, Lanes::per_query_head);
  const auto turned = permute(kv, reversed);
  for (const bool turn : {false, true}) {
    const Tensor got = attend_spans(problem_of(c), queries, turn ? turned->source : plain.sources[0], rule, spans);
    const Naive want = naive_attention(c, [&](Index, Index, Index t, Index j) {
      const BlockRange& span = spans[static_cast<size_t>(t)];
      const Index rank = turn ? 699 - j : j;
      return rank >= span.begin && rank < span.end;
    });
    double worst = 0;
    for (size_t i = 0; i < want.o.size(); ++i) worst = std::max(worst, std::fabs(got.as<float>()[i] - want.o[i]));
    CHECK(worst <= 2e-5);
    for (Index e = 0; e < 40; ++e) CHECK(got.as<float>()[3 * 40 + e] == 0);  // an empty span
  }
}

TEST_CASE("the largest features of regions, of queries that are scaled either way and of keys") {
  const Case c({1, 4, 2, 600, 600, 20, 16}, DType::f32, DType::bf16);
  const KeyValues kv = packed(c);
  std::vector<std::int32_t> order;
  for (Index j = 0; j < 600; ++j) order.push_back(static_cast<std::int32_t>(j * 7 % 600));
  std::vector<BlockRange> regions;  // growing to either side, shrinking, jumping
  for (Index r = 0; r < 600; ++r)
    regions.push_back(r % 100 < 50 ? BlockRange{r / 100 * 100, r + 1} : BlockRange{599 - r, 640 - r});
  for (const float scale : {0.5f, -0.5f})
    for (const bool ordered : {false, true}) {
      const Largest got =
          largest_features(problem_of(c), Queries(c.q.view(), c.arithmetic), kv, scale,
                           ordered ? std::span<const std::int32_t>(order) : std::span<const std::int32_t>(), regions);
      Index wrong = 0;
      for (Index h = 0; h < 4; ++h)
        for (Index r = 0; r < 600; ++r)
          for (Index d = 0; d < 20; ++d) {
            double q = -INFINITY, k = -INFINITY;
            for (Index i = regions[static_cast<size_t>(r)].begin; i < regions[static_cast<size_t>(r)].end; ++i) {
              const Index token = ordered ? order[static_cast<size_t>(i)] : i;
              q = std::max(q, scale * c.q_at(0, h, token, d)), k = std::max(k, c.k_at(0, h / 2, token, d));
            }
            const size_t at = static_cast<size_t>((h * 600 + r) * 20 + d);
            wrong += got.q.as<float>()[at] * scale != q || got.k.as<float>()[at] != k ? 1 : 0;
          }
      CHECK(wrong == 0);
    }
}
