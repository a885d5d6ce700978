// dense and streaming against their equations, and what all mechanisms share: element types,
// strides, scale, score rules, row blocks, errors.
#include <doctest/doctest.h>

#include <cmath>
#include <limits>

#include "heed/kernel/kernels.h"
#include "support/naive.h"

using namespace heed;
using namespace heed::test;

namespace {

constexpr float inf = std::numeric_limits<float>::infinity();

TensorView ids(const std::vector<std::int32_t>& x, Index b, Index m) { return {x.data(), DType::i32, {b, m}}; }
TensorView flags(const std::vector<std::uint8_t>& x, Index b, Index m) { return {x.data(), DType::u8, {b, m}}; }

std::vector<Sizes> awkward_sizes() {
  return {
      {1, 1, 1, 1, 1, 16, 16},     {1, 1, 1, 1, 300, 64, 64},    {2, 4, 1, 3, 67, 33, 17},
      {1, 2, 2, 63, 63, 1, 5},     {1, 2, 1, 65, 65, 7, 64},     {2, 8, 1, 40, 129, 80, 1},
      {1, 1, 1, 257, 257, 64, 80}, {1, 4, 4, 31, 200, 128, 128}, {1, 1, 1, 20, 90, 256, 256},
      {1, 2, 1, 17, 70, 512, 33},
  };
}

void check_dense(const Case& c) {
  for (const bool causal : {false, true}) {
    CAPTURE(causal);
    const Got got = run("dense", c.input(causal));
    const Naive want = naive_attention(c, dense_sees(c, causal));
    CHECK_AGREES(got, want, c);
    CHECK(got.stats.pairs == want.pairs);
  }
}

}  // namespace

TEST_CASE("dense equals its definition for awkward sizes") {
  for (const std::string& isa : available_isas()) {
    const UseIsa use(isa);
    REQUIRE(std::string(kernels().name) == isa);
    for (const Sizes& s : awkward_sizes())
      for (const DType arithmetic : {DType::f32, DType::bf16}) check_dense(Case(s, DType::f32, arithmetic));
  }
}

TEST_CASE("dense reads every element type and any strides") {
  for (const std::string& isa : available_isas()) {
    const UseIsa use(isa);
    const Sizes s{2, 4, 2, 37, 83, 40, 24};
    for (const DType element : {DType::f32, DType::f16, DType::bf16})
      for (const DType arithmetic : {DType::f32, DType::bf16})
        for (const Layout layout : {Layout::packed, Layout::tokens, Layout::scattered, Layout::reversed})
          check_dense(Case(s, element, arithmetic, layout, 7));
  }
}

TEST_CASE("dense over several row blocks and many panels") {
  for (const std::string& isa : available_isas()) {
    const UseIsa use(isa);
    check_dense(Case({1, 2, 1, 700, 700, 24, 16}));
    check_dense(Case({1, 2, 1, 450, 1500, 16, 16}, DType::f32, DType::bf16));
    check_dense(Case({1, 1, 1, 1500, 1500, 8, 8}, DType::bf16));
  }
}

TEST_CASE("dense keeps its digits with large scores") {
  // Scores up to about ± 400: every exponential but a few underflows, and the maximum keeps moving.
  for (const std::string& isa : available_isas()) {
    const UseIsa use(isa);
    Case c({1, 2, 1, 50, 600, 64, 32}, DType::f32, DType::f32, Layout::packed, 3);
    AttendInput in = c.input(true);
    in.scale = 2.0f;  // f32 rounding of the scores themselves is then near 1e-5
    // Rising scores along the keys, so that each chunk of columns brings a new maximum.
    for (Index j = 0; j < c.size.M; ++j)
      for (Index d = 0; d < c.size.D; ++d) c.k.set(0, 0, j, d, c.k.get(0, 0, j, d) * static_cast<double>(j) / 600);
    const Naive want = naive_attention(c, dense_sees(c, true), {.scale = 2});
    const Got got = run("dense", in);
    CHECK_MESSAGE(difference(got, want, c, 2e-4).empty(), difference(got, want, c, 2e-4));
  }
}

TEST_CASE("equal keys give the mean of the values and log n") {
  for (const std::string& isa : available_isas()) {
    const UseIsa use(isa);
    Case c({1, 1, 1, 130, 130, 16, 3});
    for (Index j = 0; j < 130; ++j)
      for (Index d = 0; d < 16; ++d) c.k.set(0, 0, j, d, 0);
    const Got got = run("dense", c.input(true));
    double sum = 0;
    for (Index t = 0; t < 130; ++t) {
      sum += c.v.get(0, 0, t, 1);
      CHECK(got.lse[static_cast<size_t>(t)] == doctest::Approx(std::log(t + 1.0)).epsilon(1e-5));
      CHECK(std::fabs(got.o[static_cast<size_t>(3 * t + 1)] - sum / (t + 1.0)) < 2e-5);
    }
  }
}

