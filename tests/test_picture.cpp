// Pictures of plans against the definitions of the mechanisms, pair by pair.
#include <doctest/doctest.h>

#include <cmath>

#include "heed/exec/picture.h"
#include "support/naive.h"

using namespace heed;
using namespace heed::test;

namespace {

// Every pixel from its definition; "" when all agree.
std::string wrong_pixel(const Picture& picture, const Case& c, bool causal, const Sees& sees, Index b, Index h) {
  for (Index y = 0; y < picture.height; ++y)
    for (Index x = 0; x < picture.width; ++x) {
      Index attended = 0, possible = 0;
      for (Index t = y * picture.cell; t < std::min(c.size.N, (y + 1) * picture.cell); ++t)
        for (Index j = x * picture.cell; j < std::min(c.size.M, (x + 1) * picture.cell); ++j) {
          possible += !causal || j <= position(c, t);
          attended += sees(b, h, t, j);
        }
      const float got = picture.share[static_cast<size_t>(y * picture.width + x)];
      const double want = static_cast<double>(attended) / static_cast<double>(possible);
      const bool right = possible == 0 ? std::isnan(got) : std::abs(got - want) < 1e-6;
      if (!right) return fmt::format("pixel {}, {}: {} of {} pairs, got {}", x, y, attended, possible, got);
    }
  return "";
}

struct Example {
  std::string call;
  Sees sees;
  bool causal;
};

std::vector<Example> examples(const Case& c) {
  return {{"dense", dense_sees(c, true), true},
          {"dense", dense_sees(c, false), false},
          {"streaming:sink=3,window=17", streaming_sees(c, 3, 17), true},
          {"power:block=8,window_blocks=2", power_sees(c, 8, 2, 1), true},
          {"moba:block=16,top_k=3", moba_sees(c, {.block = 16, .top_k = 3}).sees, true}};
}

}  // namespace

TEST_CASE("pictures show exactly the pairs of the definition") {
  for (const Sizes& size :
       {Sizes{.B = 1, .Hq = 1, .Hk = 1, .N = 1, .M = 1}, Sizes{.B = 2, .Hq = 4, .Hk = 2, .N = 130, .M = 130},
        Sizes{.B = 1, .Hq = 2, .Hk = 1, .N = 33, .M = 301}}) {
    const Case c(size);
    for (const Example& e : examples(c)) {
      const Plan plan = plan_of(MechanismCall::parse(e.call), c.input(e.causal));
      for (Index most : {1000, 64, 7, 1})
        for (Index h = 0; h < size.Hq; ++h) {
          const Picture picture = draw(plan, size.B - 1, h, most);
          CHECK(std::max(picture.width, picture.height) <= most);
          CHECK(picture.share.size() == static_cast<size_t>(picture.width * picture.height));
          CHECK_MESSAGE(wrong_pixel(picture, c, e.causal, e.sees, size.B - 1, h).empty(), e.call, " ", most, ": ",
                        wrong_pixel(picture, c, e.causal, e.sees, size.B - 1, h));
        }
    }
  }
}

TEST_CASE("a cell is as small as the limit allows") {
  const Case c({.N = 100, .M = 100});
  const Plan plan = plan_of(MechanismCall::parse("dense"), c.input());
  CHECK(draw(plan, 0, 0, 100).cell == 1);
  CHECK(draw(plan, 0, 0, 99).cell == 2);
  CHECK(draw(plan, 0, 0, 99).width == 50);
}

TEST_CASE("documents and padding are seen") {
  const Case c({.B = 1, .Hq = 2, .Hk = 1, .N = 90, .M = 90});
  const Docs docs = documents({20, 50, 20});
  std::vector<std::uint8_t> keys(90, 1);
  for (size_t j : {3, 40, 41, 89}) keys[j] = 0;
  AttendInput in = c.input(true);
  in.extra.emplace("doc", TensorView(docs.data(), DType::i32, {1, 90}));
  in.extra.emplace("key_mask", TensorView(keys.data(), DType::u8, {1, 90}));
  const Sees sees = [&](Index b, Index, Index t, Index j) {
    return j <= t && same_document(c, docs, b, t, j) && keys[static_cast<size_t>(j)] != 0;
  };
  const Plan plan = plan_of(MechanismCall::parse("dense"), in);
  for (Index most : {90, 13}) CHECK(wrong_pixel(draw(plan, 0, 1, most), c, true, sees, 0, 1) == "");
}

TEST_CASE("chunks of a document make the picture of the whole") {
  const Case whole({.B = 1, .Hq = 2, .Hk = 2, .N = 200, .M = 200});
  for (const std::string call : {"streaming:sink=2,window=40", "moba:block=16,top_k=4", "power:block=16"}) {
    const AttendInput all = whole.input(true);
    PairGrid grid(0, 200, 200, 23);
    for (Index begin = 0; begin < 200; begin += 64) {
      const Index end = std::min<Index>(200, begin + 64);
      AttendInput in = all;
      in.q.data = all.q.at({0, 0, begin}), in.q.shape[2] = end - begin;
      in.k.shape[2] = end, in.v.shape[2] = end;
      grid.add(plan_of(MechanismCall::parse(call), in), 0, 1);
    }
    const Plan plan = plan_of(MechanismCall::parse(call), all);
    PairGrid want(0, 200, 200, 23);
    want.add(plan, 0, 1);
    CHECK(grid.pairs() == want.pairs());
    CHECK(grid.dense_pairs() == 200 * 201 / 2);
    const Picture a = grid.picture(), b = want.picture();
    for (size_t i = 0; i < a.share.size(); ++i)
      CHECK((a.share[i] == b.share[i] || (std::isnan(a.share[i]) && std::isnan(b.share[i]))));
  }
}

TEST_CASE("what lies outside is refused") {
  const Case c({.B = 1, .Hq = 2, .Hk = 1, .N = 10, .M = 20});
  const Plan plan = plan_of(MechanismCall::parse("dense"), c.input(true));
  CHECK_FAILS(draw(plan, 1, 0, 8), Error, "picture: batch = 1, expected 0 … 0");
  CHECK_FAILS(draw(plan, 0, 2, 8), Error, "picture: head = 2, expected 0 … 1");
  CHECK_FAILS(draw(plan, 0, 0, 0), Error, "picture: max_pixels = 0, expected >= 1");
  PairGrid small(10, 5, 20, 8);
  CHECK_FAILS(small.add(plan, 0, 0), Error,
              "picture: queries at 10 … 19 and 20 keys, expected them inside 10 … 14 and 20");
}
