#include "heed/mechanism/block_gate.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "heed/base/threads.h"
#include "heed/kernel/kernels.h"
#include "heed/mechanism/extra.h"

namespace heed::mechanism {
namespace {

// RoPE of one vector of even width at `position`: features i and i + width/2 turn by position · base^(-2i/width).
void turn(float* x, Index width, Index position, double base) {
  for (Index i = 0; i < width / 2; ++i) {
    const double power = -2 * static_cast<double>(i) / static_cast<double>(width);
    const double angle = static_cast<double>(position) * std::pow(base, power);
    const auto c = static_cast<float>(std::cos(angle)), s = static_cast<float>(std::sin(angle));
    const float a = x[i], b = x[i + width / 2];
    x[i] = a * c - b * s, x[i + width / 2] = a * s + b * c;
  }
}

}  // namespace

std::vector<ExtraSpec> gate_extras() {
  const std::vector<DType> real{DType::f32, DType::f16, DType::bf16};
  return {{"wk", real, {"Hq|Hk", "*", "*"}, false, "[Hq, 3D, D], or with wq [Hk, 3D, G]: the gate's key side"},
          {"wq", real, {"Hq", "D", "*"}, false, "[Hq, D, G]: the gate's query side, if it has one"},
          {"gate_q", real, {"B", "Hq", "N", "D"}, false, "queries before RoPE, for the gate"},
          {"gate_k", real, {"B", "Hk", "N", "D"}, false, "keys before RoPE, for the gate"}};
}

void BlockGate::check(const Inputs& in, double rope_base) {
  const Problem& p = in.problem;
  const TensorView *wk = in.find("wk"), *wq = in.find("wq");
  if (wk == nullptr)
    fail("seer-attention: tensor wk is missing, expected a trained gate (on a model: a calibration) or oracle = true");
  if (wq != nullptr && wq->shape[2] < 1) fail("wq: shape = {}, expected [Hq, D, G], G >= 1", to_string(wq->shape));
  const Index heads = wq == nullptr ? p.Hq : p.Hk, width = wq == nullptr ? p.D : wq->shape[2];
  if (wk->shape != Shape{heads, 3 * p.D, width})
    fail("wk: shape = {}, expected [{}, {}, {}]: {}", to_string(wk->shape), heads, 3 * p.D, width,
         wq == nullptr ? "[Hq, 3D, D] where there is no wq" : "[Hk, 3D, G], G as wq has it");
  if (rope_base > 0 && width % 2 != 0)
    fail_usage("seer-attention: rope_base = {}, expected 0 where the gate's width {} is odd", rope_base, width);
}

GateView::GateView(const Inputs& in, Index block) : kv_(in.kv), q_(in.q), tokens_(in.problem.N), block_(block) {
  if (const TensorView* gate_q = in.find("gate_q")) q_ = Queries(*gate_q, in.q.arithmetic());
  // Keys before RoPE are packed like keys for as long as they are pooled; values they have none.
  if (const TensorView* gate_k = in.find("gate_k")) {
    own_.emplace(in.problem.B * in.problem.Hk, in.problem.D, 1, tokens_, in.q.arithmetic());
    TensorView one_feature = *gate_k;
    one_feature.shape[3] = 1;
    own_->append(*gate_k, one_feature);
  }
}

void GateView::keys(Index head, Index first, Index count, float* out) const {
  const KeyValues& kv = own_ ? *own_ : *kv_;
  const Index d = kv.layout().d;
  for (Index i = 0; i < count; ++i) {
    const Index begin = (first + i) * block_, end = std::min(begin + block_, tokens_);
    float *most = out + i * 3 * d, *least = most + d, *mean = least + d;
    std::fill_n(most, d, -std::numeric_limits<float>::infinity());
    std::fill_n(least, d, std::numeric_limits<float>::infinity());
    std::fill_n(mean, d, 0.0f);
    kv.bound_keys(head, begin, end, most, least);
    kv.sum_keys(head, begin, end, mean);
    for (Index f = 0; f < d; ++f) mean[f] /= static_cast<float>(end - begin);
  }
}

void mean_query(const Queries& q, Index d, const RowBlock& rows, float* out, Scratch& scratch) {
  const Scratch::Mark mark(scratch);
  const auto one = scratch.take<float>(d);
  std::fill_n(out, d, 0.0f);
  for (Index i = 0; i < rows.rows; ++i) {
    q.read(rows.b, rows.head, rows.token(i), one.data());
    for (Index f = 0; f < d; ++f) out[f] += one[static_cast<size_t>(f)];
  }
  for (Index f = 0; f < d; ++f) out[f] /= static_cast<float>(rows.rows);
}

BlockGate::BlockGate(const Inputs& in, Index block, double rope_base)
    : problem_(in.problem), block_(block), width_(in.problem.D), rope_base_(rope_base) {
  check(in, rope_base);
  const GateView view(in, block);
  q_ = view.queries();
  if (const TensorView* wq = in.find("wq")) {
    width_ = wq->shape[2];
    for (Index head = 0; head < problem_.Hq; ++head) wq_.push_back(matrix_panels(*wq, head));
  }
  gate_keys_.resize(static_cast<size_t>(problem_.B * key_heads()));
  parallel_for(problem_.B * key_heads(), [&](Index unit, int) { project_keys(view, *in.find("wk"), unit); });
}

void BlockGate::project_keys(const GateView& view, const TensorView& wk, Index unit) {
  const Index d = problem_.D, g = width_, n = ceil_div(problem_.N, block_), padded = round_up(g, panel_columns);
  const Index head = unit % key_heads(), key_head = unit / (key_heads() / problem_.Hk);
  const std::vector<float> w = matrix_panels(wk, head);
  std::vector<float>& panels = gate_keys_[static_cast<size_t>(unit)];
  panels.resize(static_cast<size_t>(round_up(n, panel_columns) * g));
  Scratch& scratch = thread_scratch();
  const Scratch::Mark mark(scratch);
  float* pooled = scratch.take<float>(panel_columns * 3 * d).data();
  float* projected = scratch.take<float>(panel_columns * padded).data();
  for (Index first = 0; first < n; first += panel_columns) {
    const Index count = std::min(panel_columns, n - first);
    view.keys(key_head, first, count, pooled);  // step 1
    // Steps 2 and 3. A block stands where its first token stands.
    kernels().gemm_f32(count, g, 3 * d, pooled, 3 * d, w.data(), projected, padded, false);
    if (rope_base_ > 0)
      for (Index i = 0; i < count; ++i) turn(projected + i * padded, g, (first + i) * block_, rope_base_);
    kernels().pack_keys_f32(projected, padded, count, g, g, panels.data() + first * g);
  }
}

void BlockGate::score(const RowBlock& rows, float* logits, Scratch& scratch) const {
  const Scratch::Mark mark(scratch);
  const Index a = rows.first / block_, d = problem_.D, g = width_;
  float* qg = scratch.take<float>(d).data();
  mean_query(q_, d, rows, qg, scratch);
  if (!wq_.empty()) {
    const float* mean = qg;
    qg = scratch.take<float>(round_up(g, panel_columns)).data();
    kernels().gemm_f32(1, g, d, mean, d, wq_[static_cast<size_t>(rows.head)].data(), qg, g, false);
  }
  if (rope_base_ > 0) turn(qg, g, a * block_, rope_base_);
  // Step 4, without its softmax.
  const Index head = wq_.empty() ? rows.b * problem_.Hq + rows.head : rows.b * problem_.Hk + rows.kv_head;
  kernels().gemm_f32(1, a + 1, g, qg, g, gate_keys_[static_cast<size_t>(head)].data(), logits, a + 1, false);
  for (Index b = 0; b <= a; ++b) logits[b] /= std::sqrt(static_cast<float>(g));
}

}  // namespace heed::mechanism
