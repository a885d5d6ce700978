// FlashMoBA: MoBA with small blocks, and keys that a short convolution over time draws together, so that a
// block's mean says more about what it holds.
// "Optimizing Mixture of Block Attention", arXiv:2511.11571.

#include <algorithm>
#include <cmath>

#include "heed/base/threads.h"
#include "heed/mechanism/block_router.h"
#include "heed/mechanism/registry.h"
#include "heed/plan/permute.h"

namespace heed::mechanism {
namespace {

// y_t = sum over l < W of w_l·k_(t-l), every channel of every KV head for itself. What stands before a document's
// first token is zero. w [Hk, D, W].
class KeyConvolution {
 public:
  KeyConvolution(const Inputs& in, const TensorView& w, const Documents& documents)
      : in_(in), w_(w), documents_(documents) {}

  Index width() const { return w_.shape[2]; }
  /// Taps that reach back from token t inside its document.
  Index taken(Index head, Index t) const {
    return std::min(width(), t - documents_.at(head / in_.problem.Hk, t).begin + 1);
  }
  /// Weights of a head, [W, D].
  float* weights(Index head, Scratch& scratch) const {
    const Index d = in_.problem.D;
    float* weight = scratch.take<float>(width() * d).data();
    float* taps = scratch.take<float>(width()).data();
    for (Index i = 0; i < d; ++i) {
      read_f32(w_.at({head % in_.problem.Hk, i}), w_.dtype, w_.stride[2], width(), taps);
      for (Index l = 0; l < width(); ++l) weight[l * d + i] = taps[l];
    }
    return weight;
  }
  /// Calls visit(t, key, y) for tokens [first, end) of a head; the key l < taken tokens back is at key - l·D.
  template <class Visit>
  void run(Index head, Index first, Index end, const float* weight, Scratch& scratch, const Visit& visit) const {
    const Index d = in_.problem.D, before = std::max<Index>(0, first - width() + 1);
    float* k = scratch.take<float>((end - before) * d).data();
    for (Index t = before; t < end; ++t) in_.kv->read_key(head, t, k + (t - before) * d);
    float* y = scratch.take<float>(d).data();
    for (Index t = first; t < end; ++t) {
      const float* key = k + (t - before) * d;
      std::fill_n(y, d, 0.0f);
      for (Index l = 0; l < taken(head, t); ++l)
        for (Index i = 0; i < d; ++i) y[i] += weight[l * d + i] * key[i - l * d];
      visit(t, key, y);
    }
  }

