// gated-attention against its equations: a gate on the output, the values, the keys or the queries of dense attention.
#include <doctest/doctest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>

#include "heed/kernel/kernels.h"
#include "support/differences.h"
#include "support/gradients.h"

using namespace heed;
using namespace heed::test;

namespace {

struct Gating {
  std::string position = "g1", mode = "multiplicative", activation = "sigmoid";
  bool headwise = false;
  std::string call() const {
    return fmt::format("gated-attention:position={},mode={},activation={}", position, mode, activation);
  }
  double open(double s) const {
    const double sigmoid = 1 / (1 + std::exp(-s));
    if (activation == "sigmoid") return sigmoid;
    if (activation == "silu") return s * sigmoid;
    if (activation == "identity") return s;
    return 0.5 + sigmoid / 2;
  }
  double pass(double x, double s) const { return mode == "additive" ? x + open(s) : x * open(s); }
};

std::vector<Gating> all_gatings() {
  std::vector<Gating> all;
  for (const char* position : {"g1", "g2", "g3", "g4"})
    for (const char* mode : {"multiplicative", "additive"})
      for (const char* activation : {"sigmoid", "silu", "identity", "ns-sigmoid"})
        for (const bool headwise : {false, true}) all.push_back({position, mode, activation, headwise});
  return all;
}

Sample logits(const Sizes& s, const Gating& g, DType type = DType::f32, Layout layout = Layout::packed) {
  const bool queries = g.position == "g1" || g.position == "g4", values = g.position == "g1" || g.position == "g2";
  return Sample(type, s.B, queries ? s.Hq : s.Hk, queries ? s.N : s.M, g.headwise ? 1 : (values ? s.Dv : s.D), layout,
                31, 1.5);
}

AttendInput input_of(const Case& c, const Sample& gate, bool causal) {
  AttendInput in = c.input(causal);
  in.extra["gate"] = gate.view();
  return in;
}

double logit(const Sample& gate, Index b, Index h, Index t, Index i) {
  return gate.get(b, h, t, gate.features() == 1 ? 0 : i);
}

// The call's q, k and v behind their gates, in f32.
Case behind(const Case& c, const Gating& g, const Sample& gate) {
  Case x = c;
  const auto& s = c.size;
  const auto gated = [&](Index heads, Index tokens, Index width, auto at) {
    Sample y(DType::f32, s.B, heads, tokens, width, Layout::packed, 1);
    for (Index b = 0; b < s.B; ++b)
      for (Index h = 0; h < heads; ++h)
        for (Index t = 0; t < tokens; ++t)
          for (Index i = 0; i < width; ++i) y.set(b, h, t, i, g.pass(at(b, h, t, i), logit(gate, b, h, t, i)));
    return y;
  };
  const auto q = [&](Index b, Index h, Index t, Index i) { return c.q_at(b, h, t, i); };
  const auto k = [&](Index b, Index h, Index t, Index i) { return c.k_at(b, h, t, i); };
  const auto v = [&](Index b, Index h, Index t, Index i) { return c.v_at(b, h, t, i); };
  if (g.position == "g2") x.v = gated(s.Hk, s.M, s.Dv, v);
  if (g.position == "g3") x.k = gated(s.Hk, s.M, s.D, k);
  if (g.position == "g4") x.q = gated(s.Hq, s.N, s.D, q);
  return x;
}

// The equations in f64, row by row.
Naive naive_gated(const Case& c, const Gating& g, const Sample& gate, bool causal) {
  const auto& s = c.size;
  // What passes its gate, if that stands at `position`: [B, heads, tokens, width].
  const auto passed = [&](const char* position, Index heads, Index tokens, Index width, auto at) {
    std::vector<double> all;
    for (Index b = 0; b < s.B; ++b)
      for (Index h = 0; h < heads; ++h)
        for (Index t = 0; t < tokens; ++t)
          for (Index i = 0; i < width; ++i) {
            double x = at(b, h, t, i);
            if (g.position == position) {
              x = g.pass(x, logit(gate, b, h, t, i));
              if (c.arithmetic == DType::bf16) x = nearest_bf16(x);
            }
            all.push_back(x);
          }
    return all;
  };
  const auto q = passed("g4", s.Hq, s.N, s.D, [&](auto... at) { return c.q_at(at...); });
  const auto k = passed("g3", s.Hk, s.M, s.D, [&](auto... at) { return c.k_at(at...); });
  const auto v = passed("g2", s.Hk, s.M, s.Dv, [&](auto... at) { return c.v_at(at...); });
  Naive n;
  for (Index b = 0; b < s.B; ++b)
    for (Index h = 0; h < s.Hq; ++h)
      for (Index t = 0; t < s.N; ++t) {
        const Index kv = b * s.Hk + c.kv_head(h), seen = causal ? position(c, t) + 1 : s.M;
        const double* row = q.data() + ((b * s.Hq + h) * s.N + t) * s.D;
        std::vector<double> score, o(static_cast<size_t>(s.Dv));
        for (Index j = 0; j < seen; ++j) {
          double dot = 0;
          for (Index i = 0; i < s.D; ++i) dot += row[i] * k[static_cast<size_t>((kv * s.M + j) * s.D + i)];
          score.push_back(dot / std::sqrt(static_cast<double>(s.D)));
        }
        const double top = *std::max_element(score.begin(), score.end());
        double sum = 0;
        for (const double x : score) sum += std::exp(x - top);
        for (Index j = 0; j < seen; ++j) {
          const double weight = std::exp(score[static_cast<size_t>(j)] - top) / sum;
          for (Index e = 0; e < s.Dv; ++e)
            o[static_cast<size_t>(e)] += weight * v[static_cast<size_t>((kv * s.M + j) * s.Dv + e)];
        }
        for (Index e = 0; e < s.Dv; ++e) {
          const double x = o[static_cast<size_t>(e)];
          n.o.push_back(g.position == "g1" ? g.pass(x, logit(gate, b, h, t, e)) : x);
        }
        n.lse.push_back(top + std::log(sum)), n.pairs += seen;
      }
  return n;
}

Got attended(const std::string& call, const AttendInput& in) {
  const AttendOutput out = attend(call, in);
  Got got;
  got.o.assign(out.o.as<float>(), out.o.as<float>() + out.o.size());
  got.lse.assign(out.lse.as<float>(), out.lse.as<float>() + out.lse.size());
  got.stats = out.stats;
  return got;
}

void check_gated(const Case& c, const Gating& g, const Sample& gate, bool causal) {
  const std::string call = g.call();
  CAPTURE(call);
  CAPTURE(g.headwise);
  const Naive want = naive_gated(c, g, gate, causal);
  const Got got = attended(call, input_of(c, gate, causal));
  CHECK_AGREES(got, want, c);
  CHECK(got.stats.pairs == want.pairs);
}

}  // namespace

