// Gradients of mechanisms by name.
#include <doctest/doctest.h>

#include <cmath>
#include <string>
#include <vector>

#include "heed/kernel/kernels.h"
#include "support/gradients.h"

using namespace heed;
using namespace heed::test;

TEST_CASE("element types and layouts of inputs and gradients") {
  for (const DType dtype : {DType::f32, DType::f16, DType::bf16})
    for (const Layout layout : {Layout::packed, Layout::tokens, Layout::scattered, Layout::reversed}) {
      const Sizes s{2, 4, 2, 50, 81, 16, 24};
      const Case c(s, dtype, DType::f32, layout);
      const Sample dout = random_dout(s, dtype, layout);
      check_gradients(c, gradients("dense", c.input(true), dout),
                      naive_gradients(c, met_keys(c, dense_sees(c, true)), dout));
    }
}

TEST_CASE("selections made elsewhere: streaming, power and moba by their definitions") {
  for (const std::string& isa : available_isas()) {
    const UseIsa use(isa);
    for (const DType arithmetic : {DType::f32, DType::bf16}) {
      const Case c({1, 4, 2, 200, 261, 32, 16}, DType::f32, arithmetic);
      const Sample dout = random_dout(c.size);
      const auto compare = [&](const char* call, const Sees& sees) {
        CAPTURE(call);
        check_gradients(c, gradients(call, c.input(true), dout), naive_gradients(c, met_keys(c, sees), dout));
      };
      compare("streaming:sink=5,window=40", streaming_sees(c, 5, 40));
      compare("power:block=16,window_blocks=2,sink_blocks=1", power_sees(c, 16, 2, 1));
      const MobaChoice moba = moba_sees(c, {.block = 16, .top_k = 3});
      CHECK(std::count(moba.undecided.begin(), moba.undecided.end(), 1) == 0);
      compare("moba:block=16,top_k=3", moba.sees);
    }
  }
}

TEST_CASE("every mechanism's gradient is that of the pairs that its plan names") {
  const std::vector<std::string> causal{"dense",
                                        "moba:block=16,top_k=3",
                                        "flash-moba:block=16,top_k=3",
                                        "hip:budget=32,query_block=16,window=32,sink=4",
                                        "s2:block=16,local_blocks=2,stride_blocks=2",
                                        "power:block=16,window_blocks=2",
                                        "moa:block=16,sink=16,min_span=32",
                                        "psa:query_block=32,block=16",
                                        "blockrank:segment=40",
                                        "dhsa:budget=32,query_block=32,half_window=2,nms_radius=2,global=16,local=16,"
                                        "dense_tail=16",
                                        "proxy-attn:min_budget=32,block=16,mass=0.6",
                                        "pbs-attn:block=16,segment=32,mass=0.4",
                                        "natten:kernel_size=21"};
  const std::vector<std::string> both_ways{"psa:query_block=32,block=16",
                                           "psa:query_block=32,block=16,mode=threshold,ratios=1:.3,2:.6,4:.8,8:1",
                                           "vmoba:chunk=16,mass=0.3",
                                           "llsa:block=4,top_k=3,levels=2",
                                           "llsa:block=4,top_k=3,levels=2,dedupe=true,reweight=false",
                                           "natten:grid=12x16,kernel_size=5x7,dilation=2x1",
                                           "gna:grid=12x16,kernel_size=4x8,stride=2x4",
                                           "hilo:grid=12x16,alpha=0.5,window=3",
                                           "hilo:grid=12x16,window=1",
                                           "paro:grid=4x6x8,block=16,density=0.4",
                                           "biformer:grid=12x16,regions=4,top_k=3",
                                           "davit:kind=window,grid=12x16,window=5"};
  const auto compare = [](const std::string& call, const Sizes& s, bool is_causal, DType arithmetic) {
    CAPTURE(call);
    CAPTURE(is_causal);
    const Case c(s, DType::f32, arithmetic);
    const Sample dout = random_dout(s);
    const AttendInput in = c.input(is_causal);
    const Plan plan = plan_of(MechanismCall::parse(call), in);
    const ForwardBackward got = forward_backward(call, in, dout);
    check_gradients(c, got.gradients, naive_gradients(c, met_by_plan(plan), dout));
    CHECK(got.gradients.stats.pairs == got.out.stats.pairs);
    CHECK(got.gradients.stats.tiles_visited == got.out.stats.tiles_visited);
  };
  for (const std::string& call : causal) compare(call, {1, 4, 2, 192, 192, 16, 24}, true, DType::f32);
  for (const std::string& call : both_ways)
    compare(call, {1, 4, call[0] == 'h' ? 4 : 2, 192, 192, 16, 16}, false, DType::f32);
  // Batches, and rounded means and copies.
  for (const char* call : {"psa:query_block=32,block=16", "llsa:block=4,top_k=3,levels=2", "natten:kernel_size=21",
                           "paro:grid=4x5x6,block=16,density=0.4"})
    compare(call, {2, 4, 2, 120, 120, 16, 16}, false, DType::bf16);
}

