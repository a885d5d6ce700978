// hip's decode steps: one search serves several of them, and no key falls between what was searched and the window.
#include <doctest/doctest.h>

#include <any>
#include <set>

#include "heed/mechanism/mechanism.h"
#include "support/naive.h"

using namespace heed;
using namespace heed::test;

namespace {

constexpr Index total = 420, first_step = 300, heads = 4, kv_heads = 2, d = 16;
constexpr Index refresh = 5, window = 24, sink = 3, budget = 32;

/// Decodes tokens [first_step, total) of one case, one at a time, with a memory that lasts.
class Decoder {
 public:
  explicit Decoder(const Case& c) : c_(c), kv_(kv_heads, d, d, total, DType::f32) { append(0, first_step); }

  /// The step at position p; `visible` receives the keys that each query head saw.
  Got step(Index p, std::vector<std::set<Index>>& visible, std::any* memory) {
    if (kv_.size() == p) append(p, p + 1);
    const Params params("hip", find_mechanism("hip").params,
                        {{"budget", std::to_string(budget)},
                         {"query_block", "16"},
                         {"window", std::to_string(window)},
                         {"sink", std::to_string(sink)},
                         {"refresh", std::to_string(refresh)}});
    Inputs in;
    in.problem = {.B = 1, .Hq = heads, .Hk = kv_heads, .N = 1, .M = p + 1, .D = d, .Dv = d, .causal = true};
    in.rule.scale = 0.25f;
    TensorView q = c_.q.view();
    q.data = q.at({0, 0, p}), q.shape[2] = 1;
    in.q = Queries(q, DType::f32);
    in.kv = &kv_, in.prompt = first_step, in.memory = memory;
    const Plan plan = find_mechanism("hip").plan(params, in);
    visible.assign(heads, {});
    walk(plan, [&](const RowBlock& rows, const std::vector<Tile>& tiles) {
      for (const Tile& tile : tiles)
        for (Index i = 0; i < tile.columns.count; ++i)
          if (sees(plan, rows, tile, 0, i)) {
            CHECK(visible[static_cast<size_t>(rows.head)].insert(tile.columns[i]).second);  // no key twice
          }
    });
    return run(plan);
  }

 private:
  void append(Index from, Index to) {
    const auto part = [&](TensorView x) {
      x.data = x.at({0, 0, from}), x.shape[2] = to - from;
      return TensorView(x.data, x.dtype, {kv_heads, to - from, d}, {x.stride[1], x.stride[2], x.stride[3]});
    };
    kv_.append(part(c_.k.view()), part(c_.v.view()));
  }
  const Case& c_;
  KeyValues kv_;
};

}  // namespace

TEST_CASE("hip decodes several steps with one search") {
  const Case c({1, heads, kv_heads, total, total, d, d});
  Decoder decoder(c), alone(c);
  std::any memory;
  std::vector<std::set<Index>> searched, seen, fresh;
  Index reused_lists = 0;
  for (Index p = first_step; p < total; ++p) {
    const Index age = (p - first_step) % refresh;
    const Got got = decoder.step(p, seen, &memory), searching = alone.step(p, fresh, nullptr);
    if (age == 0) {
      searched = seen;
      CHECK(seen == fresh);
      CHECK(same_bits(got.o, searching.o));
    }
    for (Index h = 0; h < heads; ++h) {
      // What the search saw, and every token that came after it: the window began at its step's window.
      std::set<Index> want = searched[static_cast<size_t>(h)];
      for (Index j = p - age; j <= p; ++j) want.insert(j);
      CHECK(seen[static_cast<size_t>(h)] == want);
      // The last block of two keys may have been cut.
      const Index most = sink + budget + window + age;
      CHECK((static_cast<Index>(want.size()) == most || static_cast<Index>(want.size()) == most - 1));
      reused_lists += seen[static_cast<size_t>(h)] != fresh[static_cast<size_t>(h)] ? 1 : 0;
    }
    const Naive naive = naive_attention(
        c, [&](Index, Index h, Index t, Index j) { return t == p && seen[static_cast<size_t>(h)].count(j) > 0; });
    Naive row;
    for (Index h = 0; h < heads; ++h) {
      const size_t at = static_cast<size_t>(h * total + p);
      row.lse.push_back(naive.lse[at]);
      row.o.insert(row.o.end(), naive.o.begin() + static_cast<std::ptrdiff_t>(at * d),
                   naive.o.begin() + static_cast<std::ptrdiff_t>((at + 1) * d));
    }
    const Case one({1, heads, kv_heads, 1, p + 1, d, d});
    CHECK_AGREES(got, row, one);
  }
  CHECK(reused_lists > 100);  // else the searches would have been the same and nothing was tested
}

TEST_CASE("hip searches anew when its memory was emptied or is of a later token") {
  const Case c({1, heads, kv_heads, total, total, d, d});
  std::vector<std::set<Index>> seen, fresh;
  std::any memory;
  Decoder first(c);
  for (Index p = first_step; p < first_step + 3; ++p) first.step(p, seen, &memory);
  Decoder again(c);  // the sequence was cut back to before the search
  again.step(first_step, seen, &memory), again.step(first_step, fresh, nullptr);
  CHECK(seen == fresh);
}

TEST_CASE("hip's window must hold the tokens between two searches") {
  const Case c({1, heads, kv_heads, total, total, d, d});
  const Params params("hip", find_mechanism("hip").params, {{"query_block", "4"}, {"window", "4"}, {"refresh", "5"}});
  KeyValues kv(kv_heads, d, d, 8, DType::f32);
  std::any memory;
  Inputs in;
  in.problem = {.B = 1, .Hq = heads, .Hk = kv_heads, .N = 1, .M = 1, .D = d, .Dv = d, .causal = true};
  in.kv = &kv, in.memory = &memory;
  CHECK_FAILS(find_mechanism("hip").plan(params, in), UsageError, "hip: window = 4, expected at least refresh = 5");
}