TEST_CASE("every gate equals its equation") {
  for (const std::string& isa : available_isas()) {
    const UseIsa use(isa);
    for (const Gating& g : all_gatings())
      for (const DType arithmetic : {DType::f32, DType::bf16}) {
        const Case c({2, 4, 2, 37, 70, 17, 24}, DType::f32, arithmetic);
        for (const bool causal : {false, true}) check_gated(c, g, logits(c.size, g), causal);
      }
  }
}

TEST_CASE("awkward sizes, element types and layouts") {
  for (const char* position : {"g1", "g2", "g3", "g4"})
    for (const bool headwise : {false, true}) {
      const Gating g{position, "multiplicative", "sigmoid", headwise};
      for (const Sizes& s :
           {Sizes{1, 1, 1, 1, 1, 16, 16}, Sizes{1, 4, 1, 1, 300, 33, 7}, Sizes{1, 8, 1, 65, 65, 16, 40},
            Sizes{3, 8, 8, 5, 131, 8, 130}, Sizes{1, 8, 2, 257, 257, 64, 64}})
        for (const DType type : {DType::f32, DType::f16, DType::bf16}) {
          const Case c(s, type, type == DType::bf16 ? DType::bf16 : DType::f32);
          check_gated(c, g, logits(s, g, type), true);
        }
      for (const Layout layout : {Layout::tokens, Layout::scattered, Layout::reversed}) {
        const Case c({2, 4, 2, 30, 41, 16, 24}, DType::f32, DType::f32, layout);
        check_gated(c, g, logits(c.size, g, DType::f32, layout), false);
      }
    }
}