TEST_CASE("scale is set by the caller") {
  const Case c({1, 2, 2, 33, 70, 48, 16});
  AttendInput in = c.input(true);
  in.scale = 0.31f;
  CHECK_AGREES(run("dense", in), naive_attention(c, dense_sees(c, true), {.scale = 0.31f}), c);
  in.scale = -0.2f;
  CHECK_AGREES(run("dense", in), naive_attention(c, dense_sees(c, true), {.scale = -0.2f}), c);
}

TEST_CASE("dense adds a bias, -inf included, broadcast over batches and heads") {
  for (const std::string& isa : available_isas()) {
    const UseIsa use(isa);
    for (const DType arithmetic : {DType::f32, DType::bf16}) {
      const Sizes s{2, 4, 2, 30, 150, 20, 20};
      const Case c(s, DType::f32, arithmetic);
      for (const Index biases : {Index{1}, Index{2}})
        for (const Index bias_heads : {Index{1}, Index{4}}) {
          std::vector<float> bias(static_cast<size_t>(biases * bias_heads * s.N * s.M));
          const Sample noise(DType::f32, biases, bias_heads, s.N, s.M, Layout::packed, 99);
          const auto at = [&](Index b, Index h, Index t, Index j) -> float& {
            const Index i = biases == 1 ? 0 : b, l = bias_heads == 1 ? 0 : h;
            return bias[static_cast<size_t>(((i * bias_heads + l) * s.N + t) * s.M + j)];
          };
          for (Index b = 0; b < biases; ++b)
            for (Index h = 0; h < bias_heads; ++h)
              for (Index t = 0; t < s.N; ++t)
                for (Index j = 0; j < s.M; ++j)
                  // Row 5 sees nothing; elsewhere a third of the pairs is away.
                  at(b, h, t, j) =
                      t == 5 || (t + 2 * j + h) % 3 == 0 ? -inf : static_cast<float>(noise.get(b, h, t, j));
          for (const bool causal : {false, true}) {
            AttendInput in = c.input(causal);
            in.extra["bias"] = {bias.data(), DType::f32, {biases, bias_heads, s.N, s.M}};
            NaiveOptions options;
            options.change = [&](Index b, Index h, Index t, Index j, double x) { return x + at(b, h, t, j); };
            CHECK_AGREES(run("dense", in), naive_attention(c, dense_sees(c, causal), options), c);
          }
        }
    }
  }
}

TEST_CASE("dense leaves out masked keys and other documents") {
  for (const std::string& isa : available_isas()) {
    const UseIsa use(isa);
    const Sizes s{2, 2, 1, 150, 331, 24, 24};
    const Case c(s);
    std::vector<std::uint8_t> mask(static_cast<size_t>(s.B * s.M));
    for (Index b = 0; b < s.B; ++b)
      for (Index j = 0; j < s.M; ++j)
        // Batch 0: holes, and a whole panel away; batch 1: nothing before key 200, so early rows are empty.
        mask[static_cast<size_t>(b * s.M + j)] = b == 0 ? (j % 5 != 2 && (j < 64 || j >= 130)) : j >= 200;
    Docs docs = documents({1, 66, 190, 74});
    const Docs second = documents({200, 3, 128});
    docs.insert(docs.end(), second.begin(), second.end());
    for (const bool causal : {false, true})
      for (const bool with_mask : {false, true})
        for (const bool with_docs : {false, true}) {
          CAPTURE(causal);
          CAPTURE(with_mask);
          CAPTURE(with_docs);
          AttendInput in = c.input(causal);
          if (with_mask) in.extra["key_mask"] = flags(mask, s.B, s.M);
          if (with_docs) in.extra["doc"] = ids(docs, s.B, s.M);
          const Sees sees = [&](Index b, Index, Index t, Index j) {
            if (with_mask && mask[static_cast<size_t>(b * s.M + j)] == 0) return false;
            if (with_docs && !same_document(c, docs, b, position(c, t), j)) return false;
            return !causal || j <= position(c, t);
          };
          const Naive want = naive_attention(c, sees);
          const Got got = run("dense", in);
          CHECK_AGREES(got, want, c);
          CHECK(got.stats.pairs == want.pairs);
        }
  }
}

TEST_CASE("rows without keys give zeros and -inf") {
  const Case c({1, 2, 1, 5, 90, 16, 8});
  const std::vector<std::uint8_t> nothing(90, 0);
  AttendInput in = c.input(false);
  in.extra["key_mask"] = flags(nothing, 1, 90);
  const Got got = run("dense", in);
  for (const float x : got.o) CHECK(x == 0);
  for (const float x : got.lse) CHECK(x == -inf);
  CHECK(got.stats.pairs == 0);
}

