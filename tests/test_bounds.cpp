// Decoding steps that choose blocks by bounds of their keys, and the bounds themselves.
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <set>

#include "heed/kernel/kernels.h"
#include "support/naive.h"

using namespace heed;
using namespace heed::test;

TEST_CASE("seer-attention decodes by bounds of keys: as many blocks as the budget, and the last") {
  for (const std::string& isa : available_isas()) {
    const UseIsa use(isa);
    for (const DType arithmetic : {DType::f32, DType::bf16})
      for (const Sizes& s : {Sizes{1, 4, 2, 1, 333, 33, 16}, Sizes{2, 8, 1, 1, 96, 64, 40},
                             Sizes{1, 3, 1, 1, 2500, 80, 16}, Sizes{1, 2, 2, 1, 16, 16, 16}})
        for (const Index budget : {16, 50, 2000}) {
          const Case c(s, DType::f32, arithmetic);
          const Index last = (s.M - 1) / 16, count = budget / 16;
          std::map<std::pair<Index, Index>, std::set<Index>> chosen;
          std::vector<char> undecided;
          for (Index b = 0; b < s.B; ++b)
            for (Index h = 0; h < s.Hq; ++h) {
              std::vector<std::pair<double, Index>> bound;
              for (Index x = 0; x < last; ++x) {
                double sum = 0;
                for (Index d = 0; d < s.D; ++d) {
                  double most = -INFINITY;
                  for (Index j = x * 16; j < x * 16 + 16; ++j)
                    most = std::max(most, c.q_at(b, h, 0, d) * c.k_at(b, c.kv_head(h), j, d));
                  sum += most;
                }
                bound.emplace_back(-sum, x);
              }
              std::sort(bound.begin(), bound.end());
              auto& set = chosen[{b, h}];
              set.insert(last);
              for (size_t i = 0; i < bound.size() && static_cast<Index>(i) < count; ++i) set.insert(bound[i].second);
              const bool some = count < last;
              undecided.push_back(
                  some && bound[static_cast<size_t>(count)].first - bound[static_cast<size_t>(count - 1)].first < 1e-4);
            }
          Naive want =
              naive_attention(c, [&](Index b, Index h, Index, Index j) { return chosen[{b, h}].count(j / 16) != 0; });
          want.undecided = undecided;
          const Got got = run(fmt::format("seer-attention:block=16,decode_budget={}", budget), c.input());
          CHECK_AGREES(got, want, c);
          if (std::count(undecided.begin(), undecided.end(), 1) == 0) CHECK(got.stats.pairs == want.pairs);
        }
  }
}

TEST_CASE("bounds of keys grow with the cache and shrink with it") {
  for (const std::string& isa : available_isas()) {
    const UseIsa use(isa);
    for (const DType arithmetic : {DType::f32, DType::bf16}) {
      const Case c({1, 2, 2, 1, 200, 19, 16}, DType::f32, arithmetic);
      KeyValues kv(2, 19, 16, 200, arithmetic);
      const auto append = [&](Index from, Index to) {
        TensorView k = c.k.view(), v = c.v.view();
        k.data = k.at({0, 0, from}), v.data = v.at({0, 0, from});
        k.shape[2] = v.shape[2] = to - from;
        kv.append(k, v);
      };
      const auto check = [&](Index block) {
        const BlockBounds& b = kv.block_bounds(block);
        REQUIRE(b.complete == kv.size() / block);
        Index wrong = 0;
        for (Index h = 0; h < 2; ++h)
          for (Index x = 0; x < b.complete; ++x)
            for (Index d = 0; d < 19; ++d) {
              double most = -INFINITY, least = INFINITY;
              for (Index j = x * block; j < (x + 1) * block; ++j)
                most = std::max(most, c.k_at(0, h, j, d)), least = std::min(least, c.k_at(0, h, j, d));
              const float* at = b.bounds.data() + (h * b.capacity + x) * 38;
              wrong += static_cast<double>(at[d]) != most || static_cast<double>(at[19 + d]) != least;
            }
        CHECK(wrong == 0);
      };
      append(0, 70), check(16), check(50);
      append(70, 71), check(16);
      append(71, 200), check(16), check(50);
      kv.truncate(90), check(16);
      append(90, 140), check(16), check(50);
    }
  }
}
