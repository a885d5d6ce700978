// The cost model: what it counts is what attend counts, and more work never costs less.
#include <doctest/doctest.h>

#include "heed/exec/cost.h"
#include "heed/kernel/kernels.h"
#include "support/naive.h"

using namespace heed;
using namespace heed::test;

namespace {

const Machine machine{"avx2", 80e9, 0, 20e9};

/// Mechanisms with ranges, bands, row lists, pages, bits, derived sources and several sources in one softmax.
const std::vector<std::string> causal_calls{"dense",
                                            "streaming:sink=3,window=100",
                                            "moba:block=64,top_k=3",
                                            "moba:block=50,top_k=2,sink=5",
                                            "hip:budget=64,window=96",
                                            "power:block=32"};

bool same_counts(const AttendStats& a, const AttendStats& b) {
  return a.tiles_planned == b.tiles_planned && a.tiles_visited == b.tiles_visited &&
         a.panels_visited == b.panels_visited && a.pairs == b.pairs && a.pairs_computed == b.pairs_computed &&
         a.rows_visited == b.rows_visited && a.columns_gathered == b.columns_gathered && a.panels_read == b.panels_read;
}

void check_counts(const std::string& call, const AttendInput& in, const Sizes& s) {
  const Plan plan = plan_of(MechanismCall::parse(call), in);
  const AttendStats counted = run(plan).stats;
  CAPTURE(call);
  CAPTURE(s.N);
  CHECK(counted.pairs_computed >= counted.pairs);
  CHECK(same_counts(rehearse(plan), counted));
  const Cost cost = predict(plan, machine);
  CHECK(cost.flops == 2.0 * static_cast<double>(counted.pairs_computed * (s.D + s.Dv)));
  CHECK(cost.exponentials == static_cast<double>(counted.pairs_computed));
  const Cost after = cost_of(plan, counted, machine);
  CHECK(after.seconds == cost.seconds);
  CHECK(after.bytes == cost.bytes);
  CHECK(cost.seconds > 0);
}

Cost cost(const std::string& call, Index n, Index d = 16, const Machine& on = machine) {
  const Case c({1, 2, 1, n, n, d, d});
  return predict(plan_of(MechanismCall::parse(call), c.input(call == "dense")), on);
}

bool at_most(const Cost& a, const Cost& b) {
  return a.flops <= b.flops && a.exponentials <= b.exponentials && a.bytes <= b.bytes && a.seconds <= b.seconds;
}

}  // namespace

TEST_CASE("predicted counts are those that attending counts") {
  for (const std::string& isa : available_isas()) {
    const UseIsa use(isa);
    for (const DType arithmetic : {DType::f32, DType::bf16})
      for (const Sizes& s :
           {Sizes{1, 4, 1, 1, 1, 16, 16}, Sizes{1, 4, 2, 100, 100, 33, 16}, Sizes{2, 4, 4, 257, 257, 16, 40},
            Sizes{1, 2, 1, 1100, 1100, 16, 16}, Sizes{1, 8, 2, 1, 3000, 16, 16}, Sizes{1, 4, 1, 70, 2500, 16, 16}}) {
        const Case c(s, DType::f32, arithmetic);
        for (const std::string& call : causal_calls) check_counts(call, c.input(call == "dense"), s);
        check_counts("dense", c.input(), s);
      }
    const Case grid({1, 4, 4, 210, 210, 16, 16});
    for (const std::string call : {"natten:grid=14x15,kernel_size=5x3", "gna:grid=14x15,kernel_size=6,stride=2",
                                   "hilo:grid=14x15,alpha=0.5,window=4", "paro:grid=14x15,block=16,density=0.3"})
      check_counts(call, grid.input(), grid.size);
    Case packed({1, 2, 1, 300, 300, 16, 16});
    const std::vector<std::int32_t> docs = documents({100, 120, 80});
    AttendInput in = packed.input();
    in.extra["doc"] = {docs.data(), DType::i32, {1, 300}};
    for (const std::string call : {"streaming:sink=3,window=40", "moba:block=32,top_k=2"})
      check_counts(call, in, packed.size);
  }
}