TEST_CASE("streaming equals its definition") {
  for (const std::string& isa : available_isas()) {
    const UseIsa use(isa);
    for (const DType arithmetic : {DType::f32, DType::bf16})
      for (const Sizes& s :
           {Sizes{1, 1, 1, 1, 1, 16, 16}, Sizes{2, 4, 1, 201, 201, 33, 16}, Sizes{1, 2, 2, 70, 611, 16, 40},
            Sizes{1, 1, 1, 1, 130, 64, 64}, Sizes{1, 1, 1, 900, 900, 16, 16}}) {
        const Case c(s, DType::f32, arithmetic);
        for (const auto& [sink, window] :
             std::vector<std::pair<Index, Index>>{{4, 100}, {0, 1}, {70, 3}, {1, 64}, {130, 257}, {0, 65}, {4, 5000}}) {
          const std::string call = fmt::format("streaming:sink={},window={}", sink, window);
          CAPTURE(call);
          const Got got = run(call, c.input());
          const Naive want = naive_attention(c, streaming_sees(c, sink, window));
          CHECK_AGREES(got, want, c);
          CHECK(got.stats.pairs == want.pairs);
        }
      }
  }
}

TEST_CASE("streaming respects documents and masked keys") {
  const Sizes s{2, 2, 1, 180, 260, 16, 16};
  const Case c(s);
  Docs docs = documents({100, 7, 90, 63});
  const Docs second = documents({260});
  docs.insert(docs.end(), second.begin(), second.end());
  std::vector<std::uint8_t> mask(static_cast<size_t>(s.B * s.M), 1);
  for (Index j = 0; j < s.M; j += 3) mask[static_cast<size_t>(j)] = 0;
  AttendInput in = c.input(true);
  in.extra["doc"] = ids(docs, s.B, s.M);
  const Sees within = streaming_sees(c, 3, 20, docs);
  CHECK_AGREES(run("streaming:sink=3,window=20", in), naive_attention(c, within), c);
  in.extra["key_mask"] = flags(mask, s.B, s.M);
  const Sees sees = [&](Index b, Index h, Index t, Index j) {
    return mask[static_cast<size_t>(b * s.M + j)] != 0 && within(b, h, t, j);
  };
  CHECK_AGREES(run("streaming:sink=3,window=20", in), naive_attention(c, sees), c);
}

TEST_CASE("soft caps, ALiBi, sinks and bias change scores alike in every plan") {
  for (const std::string& isa : available_isas()) {
    const UseIsa use(isa);
    for (const DType arithmetic : {DType::f32, DType::bf16}) {
      const Case c({1, 4, 2, 90, 211, 32, 16}, DType::f32, arithmetic);
      const AttendInput in = c.input(true);
      const std::vector<float> slopes{0.5f, 0.25f, 0.03f, 0}, sinks{1.5f, -2, 0, 6};
      for (const std::string call : {"dense", "streaming:sink=5,window=70"}) {
        const Sees sees = call == "dense" ? dense_sees(c, true) : streaming_sees(c, 5, 70);
        CAPTURE(call);
        {
          Plan plan = plan_of(MechanismCall::parse(call), in);
          plan.rule.softcap = 2.5f;
          NaiveOptions options;
          options.change = [](Index, Index, Index, Index, double x) { return 2.5 * std::tanh(x / 2.5); };
          CHECK_AGREES(run(plan), naive_attention(c, sees, options), c);
        }
        {
          Plan plan = plan_of(MechanismCall::parse(call), in);
          plan.rule.alibi = slopes;
          NaiveOptions options;
          options.change = [&](Index, Index h, Index t, Index j, double x) {
            return x + slopes[static_cast<size_t>(h)] * static_cast<double>(j - position(c, t));
          };
          CHECK_AGREES(run(plan), naive_attention(c, sees, options), c);
        }
        {
          Plan plan = plan_of(MechanismCall::parse(call), in);
          plan.rule.sinks = sinks;
          NaiveOptions options;
          options.sinks.assign(sinks.begin(), sinks.end());
          CHECK_AGREES(run(plan), naive_attention(c, sees, options), c);
        }
        {
          Plan plan = plan_of(MechanismCall::parse(call), in);
          plan.rule.softcap = 1.2f;
          plan.rule.alibi = slopes;
          plan.rule.sinks = sinks;
          const Sample bias(DType::f32, 1, 1, c.size.N, c.size.M, Layout::tokens, 5);
          plan.rule.bias = bias.view();
          NaiveOptions options;
          options.sinks.assign(sinks.begin(), sinks.end());
          options.change = [&](Index, Index h, Index t, Index j, double x) {
            return 1.2f * std::tanh(x / 1.2f) +
                   slopes[static_cast<size_t>(h)] * static_cast<double>(j - position(c, t)) + bias.get(0, 0, t, j);
          };
          CHECK_AGREES(run(plan), naive_attention(c, sees, options), c);
        }
      }
    }
  }
}