TEST_CASE("open gates leave dense attention, closed NS-sigmoids half of it, equal columns are one number") {
  const Case c({1, 8, 2, 50, 90, 16, 24});
  const Got dense = attended("dense", c.input(true));
  for (const char* position : {"g1", "g2", "g3", "g4"}) {
    CAPTURE(position);
    const auto filled = [&](const Gating& g, double s) {
      Sample gate = logits(c.size, g);
      const Shape shape = gate.view().shape;
      for (Index b = 0; b < shape[0]; ++b)
        for (Index h = 0; h < shape[1]; ++h)
          for (Index t = 0; t < shape[2]; ++t)
            for (Index i = 0; i < shape[3]; ++i) gate.set(b, h, t, i, s);
      return gate;
    };
    for (const char* activation : {"sigmoid", "ns-sigmoid"}) {
      const Gating g{position, "multiplicative", activation, false};
      const Got open = attended(g.call(), input_of(c, filled(g, 3e38), true));
      CHECK(same_bits(open.o, dense.o));
      CHECK(same_bits(open.lse, dense.lse));
    }
    const Gating half{position, "multiplicative", "ns-sigmoid", false};
    const Got closed = attended(half.call(), input_of(c, filled(half, -3e38), true));
    if (half.position == "g1" || half.position == "g2")
      for (size_t i = 0; i < dense.o.size(); ++i) CHECK(std::fabs(closed.o[i] - dense.o[i] / 2) <= 1e-6f);
    // Closed sigmoids: no output, no value, or scores of zero.
    const Gating shut{position, "multiplicative", "sigmoid", false};
    const Got nothing = attended(shut.call(), input_of(c, filled(shut, -3e38), true));
    if (shut.position == "g1" || shut.position == "g2")
      for (const float x : nothing.o) CHECK(x == 0.0f);
    else
      for (Index t = 0; t < 50; ++t)
        CHECK(nothing.lse[static_cast<size_t>(t)] == doctest::Approx(std::log(static_cast<double>(41 + t))));

    Gating each{position, "multiplicative", "silu", false}, one = each;
    one.headwise = true;
    const Sample column = logits(c.size, one);
    Sample columns = logits(c.size, each);
    const Shape shape = columns.view().shape;
    for (Index h = 0; h < shape[1]; ++h)
      for (Index t = 0; t < shape[2]; ++t)
        for (Index i = 0; i < shape[3]; ++i) columns.set(0, h, t, i, column.get(0, h, t, 0));
    CHECK(same_bits(attended(each.call(), input_of(c, columns, true)).o,
                    attended(one.call(), input_of(c, column, true)).o));
  }
}

TEST_CASE("a gate on the output is dense attention times it, and its token's alone") {
  const Gating g;
  Case c({1, 4, 2, 60, 60, 16, 16});
  Sample gate = logits(c.size, g);
  const Got dense = attended("dense", c.input(true)), got = attended(g.call(), input_of(c, gate, true));
  CHECK(same_bits(got.lse, dense.lse));
  for (Index h = 0, at = 0; h < 4; ++h)
    for (Index t = 0; t < 60; ++t)
      for (Index e = 0; e < 16; ++e, ++at) {
        const auto i = static_cast<size_t>(at);
        CHECK(std::fabs(static_cast<double>(got.o[i]) -
                        static_cast<double>(dense.o[i]) * g.open(gate.get(0, h, t, e))) <= 1e-6);
      }
  // Another gate at token 20: that row alone. On values: that row and later ones.
  for (const char* position : {"g1", "g4", "g2", "g3"}) {
    const Gating there{position, "multiplicative", "sigmoid", false};
    Sample before = logits(c.size, there);
    const Got first = attended(there.call(), input_of(c, before, true));
    for (Index h = 0; h < before.view().shape[1]; ++h) before.set(0, h, 20, 3, 5.0);
    const Got then = attended(there.call(), input_of(c, before, true));
    const bool own = there.position == "g1" || there.position == "g4";
    for (Index h = 0; h < 4; ++h)
      for (Index t = 0; t < 60; ++t) {
        const auto row = static_cast<size_t>((h * 60 + t) * 16);
        const bool same = std::memcmp(&first.o[row], &then.o[row], 16 * sizeof(float)) == 0;
        CHECK(same == (own ? t != 20 : t < 20));
      }
  }
}

TEST_CASE("a step after a cache is the last row of the whole") {
  for (const Index kv_heads : {1, 2, 8})
    for (const char* position : {"g1", "g2", "g3", "g4"}) {
      const Gating g{position, "multiplicative", "sigmoid", false};
      const Case all({1, 8, kv_heads, 90, 90, 16, 24});
      const Sample gate = logits(all.size, g);
      const Got whole = attended(g.call(), input_of(all, gate, true));
      AttendInput step = input_of(all, gate, true);
      const auto last = [](const TensorView& x) {
        return TensorView(x.at({0, 0, x.shape[2] - 1}), x.dtype, {x.shape[0], x.shape[1], 1, x.shape[3]}, x.stride);
      };
      step.q = last(step.q);
      if (g.position == "g1" || g.position == "g4") step.extra["gate"] = last(gate.view());
      const Got got = attended(g.call(), step);
      for (Index h = 0; h < 8; ++h)
        for (Index e = 0; e < 24; ++e)
          CHECK(std::fabs(got.o[static_cast<size_t>(h * 24 + e)] -
                          whole.o[static_cast<size_t>((h * 90 + 89) * 24 + e)]) < 1e-6f);
    }
}

