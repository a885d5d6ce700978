// Gated attention: dense attention behind a gate that the model computes from its tokens, on the output of every head,
// or on its values, keys or queries.
// "Gated Attention for Large Language Models: Non-linearity, Sparsity, and Attention-Sink-Free", arXiv:2505.06708.

#include <algorithm>
#include <cmath>
#include <memory>

#include "heed/base/threads.h"
#include "heed/mechanism/registry.h"

namespace heed::mechanism {
namespace {

// An activation of one logit, and its derivative.
struct Opening {
  float value = 0, slope = 0;
};
using Activation = Opening (*)(float logit);

float sigmoid(float s) { return 1 / (1 + std::exp(-s)); }

Activation activation_of(const std::string& name) {
  if (name == "silu")
    return [](float s) {
      const float g = sigmoid(s);
      return Opening{s * g, g * (1 + s * (1 - g))};
    };
  if (name == "identity") return [](float s) { return Opening{s, 1}; };
  if (name == "ns-sigmoid")  // never less than one half: no sparsity
    return [](float s) {
      const float g = sigmoid(s);
      return Opening{0.5f + 0.5f * g, 0.5f * g * (1 - g)};
    };
  return [](float s) {
    const float g = sigmoid(s);
    return Opening{g, g * (1 - g)};
  };
}

// Where the gate stands: G1 … G4.
enum class Place : std::uint8_t { output, values, keys, queries };

class Gate {
 public:
  Gate(const Params& p, const Inputs& in)
      : logits_(*in.find("gate")), activation_(activation_of(p.text("activation"))),
        additive_(p.text("mode") == "additive") {
    const Problem& problem = in.problem;
    const std::string& position = p.text("position");
    place_ = static_cast<Place>(position[1] - '1');
    const bool of_queries = place_ == Place::output || place_ == Place::queries;
    heads_ = of_queries ? problem.Hq : problem.Hk, tokens_ = of_queries ? problem.N : problem.M;
    width_ = place_ == Place::output || place_ == Place::values ? problem.Dv : problem.D;
    const Shape& shape = logits_.shape;
    if (shape != Shape{problem.B, heads_, tokens_, width_} && shape != Shape{problem.B, heads_, tokens_, 1})
      fail("gate: shape = {}, expected {} or [{}, {}, {}, 1] with position = {}", to_string(shape),
           to_string({problem.B, heads_, tokens_, width_}), problem.B, heads_, tokens_, position);
  }

  Place place() const { return place_; }
  Index width() const { return width_; }
  Shape gated_shape() const { return {logits_.shape[0], heads_, tokens_, width_}; }

  /// x [width], token t of head (batch · heads + head), behind the gate: y may be x.
  void pass(Index head, Index t, const float* x, float* y) const {
    for_logits(head, t, [&](Index i, const Opening& g) { y[i] = additive_ ? x[i] + g.value : x[i] * g.value; });
  }
  /// From dy, the gradient of what passed: that of x, and those of the logits [width or 1], to which it is added.
  void pass_back(Index head, Index t, const float* x, const float* dy, float* dx, float* dlogits) const {
    const Index step = logits_.shape[3] == 1 ? 0 : 1;
    for_logits(head, t, [&](Index i, const Opening& g) {
      dlogits[i * step] += (additive_ ? dy[i] : dy[i] * x[i]) * g.slope;
      dx[i] = additive_ ? dy[i] : dy[i] * g.value;
    });
  }

  /// Calls work(head, token) for every row that passes, from any thread.
  template <class Work>
  void for_rows(const Work& work) const {
    constexpr Index run = 64;
    const Index runs = ceil_div(tokens_, run);
    parallel_for(logits_.shape[0] * heads_ * runs, [&](Index unit, int) {
      const Index first = unit % runs * run;
      for (Index t = first; t < std::min(tokens_, first + run); ++t) work(unit / runs, t);
    });
  }

 private:
  // One logit a head opens all its features alike.
  template <class Visit>
  void for_logits(Index head, Index t, const Visit& visit) const {
    Scratch& scratch = thread_scratch();
    const Scratch::Mark mark(scratch);
    const Index count = logits_.shape[3];
    float* logits = scratch.take<float>(count).data();
    read_f32(logits_.at({head / heads_, head % heads_, t}), logits_.dtype, logits_.stride[3], count, logits);
    Opening g;
    for (Index i = 0; i < width_; ++i) {
      if (i < count) g = activation_(logits[i]);
      visit(i, g);
    }
  }