TEST_CASE("outputs go where their strides say and nowhere else") {
  const Case c({2, 4, 2, 37, 50, 16, 9});
  const Plan plan = plan_of(MechanismCall::parse("dense"), c.input(true));
  const Got packed = run(plan);
  // Rows of [B, N, H, Dv] with a gap after each head.
  const Index gap = 12, row = 4 * gap, batch = 37 * row;
  std::vector<float> o(static_cast<size_t>(2 * batch), 77);
  attend(plan, {o.data(), batch, gap, row, nullptr});
  bool equal = true, untouched = true;
  for (Index b = 0; b < 2; ++b)
    for (Index h = 0; h < 4; ++h)
      for (Index t = 0; t < 37; ++t)
        for (Index e = 0; e < gap; ++e) {
          const float x = o[static_cast<size_t>(b * batch + h * gap + t * row + e)];
          if (e < 9) equal = equal && x == packed.o[static_cast<size_t>(((b * 4 + h) * 37 + t) * 9 + e)];
          else untouched = untouched && x == 77;
        }
  CHECK(equal);
  CHECK(untouched);
}

TEST_CASE("the front door gives what the plan gives") {
  const Case c({1, 4, 2, 60, 100, 16, 16});
  const AttendOutput out = attend("streaming:sink=2,window=30", c.input());
  const Got got = run("streaming:sink=2,window=30", c.input());
  CHECK(out.o.shape() == Shape{1, 4, 60, 16});
  CHECK(out.lse.shape() == Shape{1, 4, 60});
  CHECK(out.o.dtype() == DType::f32);
  CHECK(std::memcmp(out.o.data(), got.o.data(), got.o.size() * 4) == 0);
  CHECK(std::memcmp(out.lse.data(), got.lse.data(), got.lse.size() * 4) == 0);
  const Naive want = naive_attention(c, streaming_sees(c, 2, 30));
  const Naive dense = naive_attention(c, dense_sees(c, true));
  CHECK(out.stats.pairs == want.pairs);
  CHECK(out.density ==
        doctest::Approx(static_cast<double>(want.pairs) / static_cast<double>(dense.pairs)).epsilon(1e-12));
  CHECK(attend("dense", c.input(true)).density == 1.0);
  CHECK(attend("dense", c.input(false)).density == 1.0);
}

TEST_CASE("the same bits for any number of threads") {
  for (const std::string& isa : available_isas()) {
    const UseIsa use(isa);
    for (const DType arithmetic : {DType::f32, DType::bf16})
      for (const Sizes& s :
           {Sizes{2, 4, 2, 333, 333, 32, 32}, Sizes{1, 8, 2, 1, 1300, 64, 64}, Sizes{1, 2, 1, 40, 900, 16, 16}})
        for (const std::string call : {"dense", "streaming:sink=4,window=80"}) {
          const Case c(s, DType::f32, arithmetic);
          Got first;
          for (const int n : {1, 2, 3}) {
            const UseThreads threads(n);
            const Got got = run(call, c.input(true));
            if (n == 1) first = got;
            CHECK(same_bits(got.o, first.o));
            CHECK(same_bits(got.lse, first.lse));
            CHECK(got.stats.pairs == first.stats.pairs);
          }
        }
  }
}

TEST_CASE("no output depends on a later token") {
  for (const std::string& isa : available_isas()) {
    const UseIsa use(isa);
    for (const std::string call : {"dense", "streaming:sink=4,window=50"})
      for (const DType arithmetic : {DType::f32, DType::bf16}) {
        const Sizes s{1, 2, 1, 310, 350, 16, 16};
        const Case c(s, DType::f32, arithmetic);
        const Got before = run(call, c.input(true));
        for (const Index t : {0, 63, 100, 255, 308}) {
          Case changed = c;
          for (Index later = t + 1; later < s.N; ++later)
            for (Index h = 0; h < 2; ++h) changed.q.set(0, h, later, 3, 9);
          for (Index j = position(c, t) + 1; j < s.M; ++j) {
            changed.k.set(0, 0, j, 5, 30);
            changed.v.set(0, 0, j, 5, -1000);
          }
          const Got after = run(call, changed.input(true));
          Index differing = 0;
          for (Index h = 0; h < 2; ++h)
            for (Index i = 0; i <= t; ++i) {
              const size_t row = static_cast<size_t>(h * s.N + i);
              differing +=
                  std::memcmp(&before.o[row * 16], &after.o[row * 16], 64) != 0 || before.lse[row] != after.lse[row];
            }
          CHECK_MESSAGE(differing == 0, c.describe(), ": ", call, ", ", differing, " rows at or before ", t,
                        " changed");
        }
      }
  }
}
