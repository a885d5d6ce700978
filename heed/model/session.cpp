// A sequence through a model: chunks, phases, scoring, and what was spent.

#include <algorithm>
#include <cmath>
#include <limits>

#include "heed/base/threads.h"
#include "heed/model/forward.h"

namespace heed::model {
namespace {

void check_layers(const MechanismUse& use, const ModelInfo& info) {
  for (Index layer : use.layers) {
    if (layer < 0 || layer >= info.layers) fail_usage("layer = {}, expected 0 … {}", layer, info.layers - 1);
    if (info.local[static_cast<size_t>(layer)])
      fail_usage("layer = {} has the model's own sliding window, expected a layer with global attention", layer);
  }
  if (use.calibration == nullptr || use.calibration->layers.empty()) return;
  if (const Index last = use.calibration->layers.rbegin()->first; last >= info.layers)
    fail("calibration of {}: holds layer {}, expected 0 … {}: it was made for another model", use.calibration->model,
         last, info.layers - 1);
}

void check_mechanism(const Mechanism& m) {
  const std::string what = "expected a mechanism that can replace causal self-attention";
  if (!m.not_on_models.empty()) fail_usage("{} cannot run on a model: {}; {}", m.name, m.not_on_models, what);
  if (m.causality == Causality::refused) fail_usage("{} cannot run on a model: it is not causal; {}", m.name, what);
}

// What only shows when a plan is made, such as parameters that do not go together or learned tensors that are
// missing, should be known before a document is read: a plan of a few tokens is made for a trial.
void try_plan(const Chosen& chosen, const ModelInfo& info, Index layer, DType kv, bool decoding) {
  constexpr Index tokens = 64;
  const Mechanism& m = *chosen.mechanism;
  Inputs in;
  in.problem = {.B = 1,
                .Hq = info.heads,
                .Hk = info.kv_heads,
                .N = decoding ? 1 : tokens,
                .M = tokens,
                .D = info.head_size,
                .Dv = info.head_size,
                .causal = true};
  in.extra = chosen.extra(layer);
  for (const ExtraSpec& extra : m.extras)
    if (extra.required && in.find(extra.name) == nullptr)
      fail_usage("{} cannot run on a model: layer {} lacks the tensor {}, expected a --calibration that has it", m.name,
                 layer, extra.name);
  check_extras(m, in.extra, in.problem);
  const std::vector<float> zeros(static_cast<size_t>(tokens * info.heads * info.head_size), 0.0f);
  KeyValues few(info.kv_heads, info.head_size, info.head_size, tokens, kv);
  const TensorView keys(zeros.data(), DType::f32, {info.kv_heads, tokens, info.head_size});
  few.append(keys, keys);
  std::any memory;
  in.rule.scale = 1, in.prompt = tokens, in.kv = &few, in.memory = &memory;
  in.q = Queries({zeros.data(), DType::f32, {1, info.heads, in.problem.N, info.head_size}}, few.arithmetic());
  m.plan(chosen.params, in);
}

bool covers(Phase phase, Phase part) { return (static_cast<int>(phase) & static_cast<int>(part)) != 0; }

constexpr Index score_rows = 256;   // hidden states scored at a time
constexpr Index score_panels = 8;   // panels of outputs that one unit multiplies

}  // namespace

struct Session::State {
  State(const Model& m, const SessionOptions& o, Index context)
      : model(m), options(o), forward(m, o.kv, context, o.rewind), chosen(o.use.call, o.use.calibration.get()),
        dense(MechanismCall{"dense", {}}) {
    const ModelInfo& info = m.info();
    if (info.window > 0)
      window.emplace(MechanismCall{"streaming", {{"sink", "0"}, {"window", std::to_string(info.window)}}});
    replaced.assign(static_cast<size_t>(info.layers), false);
    for (Index i : o.use.layers) replaced[static_cast<size_t>(i)] = true;
    if (o.use.layers.empty())
      for (size_t i = 0; i < replaced.size(); ++i) replaced[i] = !info.local[i];
    capacity = context;
    // Layers differ only by what was learned of them.
    for (Index i = 0; i < info.layers; ++i) {
      if (!replaced[static_cast<size_t>(i)]) continue;
      try_plan(chosen, info, i, o.kv, o.use.phase == Phase::decode);
      if (!o.use.calibration) break;
    }
  }