  const TensorView& logits_;
  Activation activation_;
  bool additive_;
  Place place_ = Place::output;
  Index heads_ = 0, tokens_ = 0, width_ = 0;
};

// What stands before the gate; head counts batches, too.
void read_input(const Inputs& in, Place place, Index head, Index t, float* row) {
  if (place == Place::queries) in.q.read(head / in.problem.Hq, head % in.problem.Hq, t, row);
  else if (place == Place::keys) in.kv->read_key(head, t, row);
  else in.kv->read_value(head, t, row);
}

// Queries, keys or values behind the gate.
struct Gated {
  Tensor rows;
  std::unique_ptr<KeyValues> kv;  // with gated keys or values
};

Gated gate_inputs(const Gate& gate, const Inputs& in) {
  const Problem& p = in.problem;
  Gated gated;
  gated.rows = Tensor(DType::f32, gate.gated_shape());
  const Index tokens = gated.rows.shape()[2], width = gate.width();
  gate.for_rows([&](Index head, Index t) {
    float* row = gated.rows.as<float>() + (head * tokens + t) * width;
    read_input(in, gate.place(), head, t, row);
    gate.pass(head, t, row, row);
  });
  if (gate.place() == Place::queries) return gated;
  const bool keys = gate.place() == Place::keys;
  Tensor other(DType::f32, {p.B, p.Hk, p.M, keys ? p.Dv : p.D});
  parallel_for(p.B * p.Hk, [&](Index head, int) {
    for (Index t = 0; t < p.M; ++t) {
      float* row = other.as<float>() + (head * p.M + t) * other.shape()[3];
      if (keys) in.kv->read_value(head, t, row);
      else in.kv->read_key(head, t, row);
    }
  });
  gated.kv = std::make_unique<KeyValues>(p.B * p.Hk, p.D, p.Dv, p.M, in.kv->layout().dtype);
  gated.kv->append(keys ? gated.rows.view() : other.view(), keys ? other.view() : gated.rows.view());
  return gated;
}

Plan plan_gated(const Params& p, const Inputs& in) {
  const Gate gate(p, in);
  const Index keys = in.problem.M;
  const bool causal = in.problem.causal;
  const auto gated = std::make_shared<Gated>();
  if (gate.place() != Place::output) *gated = gate_inputs(gate, in);
  const Queries q = gate.place() == Place::queries ? Queries(gated->rows.view(), in.q.arithmetic()) : in.q;
  Plan plan = make_plan(in.problem, q, gated->kv != nullptr ? *gated->kv : *in.kv, in.rule, Lanes::per_kv_head);
  plan.keep = {gated};
  plan.emit = [=](const RowBlock& rows, Tiles& tiles) {
    const Index end = causal ? rows.position(rows.rows - 1) + 1 : keys;
    tiles.add(Set::range(0, rows.rows), Set::range(0, end), causal ? Mask::causal() : Mask::full());
  };
  return plan;
}

bool gates_output(const Params& p, const Inputs&) { return p.text("position") == "g1"; }

// G1. lse stays attention's own, and nothing is normalised again.
void finish_gated(const Params& p, const Inputs& in, const Plan&, AttendOutput& out) {
  if (!gates_output(p, in)) return;
  const Gate gate(p, in);
  const Index tokens = in.problem.N, width = gate.width();
  gate.for_rows([&](Index head, Index t) {
    float* row = out.o.as<float>() + (head * tokens + t) * width;
    gate.pass(head, t, row, row);
  });
}

void read_row(const TensorView& x, Index heads, Index head, Index t, float* row) {
  read_f32(x.at({head / heads, head % heads, t}), x.dtype, x.stride[3], x.shape[3], row);
}

// The gradient of attention's output behind which a gate stands, and of the gate's logits.
struct BehindGate {
  Tensor dx, dlogits;
};
BehindGate pass_back_all(const Gate& gate, const Inputs& in, const auto& read_x, const auto& read_dy) {
  BehindGate back{Tensor(DType::f32, gate.gated_shape()), Tensor(DType::f32, in.find("gate")->shape)};
  const Index tokens = gate.gated_shape()[2], width = gate.width(), logits = back.dlogits.shape()[3];
  gate.for_rows([&](Index head, Index t) {
    Scratch& scratch = thread_scratch();
    const Scratch::Mark mark(scratch);
    float *x = scratch.take<float>(width).data(), *dy = scratch.take<float>(width).data();
    read_x(head, t, x), read_dy(head, t, dy);
    gate.pass_back(head, t, x, dy, back.dx.as<float>() + (head * tokens + t) * width,
                   back.dlogits.as<float>() + (head * tokens + t) * logits);
  });
  return back;
}

Tensor unfinish_gated(const Params& p, const Inputs& in, const Plan&, const TensorView& dout) {
  const Gate gate(p, in);
  const Index heads = in.problem.Hq, width = gate.width();
  // The gradient of what is behind a gate does not depend on what is before it.
  return pass_back_all(
             gate, in, [&](Index, Index, float* x) { std::fill_n(x, width, 0.0f); },
             [&](Index head, Index t, float* dy) { read_row(dout, heads, head, t, dy); })
      .dx;
}

void finish_gradient_gated(const Params& p, const Inputs& in, const Differentiated& done, AttendGradients& out) {
  const Gate gate(p, in);
  const Index heads = gate.gated_shape()[1];
  Tensor& passed = gate.place() == Place::queries ? out.dq : gate.place() == Place::keys ? out.dk : out.dv;
  const bool output = gate.place() == Place::output;
  const TensorView dy = output ? done.dout : passed.view();
  BehindGate back = pass_back_all(
      gate, in,
      [&](Index head, Index t, float* x) {
        if (output) read_row(done.o, heads, head, t, x);
        else read_input(in, gate.place(), head, t, x);
      },
      [&](Index head, Index t, float* row) { read_row(dy, heads, head, t, row); });
  if (!output) passed = std::move(back.dx);
  out.extra.emplace("gate", std::move(back.dlogits));
}

}  // namespace

const Mechanism& gated_attention() {
  static const Mechanism m{
      .name = "gated-attention",
      .title = "Gated attention",
      .paper = "arXiv:2505.06708",
      .year = 2025,
      .stage = "gate, attend, gate",
      .training = Training::required,
      .idea =
          "Dense attention whose output, head by head, is multiplied by a gate that the current token's own features\n"
          "decide (position g1, the best). A head that has nothing to say is closed instead of having to look at some\n"
          "first token: sinks vanish. g2, g3 and g4 gate values, keys and queries instead; a gate of one number per\n"
          "token and head opens all its features alike. The gate's logits come with the call, as the model computes\n"
          "them from the tokens that q comes from.",
      .equations = "g1: o_i = (softmax over j of scale·<q_i, k_j>, times v_j) ⊙ a(gate_i);  lse is attention's own\n"
                   "g2, g3, g4: v_j ⊙ a(gate_j), k_j ⊙ a(gate_j), q_i ⊙ a(gate_i) take the place of v_j, k_j, q_i\n"
                   "additive: x + a(gate) instead of x ⊙ a(gate)\n"
                   "a: sigmoid σ(s); silu s·σ(s); identity s; ns-sigmoid 1/2 + σ(s)/2",
      .cost = "that of dense attention, and one pass over what is gated",
      .causality = Causality::either,
      .square = false,
      .params = {choice("position", "g1", {"g1", "g2", "g3", "g4"}, "what is gated: output, values, keys, queries"),
                 choice("mode", "multiplicative", {"multiplicative", "additive"}, "how the gate meets what it gates"),
                 choice("activation", "sigmoid", {"sigmoid", "silu", "identity", "ns-sigmoid"},
                        "of the gate's logits")},
      .extras = {{"gate",
                  {DType::f32, DType::f16, DType::bf16},
                  {"B", "*", "*", "*"},
                  true,
                  "logits, g1 [B, Hq, N, Dv], g2 [B, Hk, M, Dv], g3 [B, Hk, M, D], g4 [B, Hq, N, D]; or 1 for the last "
                  "axis",
                  true}},
      .not_on_models = "its gate must be trained with the model",
      .plan = plan_gated,
      .finishes = gates_output,
      .unfinish = unfinish_gated,
      .finish_gradient = finish_gradient_gated,
      .finish = finish_gated,
  };
  return m;
}

}  // namespace heed::mechanism
