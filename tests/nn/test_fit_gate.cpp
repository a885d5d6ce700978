// SeerAttention's gate fitted to attention: the function that is trained is the one that runs, its gradient is that of
// the equations, it learns one sequence, and what it learned is read again.
#include "support/doctest_with_torch.h"

#include <ATen/Context.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/softmax.h>
#include <ATen/ops/tensor.h>
#include <c10/core/GradMode.h>

#include <cmath>

#include "heed/base/scratch.h"
#include "heed/mechanism/block_gate.h"
#include "heed/nn/fit_gate.h"
#include "heed/nn/tensors.h"
#include "support/cases.h"
#include "support/folder.h"
#include "support/naive.h"
#include "support/tiny_session.h"

using namespace heed;
using namespace heed::test;

namespace {

at::Tensor tensor_of(const Tensor& x) { return nn::torch_copy(x.view()); }

// KL(T ‖ softmax(logits)), the mean over rows from floor(n/4) on; [Hq][3D·D] weights, f64, from the sheet's equations.
struct NaiveGate {
  Index heads, kv_heads, n, d, block;
  double base;
  std::vector<double> q, k, t, w;  // [Hq, n, D], [Hk, n, 3D], [Hq, n, n], [Hq, 3D, D]

  std::vector<double> turned(std::vector<double> x, Index at) const {
    if (base == 0) return x;
    for (Index i = 0; i < d / 2; ++i) {
      const double angle =
          static_cast<double>(at * block) * std::pow(base, -2.0 * static_cast<double>(i) / static_cast<double>(d));
      double &a = x[static_cast<size_t>(i)], &b = x[static_cast<size_t>(i + d / 2)];
      const double kept = a;
      a = kept * std::cos(angle) - b * std::sin(angle), b = kept * std::sin(angle) + b * std::cos(angle);
    }
    return x;
  }
  double loss() const {
    double sum = 0;
    Index rows = 0;
    for (Index h = 0; h < heads; ++h)
      for (Index a = n / 4; a < n; ++a, ++rows) {
        std::vector<double> query;
        for (Index f = 0; f < d; ++f) query.push_back(q[static_cast<size_t>((h * n + a) * d + f)]);
        query = turned(query, a);
        std::vector<double> logits;
        double total = 0;
        for (Index b = 0; b <= a; ++b) {
          std::vector<double> key(static_cast<size_t>(d), 0);
          for (Index f = 0; f < d; ++f)
            for (Index e = 0; e < 3 * d; ++e)
              key[static_cast<size_t>(f)] += k[static_cast<size_t>((h / (heads / kv_heads) * n + b) * 3 * d + e)] *
                                             w[static_cast<size_t>((h * 3 * d + e) * d + f)];
          key = turned(key, b);
          double s = 0;
          for (size_t f = 0; f < key.size(); ++f) s += key[f] * query[f];
          logits.push_back(s / std::sqrt(static_cast<double>(d)));
          total += std::exp(logits.back());
        }
        for (Index b = 0; b <= a; ++b) {
          const double want = t[static_cast<size_t>((h * n + a) * n + b)];
          if (want > 0) sum += want * (std::log(want) - logits[static_cast<size_t>(b)] + std::log(total));
        }
      }
    return sum / static_cast<double>(rows);
  }
};

std::vector<double> values(const at::Tensor& x) {
  const at::Tensor plain = x.contiguous();
  return {plain.const_data_ptr<double>(), plain.const_data_ptr<double>() + plain.numel()};
}

// One key of every block stands out, and every query asks for those of two blocks: a mean of keys hardly shows them.
nn::GateData one_sequence(Index block, Index n) {
  const Index d = 32, heads = 4, kv_heads = 2, tokens = n * block;
  at::manual_seed(3);
  const at::Tensor special = at::randn({kv_heads, n, d});
  at::Tensor k = 0.5 * at::randn({kv_heads, n, block, d});
  k.select(2, 5) += 3 * special;
  k = k.reshape({1, kv_heads, tokens, d});
  at::Tensor q = 0.3 * at::randn({1, heads, tokens, d});
  for (Index h = 0; h < heads; ++h)
    for (Index a = 0; a < n; ++a)
      for (const Index wanted : {(a * 5 + h) % (a + 1), (a * 3 + 1) % (a + 1)})
        q[0][h].narrow(0, a * block, block) += 0.25 * special[h / 2][wanted];
  AttendInput in;
  in.q = nn::view_of(q), in.k = nn::view_of(k), in.v = nn::view_of(k), in.causal = true;
  const NamedTensors learned = calibrate(MechanismCall::parse(fmt::format("seer-attention:block={}", block)), in);
  const auto of = [&](const char* name) { return tensor_of(learned.at(name)).unsqueeze(0); };
  return {of("q_means"), of("key_pools"), of("targets")};
}

model::MechanismUse use_of(const char* call) {
  model::MechanismUse use;
  use.call = MechanismCall::parse(call);
  return use;
}

}  // namespace