  const Model& model;
  SessionOptions options;
  Forward forward;
  Chosen chosen, dense;
  std::optional<Chosen> window;
  std::vector<bool> replaced;
  Index capacity = 0;

  Buffer<float> x, q, mixed, hidden, last, scores;
  std::vector<Token> hidden_tokens;
  std::vector<float> logits;
  double total_s = 0;

  const Chosen& chosen_for(Index layer, Phase phase) const {
    const size_t i = static_cast<size_t>(layer);
    if (model.info().local[i]) return *window;
    const Mechanism& m = *chosen.mechanism;
    const bool able = phase == Phase::prefill || !m.square || (m.decodes != nullptr && m.decodes(chosen.params));
    return replaced[i] && covers(options.use.phase, phase) && able ? chosen : dense;
  }
  Forward::Attending attending(Index layer) const {
    const bool same = &chosen_for(layer, Phase::prefill) == &chosen_for(layer, Phase::decode);
    return {.counted = replaced[static_cast<size_t>(layer)], .drop = options.drop && same};
  }
  bool whole_prompt(Phase phase) const {
    if (phase != Phase::prefill || std::find(replaced.begin(), replaced.end(), true) == replaced.end()) return false;
    return forward.inputs_observer || (chosen.mechanism->square && covers(options.use.phase, phase));
  }

