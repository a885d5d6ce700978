#include "heed/mechanism/boundary_predictor.h"

#include <algorithm>
#include <cmath>

#include "heed/base/threads.h"
#include "heed/kernel/kernels.h"
#include "heed/mechanism/extra.h"
#include "heed/plan/block_scores.h"

namespace heed::mechanism {
namespace {

constexpr Index gaps_at_once = 64;  // their tokens' factors fit the second-level cache for common widths
constexpr float norm_eps = 1e-5f;

// The keys of all KV heads of tokens [first, first + count), side by side: out [count, C].
void read_keys(const KeyValues& kv, Index kv_heads, Index b, Index first, Index count, float* out) {
  const Index d = kv.layout().d;
  for (Index t = 0; t < count; ++t)
    for (Index h = 0; h < kv_heads; ++h) kv.read_key(b * kv_heads + h, first + t, out + (t * kv_heads + h) * d);
}

}  // namespace

std::vector<ExtraSpec> predictor_extras() {
  const std::vector<DType> real{DType::f32, DType::f16, DType::bf16};
  return {{"predictor_qkv", real, {"3", "*", "*"}, false, "[3, C, C], C = Hk·D: the predictor's W_q, W_k and W_v"},
          {"predictor_out", real, {"*", "*"}, false, "[C, C]: its W_o"},
          {"predictor_norm", real, {"2", "*"}, false, "[2, C]: gain and shift of its LayerNorm"},
          {"predictor_hidden", real, {"*", "*"}, false, "[4C + 2, H]: its hidden layer, the last row added"},
          {"predictor_score", real, {"*"}, false, "[H + 1]: from there to the logit, the last number added"}};
}

void check_predictor_heads(Index features, Index heads) {
  if (features % heads != 0)
    fail_usage("dhsa: predictor_heads = {}, expected a divisor of the {} features of a token's keys", heads, features);
}

std::optional<BoundaryPredictor> BoundaryPredictor::of(const Inputs& in, Index half_window, Index heads) {
  std::string missing, given;
  for (const ExtraSpec& spec : predictor_extras()) (in.find(spec.name) == nullptr ? missing : given) = spec.name;
  if (given.empty()) return std::nullopt;
  if (!missing.empty())
    fail("dhsa: tensor {} is missing, expected all of the predictor's or none: {} was given", missing, given);
  return BoundaryPredictor(in, half_window, heads);
}

BoundaryPredictor::BoundaryPredictor(const Inputs& in, Index half_window, Index heads)
    : kv_(in.kv), tokens_(in.problem.N), kv_heads_(in.problem.Hk), half_(half_window), heads_(heads),
      width_(in.problem.Hk * in.problem.D), hidden_(in.find("predictor_hidden")->shape[1]) {
  const Index c = width_;
  const auto expect = [&](const char* name, const Shape& shape, const char* meaning) {
    if (const Shape& got = in.find(name)->shape; got != shape)
      fail("{}: shape = {}, expected {}: {}", name, to_string(got), to_string(shape), meaning);
  };
  expect("predictor_qkv", {3, c, c}, "[3, C, C], C = Hk·D");
  expect("predictor_out", {c, c}, "[C, C], C = Hk·D");
  expect("predictor_norm", {2, c}, "[2, C], C = Hk·D");
  expect("predictor_hidden", {4 * c + 2, hidden_}, "[4C + 2, H], C = Hk·D");
  expect("predictor_score", {hidden_ + 1}, "[H + 1], H as predictor_hidden has it");
  check_predictor_heads(c, heads);

  for (Index i = 0; i < 3; ++i) qkv_[i] = matrix_panels(*in.find("predictor_qkv"), i);
  // The mean that LayerNorm takes away is linear in W_o: it is taken from W_o once.
  std::vector<float> out = values_of(*in.find("predictor_out"));
  for (Index f = 0; f < c; ++f) {
    double mean = 0;
    for (Index i = 0; i < c; ++i) mean += static_cast<double>(out[static_cast<size_t>(f * c + i)]);
    for (Index i = 0; i < c; ++i) {
      float& w = out[static_cast<size_t>(f * c + i)];
      w = static_cast<float>(static_cast<double>(w) - mean / static_cast<double>(c));
    }
  }
  for (Index h = 0; h < heads; ++h) out_.push_back(right_factor(out.data() + h * (c / heads) * c, c / heads, c));
  const std::vector<float> norm = values_of(*in.find("predictor_norm"));
  gain_.assign(norm.begin(), norm.begin() + c), shift_.assign(norm.begin() + c, norm.end());
  hidden_w_ = right_factor(values_of(*in.find("predictor_hidden")).data(), 4 * c + 2, hidden_);
  score_ = values_of(*in.find("predictor_score"));
}

std::vector<float> BoundaryPredictor::logits(Index b) const {
  std::vector<float> logits(static_cast<size_t>(tokens_), no_boundary);
  const Index first = half_ - 1, gaps = std::max<Index>(0, tokens_ - 2 * half_ + 1);
  parallel_for(ceil_div(gaps, gaps_at_once), [&](Index unit, int) {
    const Index at = unit * gaps_at_once;
    score_gaps(b, first + at, std::min(gaps_at_once, gaps - at), logits.data() + first + at, thread_scratch());
  });
  return logits;
}

// Windows share tokens, so all that a token brings to one is computed once: its three projections, its products with
// the tokens that are in a window with it, and, as W_o is linear, W_o's share of each head's value.
void BoundaryPredictor::score_gaps(Index b, Index first, Index count, float* out, Scratch& scratch) const {
  const Scratch::Mark mark(scratch);
  const Kernels& kernel = kernels();
  const Index c = width_, d = c / heads_, window = 2 * half_, tokens = count + window - 1, ld = round_up(c, 16);
  float* x = scratch.take<float>(tokens * c).data();
  read_keys(*kv_, kv_heads_, b, first - half_ + 1, tokens, x);
  float* qkv[3];
  for (int i = 0; i < 3; ++i) {
    qkv[i] = scratch.take<float>(tokens * ld).data();
    kernel.gemm_f32(tokens, c, c, x, c, qkv_[i].data(), qkv[i], ld, false);
  }

  // band [tokens, 2·window - 1, heads]: token i with token i + o, o = -(window - 1) … window - 1.
  const Index offsets = 2 * window - 1;
  const float scale = 1 / std::sqrt(static_cast<float>(d));
  float* band = scratch.take<float>(tokens * offsets * heads_).data();
  for (Index i = 0; i < tokens; ++i)
    for (Index j = std::max<Index>(0, i - window + 1); j < std::min(tokens, i + window); ++j)
      for (Index h = 0; h < heads_; ++h)
        band[(i * offsets + j - i + window - 1) * heads_ + h] =
            scale * kernel.dot(qkv[0] + i * ld + h * d, qkv[1] + j * ld + h * d, d);

  // folded [panels][tokens · heads, 64]: the right factor of every window's attention at once.
  const Index panels = ceil_div(c, panel_columns), terms = tokens * heads_;
  float* folded = scratch.take<float>(panels * terms * panel_columns).data();
  for (Index p = 0; p < panels; ++p)
    for (Index h = 0; h < heads_; ++h)
      kernel.gemm_f32(tokens, panel_columns, d, qkv[2] + h * d, ld,
                      out_[static_cast<size_t>(h)].data() + p * d * panel_columns,
                      folded + (p * terms + h) * panel_columns, heads_ * panel_columns, false);

  const Index inputs = 4 * c + 2, ldh = round_up(hidden_, panel_columns);
  float* rows = scratch.take<float>(count * inputs).data();
  float* weights = scratch.take<float>(window * window * heads_).data();
  for (Index g = 0; g < count; ++g) {
    window_weights(band, g, weights);
    features(weights, folded + g * heads_ * panel_columns, tokens, rows + g * inputs, scratch);
  }
  float* hidden = scratch.take<float>(count * ldh).data();
  kernel.gemm_f32(count, hidden_, inputs, rows, inputs, hidden_w_.data(), hidden, ldh, false);
  for (Index g = 0; g < count; ++g) {
    float* row = hidden + g * ldh;
    for (Index i = 0; i < hidden_; ++i) row[i] = std::max(0.0f, row[i]);
    out[g] = kernel.dot(row, score_.data(), hidden_) + score_.back();
  }
}

// Softmax weights of the window that begins at token `first` of the band: [2ω, 2ω · heads], row i over tokens j of each
// head, a token's heads side by side as in `folded`.
void BoundaryPredictor::window_weights(const float* band, Index first, float* weights) const {
  const Index window = 2 * half_, offsets = 2 * window - 1;
  for (Index i = 0; i < window; ++i) {
    const float* s = band + ((first + i) * offsets + window - 1 - i) * heads_;  // of the window's first token
    float* w = weights + i * window * heads_;
    for (Index h = 0; h < heads_; ++h) {
      float most = s[h], sum = 0;
      for (Index j = 1; j < window; ++j) most = std::max(most, s[j * heads_ + h]);
      for (Index j = 0; j < window; ++j) sum += w[j * heads_ + h] = std::exp(s[j * heads_ + h] - most);
      for (Index j = 0; j < window; ++j) w[j * heads_ + h] /= sum;
    }
  }
}

// [l, r, |l - r|, l∘r, cos(l, r), 1] of one window, whose tokens' factors stand in the panels of `folded`.
void BoundaryPredictor::features(const float* weights, const float* folded, Index tokens, float* out,
                                 Scratch& scratch) const {
  const Scratch::Mark mark(scratch);
  const Kernels& kernel = kernels();
  const Index c = width_, window = 2 * half_, ld = round_up(c, panel_columns), terms = tokens * heads_;
  float* y = scratch.take<float>(window * ld).data();
  for (Index p = 0; p < ld / panel_columns; ++p)
    kernel.gemm_f32(window, panel_columns, window * heads_, weights, window * heads_,
                    folded + p * terms * panel_columns, y + p * panel_columns, ld, false);
  float *l = out, *r = out + c, *apart = r + c, *product = apart + c;
  std::fill_n(l, 2 * c, 0.0f);
  for (Index i = 0; i < window; ++i) {
    const float *row = y + i * ld, variance = kernel.dot(row, row, c) / static_cast<float>(c);
    const float share = 1 / (std::sqrt(variance + norm_eps) * static_cast<float>(half_));
    float* mean = i < half_ ? l : r;
    for (Index f = 0; f < c; ++f) mean[f] += share * row[f];
  }
  for (Index f = 0; f < c; ++f) {
    l[f] = l[f] * gain_[static_cast<size_t>(f)] + shift_[static_cast<size_t>(f)];
    r[f] = r[f] * gain_[static_cast<size_t>(f)] + shift_[static_cast<size_t>(f)];
    apart[f] = std::abs(l[f] - r[f]), product[f] = l[f] * r[f];
  }
  const float lengths = std::sqrt(kernel.dot(l, l, c)) * std::sqrt(kernel.dot(r, r, c));
  out[4 * c] = kernel.dot(l, r, c) / std::max(lengths, 1e-8f);
  out[4 * c + 1] = 1;
}

namespace {

// One head's column sums, apart: `near` [N, 2ω - 1], weights of rows j … j + 2ω - 2 for key j, and `far` [N], the sum
// over all later rows. A row is not yet among the rows r >= i + ω of a gap near to its key.
struct Columns {
  std::vector<double> far;
  std::vector<float> near;
};

Columns sum_columns_of(const Inputs& in, Index b, Index head, Index near) {
  const Problem& p = in.problem;
  const Index n = p.N, stride = round_up(n, panel_columns);
  Columns sums{std::vector<double>(static_cast<size_t>(n), 0.0),
               std::vector<float>(static_cast<size_t>(n * near), 0.0f)};
  constexpr Index rows_at_once = 12;  // fills every instruction set's register tile
  BlockScores scores{ScoreKeys::of(*in.kv, b * p.Hk + head / p.group()), in.rule.scale, 1};
  scores.mass_stride = stride;
  Scratch& scratch = thread_scratch();
  const Scratch::Mark mark(scratch);
  float* weights = scratch.take<float>(rows_at_once * stride).data();
  for (Index first = 0; first < n; first += rows_at_once) {
    const RowBlock rows{
        .b = b, .kv_head = head / p.group(), .head = head, .first = first, .rows = std::min(rows_at_once, n - first)};
    std::fill_n(weights, rows.rows * stride, 0.0f);
    scores.weigh(in.q, rows, 1, true, nullptr, weights, scratch);
    for (Index r = first; r < first + rows.rows; ++r) {
      const float* w = weights + (r - first) * stride;
      const Index split = std::max<Index>(0, r - near + 1);
      for (Index j = 0; j < split; ++j) sums.far[static_cast<size_t>(j)] += static_cast<double>(w[j]);
      for (Index j = split; j <= r; ++j) sums.near[static_cast<size_t>(j * near + r - j)] = w[j];
    }
  }
  return sums;
}

}  // namespace

NamedTensors boundary_lessons(const Inputs& in, Index half_window) {
  const Problem& p = in.problem;
  const Index n = p.N, w = half_window, near = 2 * w - 1, c = p.Hk * p.D;
  std::vector<Columns> heads(static_cast<size_t>(p.B * p.Hq));
  parallel_for(p.B * p.Hq, [&](Index unit, int) {
    heads[static_cast<size_t>(unit)] = sum_columns_of(in, unit / p.Hq, unit % p.Hq, near);
  });
  Tensor keys(DType::f32, {p.B, n, c}), labels(DType::f32, {p.B, n});
  for (Index b = 0; b < p.B; ++b) {
    std::vector<double> far(static_cast<size_t>(n), 0.0), band(static_cast<size_t>(n * near), 0.0);
    for (Index h = 0; h < p.Hq; ++h) {
      const Columns& one = heads[static_cast<size_t>(b * p.Hq + h)];
      for (size_t j = 0; j < far.size(); ++j) far[j] += one.far[j];
      for (size_t j = 0; j < band.size(); ++j) band[j] += static_cast<double>(one.near[j]);
    }
    // What rows from `row` on give to keys [begin, end).
    const auto attention = [&](Index begin, Index end, Index row) {
      double sum = 0;
      for (Index j = begin; j < end; ++j) {
        sum += far[static_cast<size_t>(j)];
        for (Index r = std::max(row, j); r < j + near; ++r) sum += band[static_cast<size_t>(j * near + r - j)];
      }
      return sum / static_cast<double>(p.Hq);
    };
    parallel_for(n, [&](Index i, int) {
      read_keys(*in.kv, p.Hk, b, i, 1, keys.as<float>() + (b * n + i) * c);
      float& label = labels.as<float>()[b * n + i];
      label = -1;
      if (i < 2 * w - 1 || i >= n - 2 * w) return;
      constexpr double epsilon = 1e-6;
      const double past = attention(i - w + 1, i + 1, i + w), future = attention(i + 1, i + w + 1, i + w);
      label = std::max(past, future) + epsilon >= 2 * (std::min(past, future) + epsilon) ? 1.0f : 0.0f;
    });
  }
  NamedTensors lessons;
  lessons.emplace("keys", std::move(keys));
  lessons.emplace("labels", std::move(labels));
  return lessons;
}

}  // namespace heed::mechanism