 private:
  const Inputs& in_;
  const TensorView& w_;
  const Documents& documents_;
};

// k'_t = k_t + silu(y_t).
std::shared_ptr<const KeyValues> convolve_keys(const Inputs& in, const TensorView& w, const Documents& documents) {
  const Problem& p = in.problem;
  const Index heads = p.B * p.Hk, d = p.D;
  const KeyConvolution convolution(in, w, documents);
  Tensor convolved(DType::f32, {heads, p.M, d});
  constexpr Index run = 256;
  const Index runs = ceil_div(p.M, run);
  parallel_for(heads * runs, [&](Index unit, int) {
    const Index head = unit / runs, first = unit % runs * run;
    Scratch& scratch = thread_scratch();
    const Scratch::Mark mark(scratch);
    const float* weight = convolution.weights(head, scratch);
    convolution.run(head, first, std::min(p.M, first + run), weight, scratch,
                    [&](Index t, const float* key, const float* y) {
                      float* out = convolved.as<float>() + (head * p.M + t) * d;
                      for (Index i = 0; i < d; ++i) out[i] = key[i] + y[i] / (1 + std::exp(-y[i]));
                    });
  });
  auto keys = std::make_shared<KeyValues>(heads, d, 0, p.M, in.kv->layout().dtype);  // values stay the input's
  keys->append(convolved.view(), Tensor(DType::f32, {heads, p.M, 0}).view());
  return keys;
}

// The convolved keys' gradient goes on to the keys and to the filter, their values' straight to the values. Blocks were
// chosen by them, too: that is constant.
void finish_gradient_flash_moba(const Params&, const Inputs& in, const Differentiated& done, AttendGradients& out) {
  const TensorView* w = in.find("kconv_w");
  if (w == nullptr) return;
  const Problem& p = in.problem;
  const Index heads = p.B * p.Hk, d = p.D;
  const SourceGradients& source = done.gradients.sources.back();
  const Documents documents = read_documents(in);
  const KeyConvolution convolution(in, *w, documents);
  const Index width = convolution.width();
  std::vector<std::vector<double>> dweight(static_cast<size_t>(heads));  // [W, D] each
  parallel_for(heads, [&](Index head, int) {
    Scratch& scratch = thread_scratch();
    const Scratch::Mark mark(scratch);
    const float* weight = convolution.weights(head, scratch);
    float* dy = scratch.take<float>(d).data();
    std::vector<double>& dw = dweight[static_cast<size_t>(head)];
    dw.assign(static_cast<size_t>(width * d), 0.0);
    float* dk = out.dk.as<float>() + head * p.M * d;
    const float* given = source.dk.as<float>() + head * p.M * d;
    for (Index first = 0; first < p.M; first += 256) {
      const Scratch::Mark run(scratch);
      convolution.run(
          head, first, std::min(p.M, first + 256), weight, scratch, [&](Index t, const float* key, const float* y) {
            for (Index i = 0; i < d; ++i) {
              const float open = 1 / (1 + std::exp(-y[i]));
              dk[t * d + i] += given[t * d + i];
              dy[i] = given[t * d + i] * open * (1 + y[i] * (1 - open));
            }
            for (Index l = 0; l < convolution.taken(head, t); ++l)
              for (Index i = 0; i < d; ++i) {
                dk[(t - l) * d + i] += weight[l * d + i] * dy[i];
                dw[static_cast<size_t>(l * d + i)] += static_cast<double>(dy[i]) * static_cast<double>(key[i - l * d]);
              }
          });
    }
    for (Index i = 0; i < p.M * p.Dv; ++i)
      out.dv.as<float>()[head * p.M * p.Dv + i] += source.dv.as<float>()[head * p.M * p.Dv + i];
  });
  Tensor dw(DType::f32, {p.Hk, d, width});
  for (Index g = 0; g < p.Hk; ++g)
    for (Index i = 0; i < d; ++i)
      for (Index l = 0; l < width; ++l) {
        double sum = 0;
        for (Index b = 0; b < p.B; ++b)
          sum += dweight[static_cast<size_t>(b * p.Hk + g)][static_cast<size_t>(l * d + i)];
        dw.as<float>()[(g * d + i) * width + l] = static_cast<float>(sum);
      }
  out.extra.emplace("kconv_w", std::move(dw));
}

Plan plan_flash_moba(const Params& p, const Inputs& in) {
  Plan plan = make_plan(in.problem, in.q, *in.kv, in.rule, Lanes::per_query_head);
  const Documents documents = apply_documents(in, plan);
  BlockRouter router{.block = p.integer("block"), .top_k = p.integer("top_k"), .ties = Ties::higher, .keys = in.kv};
  if (const TensorView* w = in.find("kconv_w")) {
    const std::shared_ptr<const KeyValues> keys = convolve_keys(in, *w, documents);
    router.keys = keys.get();
    router.source = add_keys(plan, *in.kv, keys);
  }
  route_blocks(router, in, documents, plan);
  return plan;
}

}  // namespace

const Mechanism& flash_moba() {
  static const Mechanism m{
      .name = "flash-moba",
      .title = "FlashMoBA: small blocks and a key convolution",
      .paper = "arXiv:2511.11571",
      .year = 2025,
      .stage = "summarize, select, attend",
      .training = Training::continued,
      .idea =
          "MoBA finds the block of a relevant key by the block's mean, in which block - 1 other keys are noise. With "
          "blocks\n"
          "of B tokens the signal stands sqrt(D/(2B)) times its strength above the noise: small blocks find more, "
          "and so do\n"
          "keys that a short convolution has made alike within a block. Not causal: every block competes, the own "
          "one too.",
      .equations = "k' = k + silu(y), y_t = sum over l < W of kconv_w_l·k_(t-l), or k' = k without kconv_w\n"
                   "kbar_b = mean of k' over block b;  s_tb = <q_t, kbar_b>;  equal scores: the higher block\n"
                   "causal: S(t) = own block of t and the top_k - 1 past blocks of largest s_tb, and j <= t\n"
                   "else: S(t) = the top_k blocks of largest s_tb\n"
                   "o_t = softmax over j in S(t) of scale·<q_t, k'_j>, times v_j",
      .cost = "N·M/(2·block)·D to choose and N·block·(top_k - 1/2)·(D + Dv) multiply-adds to attend (causal)",
      .causality = Causality::either,
      .square = false,
      .params = {integer("block", 128, 1, "tokens per block"),
                 integer("top_k", 8, 1, "blocks per query; when causal its own is one of them")},
      .extras = {{"kconv_w",
                  {DType::f32, DType::f16, DType::bf16},
                  {"Hk", "D", "3|5"},
                  false,
                  "[Hk, D, W], W 3 or 5: the keys' convolution over time; tap l meets the key l tokens back",
                  true},
                 document_spec()},
      .not_on_models = "",
      .plan = plan_flash_moba,
      .finish_gradient = finish_gradient_flash_moba,
  };
  return m;
}

}  // namespace heed::mechanism