TEST_CASE("gradients of every gate, its logits included, agree with central differences") {
  for (const Gating& g : all_gatings()) {
    const std::string call = g.call();
    CAPTURE(call);
    CAPTURE(g.headwise);
    for (const Sizes& s : {Sizes{1, 4, 2, 5, 7, 6, 3}, Sizes{1, 4, 1, 1, 6, 5, 4}, Sizes{2, 2, 2, 4, 4, 3, 5}}) {
      Case c(s);
      Sample gate = logits(s, g);
      const Sample dout = random_dout(s);
      const auto loss = [&] { return loss_of(naive_gated(c, g, gate, true).o, dout); };
      const AttendGradients got = gradients(call, input_of(c, gate, true), dout);
      CHECK_GRADIENT("dq", got.dq, differences(c.q, loss), gradient_tolerance(DType::f32));
      CHECK_GRADIENT("dk", got.dk, differences(c.k, loss), gradient_tolerance(DType::f32));
      CHECK_GRADIENT("dv", got.dv, differences(c.v, loss), gradient_tolerance(DType::f32));
      CHECK(got.extra.at("gate").shape() == gate.view().shape);
      CHECK_GRADIENT("dgate", got.extra.at("gate"), differences(gate, loss), gradient_tolerance(DType::f32));
    }
  }
}

namespace {

// Larger: naive gradients of dense attention on what is behind the gate, taken through the gate by hand.
void check_chain(const Gating& g, const Sizes& s, DType arithmetic) {
  const std::string call = g.call();
  CAPTURE(call);
  CAPTURE(g.headwise);
  const Case c(s, DType::f32, arithmetic);
  const Sample gate = logits(s, g), dout = random_dout(s);
  const auto slope = [&](double logit_at) { return (g.open(logit_at + 1e-5) - g.open(logit_at - 1e-5)) / 2e-5; };
  const Case x = behind(c, g, gate);
  Sample inner = dout;
  const Naive dense = naive_attention(x, dense_sees(x, true));
  std::vector<double> dgate(static_cast<size_t>(elements(gate.view().shape)));
  const Shape shape = gate.view().shape;
  const auto gate_at = [&](Index b, Index h, Index t, Index i) {
    return static_cast<size_t>(((b * shape[1] + h) * shape[2] + t) * shape[3] + (shape[3] == 1 ? 0 : i));
  };
  if (g.position == "g1")
    for (Index b = 0, at = 0; b < s.B; ++b)
      for (Index h = 0; h < s.Hq; ++h)
        for (Index t = 0; t < s.N; ++t)
          for (Index e = 0; e < s.Dv; ++e, ++at) {
            const double l = logit(gate, b, h, t, e), d = dout.get(b, h, t, e);
            dgate[gate_at(b, h, t, e)] += d * dense.o[static_cast<size_t>(at)] * slope(l);
            inner.set(b, h, t, e, d * g.open(l));
          }
  Gradients want = naive_gradients(x, met_keys(x, dense_sees(x, true)), inner);
  const auto through = [&](std::vector<double>& d, Index heads, Index tokens, Index width, auto value) {
    for (Index b = 0, at = 0; b < s.B; ++b)
      for (Index h = 0; h < heads; ++h)
        for (Index t = 0; t < tokens; ++t)
          for (Index i = 0; i < width; ++i, ++at) {
            const double l = logit(gate, b, h, t, i);
            dgate[gate_at(b, h, t, i)] += d[static_cast<size_t>(at)] * value(b, h, t, i) * slope(l);
            d[static_cast<size_t>(at)] *= g.open(l);
          }
  };
  if (g.position == "g2")
    through(want.dv, s.Hk, s.M, s.Dv, [&](Index b, Index h, Index t, Index i) { return c.v_at(b, h, t, i); });
  if (g.position == "g3")
    through(want.dk, s.Hk, s.M, s.D, [&](Index b, Index h, Index t, Index i) { return c.k_at(b, h, t, i); });
  if (g.position == "g4")
    through(want.dq, s.Hq, s.N, s.D, [&](Index b, Index h, Index t, Index i) { return c.q_at(b, h, t, i); });
  AttendOutput forward;
  const AttendInput in = input_of(c, gate, true);
  const AttendGradients got = attend_backward(MechanismCall::parse(call), in, dout.view(), &forward);
  check_gradients(c, got, want);
  CHECK_GRADIENT("dgate", got.extra.at("gate"), dgate, gradient_tolerance(arithmetic));
  // What attend() gave is enough.
  const AttendGradients again =
      attend_backward(MechanismCall::parse(call), in, dout.view(), forward.o.view(), forward.lse.view());
  for (const auto& [a, b] : {std::pair(&again.dq, &got.dq), std::pair(&again.dk, &got.dk),
                             std::pair(&again.dv, &got.dv), std::pair(&again.extra.at("gate"), &got.extra.at("gate"))})
    CHECK(std::memcmp(a->data(), b->data(), static_cast<size_t>(a->bytes())) == 0);
}

}  // namespace