TEST_CASE("dense by name gives the gradient of its bias, and nothing for pairs that -inf hides") {
  const Case c({2, 4, 2, 70, 130, 16, 16});
  const Sample noise(DType::f32, 1, 4, 70, 130, Layout::packed, 8), dout = random_dout(c.size);
  std::vector<float> bias(4 * 70 * 130);
  for (size_t i = 0; i < bias.size(); ++i)
    bias[i] = i % 3 == 1 ? -INFINITY : static_cast<const float*>(noise.view().data)[i];
  AttendInput in = c.input(true);
  in.extra["bias"] = {bias.data(), DType::f32, {1, 4, 70, 130}};
  const AttendGradients got = gradients("dense", in, dout);
  GradientOptions options;
  options.bias = &noise, options.bias_heads = 4;
  const Gradients want = naive_gradients(
      c,
      met_keys(c, [&](Index, Index h, Index t, Index j) { return j <= 60 + t && ((h * 70 + t) * 130 + j) % 3 != 1; }),
      dout, options);
  check_gradients(c, got, want);
  CHECK(got.extra.size() == 1);
  CHECK_GRADIENT("dbias", got.extra.at("bias"), want.dbias, gradient_tolerance(DType::f32));
  CHECK(gradients("dense", c.input(true), dout).extra.empty());
}

TEST_CASE("keys beside the input's have gradients of their own") {
  const Case c({2, 4, 2, 48, 48, 16, 24});
  const Sample k(DType::f32, 2, 2, 5, 16, Layout::packed, 21), v(DType::f32, 2, 2, 5, 24, Layout::packed, 22);
  const Sample dout = random_dout(c.size);
  AttendInput in = c.input(false);
  in.extra["k_extra"] = k.view(), in.extra["v_extra"] = v.view();
  for (const char* call : {"natten:grid=6x8,kernel_size=3x5", "gna:grid=6x8,kernel_size=4x4,stride=2x4"}) {
    GradientOptions options;
    options.other_k = &k, options.other_v = &v;
    const Gradients want = naive_gradients(c, met_by_plan(plan_of(MechanismCall::parse(call), in)), dout, options);
    const AttendGradients got = gradients(call, in, dout);
    check_gradients(c, got, want);
    CHECK_GRADIENT("dk_extra", got.extra.at("k_extra"), want.dother_k, gradient_tolerance(DType::f32));
    CHECK_GRADIENT("dv_extra", got.extra.at("v_extra"), want.dother_v, gradient_tolerance(DType::f32));
  }
}

namespace {

// Landmark attention, block + 1 positions a block, from the grouped softmax: within an earlier block tokens share
// what its landmark wins.
Gradients naive_landmark(const Case& c, Index block, const Sample& dout) {
  const auto& s = c.size;
  const double scale = 1 / std::sqrt(static_cast<double>(s.D));
  const auto zeros = [](Index n) { return std::vector<double>(static_cast<size_t>(n), 0.0); };
  Gradients g;
  g.dq = zeros(s.B * s.Hq * s.N * s.D), g.dk = zeros(s.B * s.Hk * s.M * s.D), g.dv = zeros(s.B * s.Hk * s.M * s.Dv);
  for (Index b = 0; b < s.B; ++b)
    for (Index h = 0; h < s.Hq; ++h)
      for (Index t = 0; t < s.N; ++t) {
        const Index kv = c.kv_head(h), p = position(c, t), own = p / (block + 1) * (block + 1);
        const auto count = static_cast<size_t>(p + 1);
        std::vector<double> e(count), dp(count), weight(count), ds(count);
        for (Index j = 0; j <= p; ++j) {
          double x = 0;
          for (Index d = 0; d < s.D; ++d) x += c.q_at(b, h, t, d) * c.k_at(b, kv, j, d);
          e[static_cast<size_t>(j)] = std::exp(x * scale);
          for (Index i = 0; i < s.Dv; ++i) dp[static_cast<size_t>(j)] += dout.get(b, h, t, i) * c.v_at(b, kv, j, i);
        }
        const auto landmark = [&](Index j) { return j % (block + 1) == block; };
        double sum = 0, delta = 0;
        for (Index j = 0; j <= p; ++j)
          if (j >= own ? !landmark(j) : landmark(j)) sum += e[static_cast<size_t>(j)];
        // Of each earlier block: the sum of its tokens, and the mean of dp over them.
        std::vector<double> tokens(count), mean(count);
        for (Index j = 0; j < own; ++j)
          if (!landmark(j)) {
            const auto group = static_cast<size_t>(j / (block + 1));
            tokens[group] += e[static_cast<size_t>(j)];
            mean[group] += e[static_cast<size_t>(j)] * dp[static_cast<size_t>(j)];
          }
        const auto gate = [&](Index j) { return static_cast<size_t>(j / (block + 1) * (block + 1) + block); };
        for (Index j = 0; j <= p; ++j) {
          const auto i = static_cast<size_t>(j), group = static_cast<size_t>(j / (block + 1));
          if (landmark(j)) continue;
          weight[i] = j >= own ? e[i] / sum : e[i] / tokens[group] * e[gate(j)] / sum;
          delta += weight[i] * dp[i];
        }
        for (Index j = 0; j <= p; ++j) {
          const auto i = static_cast<size_t>(j), group = static_cast<size_t>(j / (block + 1));
          if (j >= own) ds[i] = weight[i] * (dp[i] - delta);
          else if (landmark(j)) ds[i] = e[i] / sum * (mean[group] / tokens[group] - delta);
          else ds[i] = weight[i] * (dp[i] - mean[group] / tokens[group]);
          for (Index d = 0; d < s.D; ++d) {
            g.dq[static_cast<size_t>(((b * s.Hq + h) * s.N + t) * s.D + d)] += scale * ds[i] * c.k_at(b, kv, j, d);
            g.dk[static_cast<size_t>(((b * s.Hk + kv) * s.M + j) * s.D + d)] += scale * ds[i] * c.q_at(b, h, t, d);
          }
          for (Index v = 0; v < s.Dv; ++v)
            g.dv[static_cast<size_t>(((b * s.Hk + kv) * s.M + j) * s.Dv + v)] += weight[i] * dout.get(b, h, t, v);
        }
      }
  return g;
}

}  // namespace