TEST_CASE("what is trained is the function that inference computes") {
  constexpr Index length = 90, block = 16, n = 6;
  const auto model = load(TinyModel(TinySizes{}).file());
  const Index heads = model->info().heads, d = model->info().head_size;
  at::manual_seed(1);
  const at::Tensor wk = at::randn({heads, 3 * d, d});
  for (const double base : {0.0, 500.0}) {
    Index layers = 0;
    model::Session session(*model, options(length));
    session.observe_inputs([&](Index, const Inputs& seen) {
      Inputs in = seen;
      const Mechanism& m = find_mechanism("seer-attention");
      const NamedTensors learned = m.calibrate(Params(m.name, m.params, {{"block", "16"}}), in);
      const at::Tensor got = nn::gate_logits(tensor_of(learned.at("q_means")).unsqueeze(0),
                                             tensor_of(learned.at("key_pools")).unsqueeze(0), wk, block, base);
      in.extra["wk"] = nn::view_of(wk);
      const mechanism::BlockGate gate(in, block, base);
      std::vector<float> row(64);
      for (Index h = 0; h < heads; ++h)
        for (Index a = 0; a < n; ++a) {
          gate.score({.b = 0,
                      .kv_head = h / in.problem.group(),
                      .head = h,
                      .first = a * block,
                      .rows = std::min(block, length - a * block)},
                     row.data(), thread_scratch());
          for (Index b = 0; b < n; ++b) {
            const double logit = got[0][h][a][b].item<double>();
            if (b > a) CHECK(logit == -INFINITY);
            else CHECK(logit == doctest::Approx(static_cast<double>(row[static_cast<size_t>(b)])).epsilon(1e-4));
          }
        }
      ++layers;
    });
    session.prefill(random_tokens(length));
    CHECK(layers == 2);
  }
}

TEST_CASE("the gate's loss and gradient are those of the equations") {
  const Index heads = 4, kv_heads = 2, n = 9, d = 6;
  for (const double base : {0.0, 30.0}) {
    at::manual_seed(7);
    const auto normal = [](std::vector<Index> shape) { return at::randn(shape, at::kDouble); };
    const at::Tensor q = normal({1, heads, n, d}), k = normal({1, kv_heads, n, 3 * d}), w = normal({heads, 3 * d, d});
    // Targets with zeros among them.
    at::Tensor t = at::softmax(2 * normal({1, heads, n, n}), -1).tril();
    t = t * (t > 0.02);
    t = t / t.sum(-1, true).clamp_min(1e-30);
    NaiveGate naive{heads, kv_heads, n, d, 16, base, values(q), values(k), values(t), values(w)};
    const at::Tensor wk = w.clone().requires_grad_();
    const at::Tensor loss = nn::gate_loss(nn::gate_logits(q, k, wk, 16, base), t);
    // Positions are turned by f32 tables.
    const double tolerance = base > 0 ? 1e-4 : 1e-9;
    CHECK(loss.item<double>() == doctest::Approx(naive.loss()).epsilon(tolerance));
    loss.backward();
    const std::vector<double> gradient = values(wk.grad());
    for (size_t i = 0; i < gradient.size(); i += 7) {
      const double kept = naive.w[i], step = 1e-5;
      naive.w[i] = kept + step;
      const double up = naive.loss();
      naive.w[i] = kept - step;
      const double down = naive.loss();
      naive.w[i] = kept;
      CHECK(std::abs(gradient[i] - (up - down) / (2 * step)) < 1e-3 * wk.grad().abs().max().item<double>());
    }
  }
}