TEST_CASE("gradients at larger sizes, in f32 and bf16") {
  for (const std::string& isa : available_isas()) {
    const UseIsa use(isa);
    for (const char* position : {"g1", "g2", "g3", "g4"})
      for (const bool headwise : {false, true})
        for (const DType arithmetic : {DType::f32, DType::bf16}) {
          check_chain({position, "multiplicative", "sigmoid", headwise}, {1, 8, 2, 70, 133, 16, 40}, arithmetic);
          check_chain({position, "multiplicative", "silu", headwise}, {2, 4, 4, 65, 65, 24, 8}, arithmetic);
        }
  }
}

TEST_CASE("the same bits for any number of threads") {
  for (const Gating& g : {Gating{"g1"}, Gating{"g2"}, Gating{"g3"}, Gating{"g4"}}) {
    const Case c({1, 4, 2, 300, 300, 32, 32});
    const Sample gate = logits(c.size, g), dout = random_dout(c.size);
    AttendGradients first;
    Got output;
    for (const int n : {1, 2, 3}) {
      const UseThreads threads(n);
      AttendGradients got = gradients(g.call(), input_of(c, gate, true), dout);
      const Got forward = attended(g.call(), input_of(c, gate, true));
      if (n == 1) {
        first = std::move(got), output = forward;
        continue;
      }
      CHECK(same_bits(forward.o, output.o));
      for (const auto& [a, b] :
           {std::pair(&got.dq, &first.dq), std::pair(&got.dk, &first.dk), std::pair(&got.dv, &first.dv),
            std::pair(&got.extra.at("gate"), &first.extra.at("gate"))})
        CHECK(std::memcmp(a->data(), b->data(), static_cast<size_t>(a->bytes())) == 0);
    }
  }
}

TEST_CASE("who attends to whom is dense attention's") {
  const Case c({1, 4, 2, 90, 200, 16, 16});
  for (const char* position : {"g1", "g2", "g3", "g4"})
    for (const bool causal : {false, true}) {
      const Gating g{position};
      const Sample gate = logits(c.size, g);
      const auto tiles = [](const Plan& plan) {
        std::vector<std::array<Index, 7>> all;
        walk(plan, [&](const RowBlock& rows, const std::vector<Tile>& list) {
          for (const Tile& t : list)
            all.push_back({rows.kv_head, rows.first, rows.rows, t.columns.first, t.columns.count,
                           static_cast<Index>(t.mask.kind), t.mask.hi});
        });
        return all;
      };
      CHECK(tiles(plan_of(MechanismCall::parse(g.call()), input_of(c, gate, causal))) ==
            tiles(plan_of(MechanismCall::parse("dense"), c.input(causal))));
    }
}

TEST_CASE("what cannot be gated is refused in one line") {
  const Case c({1, 4, 2, 20, 30, 16, 8});
  CHECK_FAILS(attend("gated-attention", c.input(true)), Error,
              "gated-attention: tensor gate is missing, expected logits, g1 [B, Hq, N, Dv], g2 [B, Hk, M, Dv], g3 [B, "
              "Hk, M, D], g4 [B, Hq, N, D]; or 1 for the last axis");
  const Sample gate = logits(c.size, Gating{"g2"});
  CHECK_FAILS(attend("gated-attention", input_of(c, gate, true)), Error,
              "gate: shape = [1, 2, 30, 8], expected [1, 4, 20, 8] or [1, 4, 20, 1] with position = g1");
  CHECK_FAILS(attend("gated-attention:position=g3", input_of(c, gate, true)), Error,
              "gate: shape = [1, 2, 30, 8], expected [1, 2, 30, 16] or [1, 2, 30, 1] with position = g3");
  CHECK_FAILS(attend("gated-attention:position=g5", input_of(c, gate, true)), UsageError,
              "gated-attention: position = g5, expected one of g1, g2, g3, g4");
  Sample broken = logits(c.size, Gating{});
  broken.set(0, 1, 2, 3, NAN);
  CHECK_FAILS(attend("gated-attention", input_of(c, broken, true)), Error, "gate: holds nan, expected finite values");
}