  void check_tokens(const std::vector<Token>& tokens) const;
  void feed(const std::vector<Token>& tokens, Phase phase, bool keep_hidden, const Progress& progress);
  void feed_chunk(const Token* tokens, Index n, Phase phase, float* hidden_out);
  void feed_by_layers(const std::vector<Token>& tokens, bool keep_hidden, const Progress& progress);
  void layer_step(Index layer, Index n, Index position, Phase phase, float* rows);
  void finish_output(const float* rows, Index n, float* hidden_out);
  void account();
  std::vector<double> score(const Progress& progress);
  void score_slice(const Activations& rows, const Token* targets, double* nll);
};

void Session::State::check_tokens(const std::vector<Token>& tokens) const {
  const Index n = static_cast<Index>(tokens.size()), vocabulary = model.info().vocabulary;
  if (n == 0) fail("tokens: none, expected at least one");
  if (n > capacity - forward.size())
    fail("tokens = {}, expected at most {}: the context holds {} tokens, {} are taken", n, capacity - forward.size(),
         capacity, forward.size());
  for (size_t i = 0; i < tokens.size(); ++i)
    if (tokens[i] < 0 || tokens[i] >= vocabulary) fail("token {} = {}, expected 0 … {}", i, tokens[i], vocabulary - 1);
}

void Session::State::feed(const std::vector<Token>& tokens, Phase phase, bool keep_hidden, const Progress& progress) {
  check_tokens(tokens);
  const Index n = static_cast<Index>(tokens.size()), before = forward.size();
  const bool by_layers = whole_prompt(phase);
  if (by_layers && before > 0)
    fail("{}: {} tokens are held already, expected none: it needs the whole prompt at once", chosen.mechanism->name,
         before);
  if (keep_hidden) {
    hidden.reach(n * forward.width());
    hidden_tokens = tokens;
  }
  if (phase == Phase::prefill) forward.begin_prompt(before + n);
  else forward.begin_decode();
  const Stopwatch watch(total_s);
  try {
    if (by_layers) {
      feed_by_layers(tokens, keep_hidden, progress);
    } else {
      for (Index first = 0; first < n; first += options.chunk) {
        const Index rows = std::min(options.chunk, n - first);
        feed_chunk(tokens.data() + first, rows, phase, keep_hidden ? hidden.data() + first * forward.width() : nullptr);
        account();
        if (progress && !progress(first + rows, n)) throw Interrupted{};
      }
    }
    const Stopwatch output(forward.stats.output_s);
    forward.logits(last.data(), logits);
  } catch (...) {
    forward.give_up();
    hidden_tokens.clear();
    throw;
  }
  account();
}

void Session::State::feed_chunk(const Token* tokens, Index n, Phase phase, float* hidden_out) {
  const Index position = forward.size();
  x.reach(n * forward.width());
  forward.embed(tokens, n, x.data());
  for (Index layer = 0; layer < model.info().layers; ++layer) layer_step(layer, n, position, phase, x.data());
  finish_output(x.data(), n, hidden_out);
}

void Session::State::layer_step(Index layer, Index n, Index position, Phase phase, float* rows) {
  q.reach(n * forward.query_width()), mixed.reach(n * forward.query_width());
  forward.project(layer, rows, n, position, q.data());
  forward.attend(layer, chosen_for(layer, phase), q.data(), n, mixed.data(), attending(layer));
  forward.finish(layer, mixed.data(), n, rows);
}

// Layer by layer over the whole prompt: attention that needs all queries at once sees them all,
// linear layers go chunk by chunk.
void Session::State::feed_by_layers(const std::vector<Token>& tokens, bool keep_hidden, const Progress& progress) {
  const Index n = static_cast<Index>(tokens.size()), layers = model.info().layers;
  const Index width = forward.width(), query_width = forward.query_width();
  x.reach(n * width), q.reach(n * query_width), mixed.reach(n * query_width);
  const auto chunks = [&](const auto& body) {
    for (Index first = 0; first < n; first += options.chunk) body(first, std::min(options.chunk, n - first));
  };
  chunks([&](Index first, Index rows) { forward.embed(tokens.data() + first, rows, x.data() + first * width); });
  for (Index layer = 0; layer < layers; ++layer) {
    const Chosen& how = chosen_for(layer, Phase::prefill);
    if (how.mechanism->square || forward.inputs_observer) {
      chunks([&](Index first, Index rows) {
        forward.project(layer, x.data() + first * width, rows, first, q.data() + first * query_width);
      });
      forward.attend(layer, how, q.data(), n, mixed.data(), attending(layer));
      chunks([&](Index first, Index rows) {
        forward.finish(layer, mixed.data() + first * query_width, rows, x.data() + first * width);
      });
    } else {
      chunks(
          [&](Index first, Index rows) { layer_step(layer, rows, first, Phase::prefill, x.data() + first * width); });
    }
    account();
    if (progress && !progress(n * (layer + 1) / layers, n)) throw Interrupted{};
  }
  chunks([&](Index first, Index rows) {
    finish_output(x.data() + first * width, rows, keep_hidden ? hidden.data() + first * width : nullptr);
  });
}

// The output norm: of every row when they are kept, of the last one in any case.
void Session::State::finish_output(const float* rows, Index n, float* hidden_out) {
  const Stopwatch watch(forward.stats.output_s);
  const Index width = forward.width();
  last.reach(width);
  if (hidden_out == nullptr) {
    forward.output_norm(rows + (n - 1) * width, 1, last.data());
  } else {
    forward.output_norm(rows, n, hidden_out);
    std::copy_n(hidden_out + (n - 1) * width, width, last.data());
  }
}

void Session::State::account() {
  SessionStats& s = forward.stats;
  s.kv_bytes = forward.kv_bytes();
  s.scratch_bytes = heed::scratch_bytes();
  Index bytes = s.kv_bytes + s.scratch_bytes + forward.activation_bytes();
  for (const Buffer<float>* b : {&x, &q, &mixed, &hidden, &last, &scores}) bytes += b->bytes();
  s.peak_bytes = std::max(s.peak_bytes, bytes);
}

std::vector<double> Session::State::score(const Progress& progress) {
  const Index n = static_cast<Index>(hidden_tokens.size()), width = forward.width();
  if (n == 0) fail("score: no hidden states, expected a prefill that keeps them before");
  std::vector<double> nll(static_cast<size_t>(n - 1));
  Activations rows;
  for (Index first = 0; first < n - 1; first += score_rows) {
    const Index count = std::min(score_rows, n - 1 - first);
    rows.assign(hidden.data() + first * width, count, model.info().width, model.arithmetic(), width);
    score_slice(rows, hidden_tokens.data() + first + 1, nll.data() + first);
    account();
    if (progress && !progress(first + count, n - 1)) throw Interrupted{};
  }
  return nll;
}

// nll[r] = ln Σ exp(logits of row r) - logit of its target. The vocabulary is cut at fixed places and
// the pieces are merged in order, so the result is the same for any number of threads.
void Session::State::score_slice(const Activations& rows, const Token* targets, double* nll) {
  struct Piece {
    float maximum, sum;
  };
  const Linear& output = model.weights().output;
  const Index n = rows.rows(), pieces = ceil_div(output.panels(), score_panels), columns = score_panels * panel_columns;
  std::vector<Piece> parts(static_cast<size_t>(pieces * n), Piece{-std::numeric_limits<float>::infinity(), 0});
  std::vector<float> target_logits(static_cast<size_t>(n));
  scores.reach(threads() * n * columns);
  parallel_for(pieces, [&](Index piece, int thread) {
    float* y = scores.data() + thread * n * columns;
    const Index first = piece * columns, count = std::min(columns, output.outputs() - first);
    output.apply_panels(rows, 0, n, piece * score_panels, ceil_div(count, panel_columns), y, columns);
    for (Index r = 0; r < n; ++r) {
      Piece& part = parts[static_cast<size_t>(piece * n + r)];
      kernels().log_sum_exp(y + r * columns, count, part.maximum, part.sum);
      const Index at = targets[r] - first;
      if (at >= 0 && at < count) target_logits[static_cast<size_t>(r)] = y[r * columns + at];
    }
  });
  for (Index r = 0; r < n; ++r) {
    double most = -std::numeric_limits<double>::infinity(), sum = 0;
    for (Index piece = 0; piece < pieces; ++piece)
      most = std::max<double>(most, parts[static_cast<size_t>(piece * n + r)].maximum);
    for (Index piece = 0; piece < pieces; ++piece) {
      const Piece& part = parts[static_cast<size_t>(piece * n + r)];
      sum += part.sum * std::exp(part.maximum - most);
    }
    nll[r] = most + std::log(sum) - target_logits[static_cast<size_t>(r)];
  }
}

Session::Session(const Model& model, const SessionOptions& asked) {
  const ModelInfo& info = model.info();
  SessionOptions options = asked;
  if (options.context == 0) options.context = info.context;
  if (options.context < 1 || options.context > info.context)
    fail("context = {} tokens, expected 1 … {}, the model's", options.context, info.context);
  if (options.chunk < 1) fail_usage("chunk = {}, expected >= 1", options.chunk);
  if (options.rewind < 1) fail_usage("rewind = {}, expected >= 1", options.rewind);
  if (options.kv != DType::f32 && options.kv != DType::bf16 && options.kv != DType::i8)
    fail_usage("kv = {}, expected f32, bf16 or i8", name_of(options.kv));
  options.kv = stored_kv(model.arithmetic(), options.kv);
  check_layers(options.use, info);
  check_mechanism(find_mechanism(options.use.call.name));
  reset_scratch_peak();  // what earlier sessions used is not this one's
  state_ = std::make_unique<State>(model, options, options.context);
}

Session::~Session() = default;

const std::vector<float>& Session::prefill(const std::vector<Token>& tokens, const Progress& progress) {
  state_->feed(tokens, Phase::prefill, false, progress);
  return state_->logits;
}

const std::vector<float>& Session::decode(Token token) {
  state_->feed({token}, Phase::decode, false, {});
  return state_->logits;
}

const std::vector<float>& Session::prefill_keeping_hidden(const std::vector<Token>& tokens, const Progress& progress) {
  state_->hidden_tokens.clear();
  state_->feed(tokens, Phase::prefill, true, progress);
  return state_->logits;
}

std::vector<double> Session::score_hidden(const Progress& progress) { return state_->score(progress); }

Index Session::size() const { return state_->forward.size(); }

void Session::truncate(Index size) {
  if (size < 0 || size > this->size()) fail("size = {}, expected 0 … {}", size, this->size());
  state_->forward.truncate(size);
}

const SessionStats& Session::stats() const {
  SessionStats& s = state_->forward.stats;
  s.other_s = std::max(0.0, state_->total_s - s.attention_s - s.linear_s - s.output_s);
  return s;
}

void Session::reset_stats() {
  state_->forward.stats = {};
  state_->total_s = 0;
}

void Session::observe_inputs(InputsObserver observer) {
  if (!observer) {
    state_->forward.inputs_observer = {};
    return;
  }
  state_->forward.inputs_observer = [this, observer = std::move(observer)](Index layer, const Inputs& in) {
    if (state_->replaced[static_cast<size_t>(layer)]) observer(layer, in);
  };
}

void Session::observe_plans(PlanObserver observer) { state_->forward.observer = std::move(observer); }

}  // namespace heed::model