TEST_CASE("landmark's gradients go through both levels of its softmax") {
  for (const std::string& isa : available_isas()) {
    const UseIsa use(isa);
    for (const DType arithmetic : {DType::f32, DType::bf16})
      for (const Sizes& s :
           {Sizes{1, 4, 2, 90, 151, 24, 16}, Sizes{2, 1, 1, 130, 130, 16, 40}, Sizes{1, 1, 1, 1, 9, 16, 16}})
        for (const Index block : {3, 16, 50, 127}) {
          const Case c(s, DType::f32, arithmetic);
          const Sample dout = random_dout(s);
          CAPTURE(block);
          const std::string all = "landmark:block=" + std::to_string(block);
          const Gradients want = naive_landmark(c, block, dout);
          check_gradients(c, gradients(all, c.input(true), dout), want);
          // More blocks than there are: retrieved one by one, the same result.
          check_gradients(c, gradients(all + ",top_k=99", c.input(true), dout), want);
        }
  }
}

TEST_CASE("the same bits for any number of threads") {
  for (const std::string& isa : available_isas()) {
    const UseIsa use(isa);
    const Case c({1, 4, 2, 700, 700, 32, 32});
    const Sample dout = random_dout(c.size), bias(DType::f32, 1, 1, 700, 700, Layout::packed, 3);
    for (const std::string call : {"dense", "moba:block=32,top_k=4", "psa:query_block=32,block=16", "dense+bias"}) {
      AttendInput in = c.input(true);
      if (call == "dense+bias") in.extra["bias"] = bias.view();
      AttendGradients first;
      for (const int n : {1, 2, 3}) {
        const UseThreads threads(n);
        AttendGradients got = gradients(call.substr(0, call.find('+')), in, dout);
        if (n == 1) {
          first = std::move(got);
          continue;
        }
        CHECK(same_bits(got, first));
        if (in.extra.contains("bias")) CHECK(same_bits(got.extra.at("bias"), first.extra.at("bias")));
      }
    }
  }
}

TEST_CASE("what cannot be done is refused in one line") {
  const Case c({1, 2, 1, 20, 20, 16, 8});
  const Sample dout = random_dout(c.size), wide(DType::f32, 1, 2, 20, 9, Layout::packed, 1);
  CHECK_FAILS(gradients("dense", c.input(), wide), Error, "do: shape = [1, 2, 20, 9], expected [1, 2, 20, 8], as o is");
  const Tensor wide_o(DType::f32, {1, 2, 20, 9}), all_lse(DType::f32, {1, 2, 20});
  CHECK_FAILS(attend_backward(MechanismCall::parse("dense"), c.input(), dout.view(), wide_o.view(), all_lse.view()),
              Error, "o: shape = [1, 2, 20, 9], expected [1, 2, 20, 8]");
  Sample broken = dout;
  broken.set(0, 1, 3, 2, NAN);
  CHECK_FAILS(gradients("dense", c.input(), broken), Error, "do: holds nan, expected finite values");
  const Plan plan = plan_of(MechanismCall::parse("dense"), c.input());
  const Tensor o(DType::f32, {1, 2, 20, 8}), lse(DType::f32, {1, 2, 19});
  CHECK_FAILS(attend_backward(plan, o.view(), lse.view(), dout.view()), Error,
              "lse: shape = [1, 2, 19], expected [1, 2, 20]");
}
