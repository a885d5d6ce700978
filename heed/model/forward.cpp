#include "heed/model/forward.h"

#include <algorithm>
#include <cmath>

#include "heed/base/threads.h"

namespace heed::model {
namespace {

// Rows that a thread takes at a time in row-by-row work.
constexpr Index row_step = 16;

template <class Body>
void for_rows(Index n, const Body& body) {
  parallel_for(ceil_div(n, row_step), [&](Index unit, int) {
    for (Index r = unit * row_step; r < std::min(n, (unit + 1) * row_step); ++r) body(r);
  });
}

Index padded(Index n) { return round_up(n, 16); }

}  // namespace

Chosen::Chosen(const MechanismCall& call, const Calibration* calibration)
    : mechanism(&find_mechanism(call.name)),
      params(mechanism->name, mechanism->params, (calibration == nullptr ? call : calibration->complete(call)).params) {
  if (calibration == nullptr) return;
  const auto views_of = [&](const NamedTensors& tensors) {
    Extra views;
    for (const ExtraSpec& spec : mechanism->extras)  // a file may hold more than the mechanism reads: a record
      if (const auto tensor = tensors.find(spec.name); tensor != tensors.end())
        views.emplace(spec.name, tensor->second.view());
    return views;
  };
  shared = views_of(calibration->all);
  for (const auto& [layer, tensors] : calibration->layers) {
    Extra views = views_of(tensors);
    views.insert(shared.begin(), shared.end());
    own.emplace(layer, std::move(views));
  }
}

Forward::Forward(const Model& model, DType kv, Index context, Index rewind)
    : w_(model.weights()), info_(model.info()), arithmetic_(w_.arithmetic), context_(context),
      width_(padded(info_.width)), query_width_(padded(info_.heads * info_.head_size)),
      kv_width_(padded(info_.kv_heads * info_.head_size)), ffn_width_(padded(info_.ffn)),
      global_(info_.head_size, info_.rope_base, w_.rope_pairs),
      local_(info_.head_size, info_.rope_base_local, w_.rope_pairs), rewind_(rewind) {
  keys_.reserve(static_cast<size_t>(info_.layers));
  memories_.resize(static_cast<size_t>(info_.layers)), dropping_.resize(static_cast<size_t>(info_.layers));
  for (Index i = 0; i < info_.layers; ++i)
    keys_.emplace_back(info_.kv_heads, info_.head_size, info_.head_size, context, kv);
}

void Forward::begin_prompt(Index size) {
  for (std::any& memory : memories_) memory.reset();
  for (Dropping& d : dropping_) d.unchecked = true;  // a mechanism may see further in a longer prompt
  earlier_prompt_ = prompt_, prompt_ = size, floor_ = this->size();
  by_file_ = false, arithmetic_ = w_.arithmetic;
}

void Forward::begin_decode() {
  earlier_prompt_ = prompt_, floor_ = size();
  by_file_ = w_.output.has_file();
  arithmetic_ = by_file_ ? DType::f32 : w_.arithmetic;
}

void Forward::give_up() {
  prompt_ = earlier_prompt_;
  truncate(floor_);
}

void Forward::truncate(Index size) {
  for (Index layer = 0; layer < info_.layers; ++layer)
    check_held(layer, dropping_[static_cast<size_t>(layer)].reaches, size);
  for (std::any& memory : memories_) memory.reset();
  for (Dropping& d : dropping_) d.panels = 0;
  for (KeyValues& kv : keys_)
    if (kv.size() > size) kv.truncate(size);
}

// Of the tokens before `position`, none that was dropped may be seen from there on.
void Forward::check_held(Index layer, const Reaches& reaches, Index position) const {
  const KeyValues& kv = keys_[static_cast<size_t>(layer)];
  if (kv.released_panels() == 0) return;
  for (Index head = 0; head < info_.kv_heads; ++head)
    for (Index begin = 0; begin < std::min(position, kv.size()); begin += panel_columns) {
      const Index end = std::min(begin + panel_columns, position);
      if (kv.released(head, begin / panel_columns) && (!reaches || reaches(head, position, begin, end)))
        fail("tokens {} … {} of layer {} were dropped, expected none that tokens from {} on can see: at most {} may be "
             "taken back, or all; a second prompt must not see further than the first",
             begin, end - 1, layer, position, rewind_);
    }
}

// Frees panels that neither what follows can see, nor what would follow after some tokens were taken back: those that
// rewind_ allows for, or those being fed.
void Forward::drop_unreachable(Index layer) {
  Dropping& d = dropping_[static_cast<size_t>(layer)];
  KeyValues& kv = keys_[static_cast<size_t>(layer)];
  const Index held = kv.size(), panels = held / panel_columns;
  if (panels == d.panels) return;
  d.panels = panels;
  const auto droppable = [&](Index head, Index panel) {
    const Index begin = panel * panel_columns, back = std::max<Index>(0, held - rewind_);
    const Index position = begin < floor_ ? std::min(back, floor_) : back;
    return !kv.released(head, panel) && !d.reaches(head, position, begin, begin + panel_columns);
  };
  for (Index head = 0; head < info_.kv_heads; ++head)
    for (Index first = 0, end; first < panels; first = end + 1) {
      for (end = first; end < panels && droppable(head, end);) ++end;
      if (end > first) kv.release(head, first, end);
    }
}

void Forward::embed(const Token* tokens, Index n, float* x) {
  for_rows(n, [&](Index r) {
    float* row = x + r * width_;
    w_.embedding.read_row(tokens[r], row);
    for (Index i = 0; i < info_.width; ++i) row[i] *= info_.embedding_scale;
  });
}

void Forward::norm(const float* x, const std::vector<float>& weight, float* out) const {
  kernels().rms_norm(x, weight.data(), static_cast<Index>(weight.size()), static_cast<float>(info_.rms_eps), out);
}

// sum += x, or the norm of x where the architecture has one after the sub-layer.
void Forward::add(float* x, const std::vector<float>& weight, float* sum) const {
  if (!weight.empty()) norm(x, weight, x);
  for (Index i = 0; i < info_.width; ++i) sum[i] += x[i];
}

void Forward::multiply(std::initializer_list<Linear::Job> jobs) {
  const Stopwatch watch(stats.linear_s);
  if (by_file_ && activations_.rows() == 1) Linear::apply_row(activations_.f32(), {jobs.begin(), jobs.size()});
  else Linear::apply_all(activations_, {jobs.begin(), jobs.size()});
}

void Forward::project(Index layer, const float* x, Index n, Index position, float* q) {
  const LayerWeights& w = w_.layers[static_cast<size_t>(layer)];
  const bool local = info_.local[static_cast<size_t>(layer)];
  Rope& rope = local ? local_ : global_;
  rope.reach(position + n, context_);
  k_.reach(n * kv_width_), v_.reach(n * kv_width_);

  activations_.make(n, info_.width, arithmetic_, [&](Index r, float* out) { norm(x + r * width_, w.attn_norm, out); });
  multiply({{&w.q, q, query_width_}, {&w.k, k_.data(), kv_width_}, {&w.v, v_.data(), kv_width_}});
  const Index d = info_.head_size;
  const auto prepare = [&](float* row, Index heads, const std::vector<float>& weight, Index r) {
    if (!weight.empty())
      for (Index h = 0; h < heads; ++h) norm(row + h * d, weight, row + h * d);
    rope.turn(row, heads, position + r);
  };
  for_rows(n, [&](Index r) {
    prepare(q + r * query_width_, info_.heads, w.q_norm, r);
    prepare(k_.data() + r * kv_width_, info_.kv_heads, w.k_norm, r);
  });

  const Stopwatch watch(stats.attention_s);
  const Shape shape{info_.kv_heads, n, d}, stride{d, kv_width_, 1};
  keys_[static_cast<size_t>(layer)].append({k_.data(), DType::f32, shape, stride},
                                           {v_.data(), DType::f32, shape, stride});
}

void Forward::attend(Index layer, const Chosen& how, const float* q, Index n, float* out, Attending now) {
  const Stopwatch watch(stats.attention_s);
  const KeyValues& kv = keys_[static_cast<size_t>(layer)];
  const Index d = info_.head_size;
  Inputs in;
  in.problem = {
      .B = 1, .Hq = info_.heads, .Hk = info_.kv_heads, .N = n, .M = kv.size(), .D = d, .Dv = d, .causal = true};
  in.rule.scale = static_cast<float>(1 / std::sqrt(static_cast<double>(d)));
  in.q = Queries({q, DType::f32, {1, info_.heads, n, d}, {n * query_width_, d, query_width_, 1}}, kv.arithmetic());
  in.kv = &kv;
  in.memory = &memories_[static_cast<size_t>(layer)];
  in.prompt = prompt_ > 0 ? prompt_ : kv.size();
  in.extra = how.extra(layer);
  if (inputs_observer) inputs_observer(layer, in);
  double plan_s = 0;
  const Plan plan = [&] {
    const Stopwatch planning(plan_s);
    return how.mechanism->plan(how.params, in);
  }();
  if (observer) observer(layer, plan);
  if (plan.rows_per_head() != n)
    fail("{}: {} query rows a head, expected {}: one for each token of a model", how.mechanism->name,
         plan.rows_per_head(), n);

  Dropping& dropping = dropping_[static_cast<size_t>(layer)];
  if (dropping.unchecked) check_held(layer, plan.reaches, kv.size() - n);
  dropping.unchecked = false;
  AttendStats done;
  if (plan.row_tokens.empty()) {
    done = heed::attend(plan, {.o = out, .stride_h = d, .stride_row = query_width_});
  } else {
    lanes_.reach(info_.heads * n * d);
    done = heed::attend(plan, {.o = lanes_.data(), .stride_h = n * d, .stride_row = d});
    scatter(plan, n, out);
  }
  stats.plan_s += plan_s + done.plan_s;
  done.plan_s += plan_s;
  stats.kv_read_bytes += done.bytes_read;
  if (now.counted) {
    stats.attend += done;
    stats.dense_pairs += dense_pairs(in.problem);
  }
  if (now.drop && plan.reaches) {
    dropping.reaches = plan.reaches;
    drop_unreachable(layer);
  }
}

// Rows in a mechanism's own order go home to their tokens.
void Forward::scatter(const Plan& plan, Index n, float* out) {
  const Index d = info_.head_size;
  for_rows(n, [&](Index r) {
    for (Index head = 0; head < info_.heads; ++head) {
      const Index lane = plan.lanes == Lanes::per_query_head ? head : head / plan.problem.group();
      const auto& tokens = plan.row_tokens[static_cast<size_t>(lane)];
      const Index token = tokens.empty() ? r : tokens[static_cast<size_t>(r)];
      std::copy_n(lanes_.data() + (head * n + r) * d, d, out + token * query_width_ + head * d);
    }
  });
}

void Forward::finish(Index layer, const float* mixed, Index n, float* x) {
  const LayerWeights& w = w_.layers[static_cast<size_t>(layer)];
  projected_.reach(n * width_), gate_.reach(n * ffn_width_), up_.reach(n * ffn_width_);
  float *projected = projected_.data(), *gate = gate_.data(), *up = up_.data();

  activations_.assign(mixed, n, info_.heads * info_.head_size, arithmetic_, query_width_);
  multiply({{&w.o, projected, width_}});
  activations_.make(n, info_.width, arithmetic_, [&](Index r, float* out) {
    add(projected + r * width_, w.post_attn_norm, x + r * width_);
    norm(x + r * width_, w.ffn_norm, out);
  });
  multiply({{&w.gate, gate, ffn_width_}, {&w.up, up, ffn_width_}});
  const auto activate = w_.gelu ? kernels().gelu_mul : kernels().silu_mul;
  activations_.make(n, info_.ffn, arithmetic_,
                    [&](Index r, float* out) { activate(gate + r * ffn_width_, up + r * ffn_width_, info_.ffn, out); });
  multiply({{&w.down, projected, width_}});
  for_rows(n, [&](Index r) { add(projected + r * width_, w.post_ffn_norm, x + r * width_); });
}

void Forward::output_norm(const float* x, Index n, float* out) {
  for_rows(n, [&](Index r) { norm(x + r * width_, w_.output_norm, out + r * width_); });
}

void Forward::logits(const float* normed, std::vector<float>& out) {
  const Index columns = padded(info_.vocabulary);
  logits_.reach(columns);
  activations_.assign(normed, 1, info_.width, arithmetic_, width_);
  const Linear::Job job{&w_.output, logits_.data(), columns};
  if (by_file_) Linear::apply_row(activations_.f32(), {&job, 1});
  else Linear::apply_all(activations_, {&job, 1});
  out.assign(logits_.data(), logits_.data() + info_.vocabulary);
}

Index Forward::kv_bytes() const {
  Index sum = 0;
  for (const KeyValues& kv : keys_) sum += kv.bytes();
  return sum;
}

Index Forward::activation_bytes() const {
  Index sum = activations_.bytes() + global_.bytes() + local_.bytes();
  for (const Buffer<float>* b : {&k_, &v_, &projected_, &gate_, &up_, &lanes_, &logits_}) sum += b->bytes();
  return sum;
}

}  // namespace heed::model