TEST_CASE("a plan small enough to count by hand") {
  // 64 rows on one panel: two sub-blocks, one fetch of the panel.
  const Case c({1, 2, 2, 64, 64, 16, 16});
  const Plan plan = plan_of(MechanismCall::parse("dense"), c.input());
  const AttendStats counted = rehearse(plan);
  CHECK(counted.pairs == 2 * 64 * 64);
  CHECK(counted.pairs_computed == 2 * 64 * 64);
  CHECK(counted.panels_visited == 2 * 2);
  CHECK(counted.rows_visited == 2 * 64);
  CHECK(counted.panels_read == 2);
  CHECK(counted.columns_gathered == 0);
  const Cost cost = predict(plan, machine);
  CHECK(cost.flops == 2.0 * 64 * 64 * 2 * 32);
  CHECK(cost.exponentials == 2.0 * 64 * 64);
  CHECK(cost.bytes == 2.0 * (64 * 32 * 4 + 64 * (16 * 4 + 16 * 4 + 4)));
}

TEST_CASE("listed columns are counted where they are packed") {
  const Case c({1, 1, 1, 300, 300, 16, 16});
  Plan plan = plan_of(MechanismCall::parse("dense"), c.input());
  std::vector<std::int32_t> list;
  for (std::int32_t j = 0; j < 300; j += 3) list.push_back(j);
  plan.emit = [&](const RowBlock& rows, Tiles& tiles) {
    tiles.add(Set::range(0, rows.rows), Set::list(list), Mask::full());
  };
  const AttendStats counted = run(plan).stats;
  CHECK(same_counts(rehearse(plan), counted));
  CHECK(counted.columns_gathered == 2 * 100);  // by each of two row blocks
  CHECK(counted.panels_read == 2 * 2);
  // The same columns as a range are cheaper.
  const double listed = predict(plan, machine).seconds;
  plan.emit = [&](const RowBlock& rows, Tiles& tiles) {
    tiles.add(Set::range(0, rows.rows), Set::range(0, 100), Mask::full());
  };
  CHECK(predict(plan, machine).seconds < listed);
}

TEST_CASE("more work never costs less") {
  for (const std::string& call : causal_calls) {
    Cost before;
    for (const Index n : {1, 2, 63, 64, 65, 255, 256, 257, 300, 511, 700, 1024, 1025, 1500}) {
      const Cost now = cost(call, n);
      CAPTURE(call);
      CAPTURE(n);
      CHECK(at_most(before, now));
      before = now;
    }
  }
  Cost before;
  for (const Index top_k : {1, 2, 3, 5, 8, 20}) {
    const Cost now = cost(fmt::format("moba:block=64,top_k={}", top_k), 1000);
    CHECK(at_most(before, now));
    before = now;
  }
  before = {};
  for (const Index window : {1, 20, 64, 200, 500, 1000}) {
    const Cost now = cost(fmt::format("streaming:window={}", window), 1000);
    CHECK(at_most(before, now));
    before = now;
  }
  before = {};
  for (const Index d : {16, 17, 32, 64, 128, 256}) {
    const Cost now = cost("dense", 300, d);
    CHECK(at_most(before, now));
    before = now;
  }
}

TEST_CASE("slower machines take longer, and memory is the bound when it is slow") {
  const double base = cost("dense", 500).seconds;
  CHECK(cost("dense", 500, 16, {"avx2", 40e9, 0, 20e9}).seconds == doctest::Approx(2 * base));
  const Cost slow = cost("dense", 500, 16, {"avx2", 80e9, 0, 1e6});
  CHECK(slow.seconds == doctest::Approx(slow.bytes / 1e6));
  CHECK(cost("dense", 500, 16, {"avx2", 80e9, 0, 0}).seconds == doctest::Approx(base));
  for (const std::string isa : {"portable", "avx2", "avx512", "avx512_bf16", "amx"})
    CHECK(cost("dense", 500, 16, {isa, 80e9, 0, 0}).seconds > 0);
  CHECK_FAILS(cost("dense", 10, 16, {"avx2", 0, 0, 0}), Error, "machine: f32_flops = 0, expected > 0");
  CHECK_FAILS(cost("dense", 10, 16, {"sse9", 1, 0, 0}), Error,
              "machine: isa = sse9, expected portable, avx2, avx512, avx512_bf16 or amx");
}