TEST_CASE("a gate learns one sequence by heart") {
  const nn::GateData data = one_sequence(16, 12);
  nn::FitOptions options;
  options.steps = 200;
  options.lr = 3e-3;
  const nn::GateFit fit = nn::fit_gate(data, 16, 0, options);
  REQUIRE(fit.losses.size() == 200);
  MESSAGE("first " << fit.losses.front() << ", last " << fit.losses.back());
  CHECK(fit.losses.front() > 0.2);
  CHECK(fit.losses.back() < 0.05);
  for (size_t i = 20; i < fit.losses.size(); i += 20) CHECK(fit.losses[i] < fit.losses[i - 20]);
  // The same seed, the same bits.
  const nn::GateFit again = nn::fit_gate(data, 16, 0, options);
  CHECK(at::equal(fit.wk, again.wk));
}

TEST_CASE("a fitted gate comes back from its file and takes the oracle's place") {
  TinySizes sizes;
  sizes.heads = 4, sizes.kv_heads = 2;
  const auto model = load(TinyModel(sizes).file());
  nn::Pieces pieces;
  for (std::uint64_t seed = 0; seed < 3; ++seed) pieces.push_back(random_tokens(96, seed));
  pieces.push_back(pieces.front());  // random text teaches nothing about other random text
  nn::FitOptions options;
  options.steps = 60;
  const nn::Fitted fitted =
      nn::fit_gates(*model, use_of("seer-attention:block=8,last_block_dense=false"), pieces, 32, DType::f32, options);
  REQUIRE(fitted.layers.size() == 2);
  for (const nn::Fitted::Layer& l : fitted.layers) {
    CHECK(l.after > 0);
    CHECK(l.after < l.before);
  }
  const Folder folder;
  model::write_calibration(folder / "gate", fitted.calibration);
  const auto read = std::make_shared<model::Calibration>(model::read_calibration(folder / "gate"));
  CHECK(read->params == ParamTexts{{"block", "8"}, {"last_block_dense", "false"}, {"rope_base", "0"}});

  model::SessionOptions o = test::options(96, 32, "seer-attention:density=0.4");
  o.use.calibration = read;
  model::Session session(*model, o);
  session.prefill(pieces.front());
  const auto share =
      static_cast<double>(session.stats().attend.pairs) / static_cast<double>(session.stats().dense_pairs);
  CHECK(share > 0.2);
  CHECK(share < 0.6);

  // A model with other heads, one with more layers, one without gates.
  TinySizes other = sizes;
  other.kv_heads = 4, other.heads = 8, other.key_length = true;
  CHECK_FAILS(model::Session(*load(TinyModel(other).file()), o), Error,
              "wk: shape = [4, 36, 12], expected [8, 36, 12]: [Hq, 3D, D] where there is no wq");
  other = sizes, other.layers = 3;
  CHECK_FAILS(model::Session(*load(TinyModel(other).file()), o), Error,
              "seer-attention: tensor wk is missing, expected a trained gate (on a model: a calibration) or oracle = "
              "true");
  other = sizes, other.layers = 1;
  CHECK_FAILS(model::Session(*load(TinyModel(other).file()), o), Error,
              "calibration of llama tiny: holds layer 1, expected 0 … 0: it was made for another model");
}

TEST_CASE("what cannot be fitted is refused") {
  const auto model = load(TinyModel(TinySizes{}).file());
  const auto fit = [&](const char* call, Index tokens) {
    nn::fit_gates(*model, use_of(call), {random_tokens(tokens)}, 32, DType::f32, {});
  };
  CHECK_FAILS(fit("seer-attention:block=16", 31), Error, "pieces of 31 tokens, expected at least two blocks of 16");
  CHECK_FAILS(fit("seer-attention:oracle=true", 200), UsageError,
              "seer-attention: oracle = true, expected false where a gate is fitted");
}
