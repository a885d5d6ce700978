#include "support/gradients.h"

#include <doctest/doctest.h>
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>

namespace heed::test {

Gradients naive_gradients(const Case& c, const MetBy& met, const Sample& dout, const GradientOptions& options) {
  const auto& s = c.size;
  const double scale = options.scale != 0 ? options.scale : 1 / std::sqrt(static_cast<double>(s.D));
  const auto zeros = [](Index n) { return std::vector<double>(static_cast<size_t>(n), 0.0); };
  const Index others = options.other_k == nullptr ? 0 : s.B * s.Hk;
  Index extra = 0;
  if (others > 0) extra = options.other_k->view().shape[2];
  Gradients g;
  g.o = zeros(s.B * s.Hq * s.N * s.Dv), g.dq = zeros(s.B * s.Hq * s.N * s.D);
  g.dk = zeros(s.B * s.Hk * s.M * s.D), g.dv = zeros(s.B * s.Hk * s.M * s.Dv);
  g.dother_k = zeros(others * extra * s.D), g.dother_v = zeros(others * extra * s.Dv);
  g.dsinks = zeros(static_cast<Index>(options.sinks.size())), g.dlog_weight = zeros(options.log_weights);
  if (options.bias != nullptr) g.dbias = zeros(options.bias_batches * options.bias_heads * s.N * s.M);

  for (Index b = 0; b < s.B; ++b)
    for (Index h = 0; h < s.Hq; ++h)
      for (Index t = 0; t < s.N; ++t) {
        const Index kv = c.kv_head(h), p = position(c, t), row = (b * s.Hq + h) * s.N + t;
        const std::vector<Met> all = met(b, h, t);
        const auto bias_at = [&](Index token) {
          const Index bb = options.bias_batches == 1 ? 0 : b, bh = options.bias_heads == 1 ? 0 : h;
          return static_cast<size_t>(((bb * options.bias_heads + bh) * s.N + t) * s.M + token);
        };
        const auto mean = [&](const Met& m, auto at, const Sample* other, Index i) {
          if (m.other >= 0) return other->get(b, kv, m.other, i);
          double sum = 0;
          for (const Index token : m.tokens) sum += at(token);
          return sum / static_cast<double>(m.tokens.size());
        };
        const size_t n = all.size(), d = static_cast<size_t>(s.D), dv = static_cast<size_t>(s.Dv);
        std::vector<double> keys(n * d), values(n * dv), score(n), slope(n, 1.0), weight(n), dweight(n);
        double top = options.sinks.empty() ? -INFINITY : options.sinks[static_cast<size_t>(h)];
        for (size_t x = 0; x < n; ++x) {
          double dot = 0;
          for (size_t i = 0; i < d; ++i) {
            const Index f = static_cast<Index>(i);
            keys[x * d + i] = mean(all[x], [&](Index j) { return c.k_at(b, kv, j, f); }, options.other_k, f);
            dot += keys[x * d + i] * c.q_at(b, h, t, f);
          }
          for (size_t e = 0; e < dv; ++e) {
            const Index f = static_cast<Index>(e);
            values[x * dv + e] = mean(all[x], [&](Index j) { return c.v_at(b, kv, j, f); }, options.other_v, f);
          }
          double y = scale * dot;
          if (options.softcap > 0) {
            const double z = std::tanh(y / options.softcap);
            y = options.softcap * z, slope[x] = 1 - z * z;
          }
          y += all[x].log_weight;
          if (!options.alibi.empty())
            y += options.alibi[static_cast<size_t>(h)] * static_cast<double>(all[x].tokens[0] - p);
          if (options.bias != nullptr)
            y += options.bias->get(options.bias_batches == 1 ? 0 : b, options.bias_heads == 1 ? 0 : h, t,
                                   all[x].tokens[0]);
          score[x] = y;
          top = std::max(top, y);
        }
        if (top == -INFINITY) continue;
        double sum = options.sinks.empty() ? 0 : std::exp(options.sinks[static_cast<size_t>(h)] - top);
        const double sink_weight = sum;
        for (size_t x = 0; x < n; ++x) sum += weight[x] = std::exp(score[x] - top);
        double delta = 0;
        for (size_t x = 0; x < n; ++x) {
          weight[x] /= sum;
          for (size_t e = 0; e < dv; ++e) {
            g.o[static_cast<size_t>(row) * dv + e] += weight[x] * values[x * dv + e];
            dweight[x] += dout.get(b, h, t, static_cast<Index>(e)) * values[x * dv + e];
          }
          delta += weight[x] * dweight[x];
        }
        g.loss += delta;
        if (!options.sinks.empty()) g.dsinks[static_cast<size_t>(h)] -= sink_weight / sum * delta;
        for (size_t x = 0; x < n; ++x) {
          const Met& m = all[x];
          const double dscore = weight[x] * (dweight[x] - delta);
          if (m.weight_of >= 0) g.dlog_weight[static_cast<size_t>(m.weight_of)] += dscore;
          if (options.bias != nullptr) g.dbias[bias_at(m.tokens[0])] += dscore;
          const double ds = dscore * slope[x] * scale;
          // To what a column is made of.
          const auto give = [&](std::vector<double>& tokens, std::vector<double>& other, Index width, Index i,
                                double value) {
            if (m.other >= 0) other[static_cast<size_t>(((b * s.Hk + kv) * extra + m.other) * width + i)] += value;
            for (const Index token : m.tokens)
              tokens[static_cast<size_t>(((b * s.Hk + kv) * s.M + token) * width + i)] +=
                  value / static_cast<double>(m.tokens.size());
          };
          for (Index f = 0; f < s.D; ++f) {
            g.dq[static_cast<size_t>(row * s.D + f)] += ds * keys[x * d + static_cast<size_t>(f)];
            give(g.dk, g.dother_k, s.D, f, ds * c.q_at(b, h, t, f));
          }
          for (Index e = 0; e < s.Dv; ++e) give(g.dv, g.dother_v, s.Dv, e, weight[x] * dout.get(b, h, t, e));
        }
      }
  return g;
}

MetBy met_keys(const Case& c, const Sees& sees) {
  return [&c, sees](Index b, Index h, Index t) {
    std::vector<Met> all;
    for (Index j = 0; j < c.size.M; ++j)
      if (sees(b, h, t, j)) all.push_back({{j}});
    return all;
  };
}

MetBy met_by_plan(const Plan& plan) {
  const Problem p = plan.problem;
  const auto met = std::make_shared<std::vector<std::vector<Met>>>(static_cast<size_t>(p.B * p.Hq * p.N));
  walk(plan, [&](const RowBlock& rows, const std::vector<Tile>& tiles) {
    const Index heads = plan.lanes == Lanes::per_query_head ? 1 : p.group();
    for (const Tile& tile : tiles) {
      const Source& source = plan.sources[static_cast<size_t>(tile.source)];
      const SourceView& view = source.views[static_cast<size_t>(source.per_query_head ? rows.b * p.Hq + rows.head
                                                                                      : rows.b * p.Hk + rows.kv_head)];
      for (Index r = 0; r < tile.rows.count; ++r)
        for (Index x = 0; x < tile.columns.count; ++x) {
          if (!sees(plan, rows, tile, r, x)) continue;
          const Index column = tile.columns[x];
          Met m;
          if (tile.source == 0) {
            m.tokens = {column};
          } else if (view.members == nullptr) {
            m.other = column;
          } else {
            const auto& [tokens, begins] = *view.members;
            const Index begin = begins.empty() ? column : begins[static_cast<size_t>(column)];
            const Index end = begins.empty() ? column + 1 : begins[static_cast<size_t>(column) + 1];
            for (Index i = begin; i < end; ++i) m.tokens.push_back(tokens[static_cast<size_t>(i)]);
          }
          if (view.log_weight != nullptr) m.log_weight = static_cast<double>(view.log_weight[column]);
          for (Index h = rows.head; h < rows.head + heads; ++h)
            (*met)[static_cast<size_t>((rows.b * p.Hq + h) * p.N + rows.token(tile.rows[r]))].push_back(m);
        }
    }
  });
  return [met, p](Index b, Index h, Index t) { return (*met)[static_cast<size_t>((b * p.Hq + h) * p.N + t)]; };
}

std::string gradient_difference(const char* name, const Tensor& got, const std::vector<double>& want,
                                double tolerance) {
  if (got.data() == nullptr || got.size() != static_cast<Index>(want.size()))
    return fmt::format("{}: {} instead of {} numbers", name, got.data() == nullptr ? 0 : got.size(), want.size());
  double largest = 1e-2;  // gradients that cancel to nothing leave rounding behind
  for (const double x : want) largest = std::max(largest, std::fabs(x));
  for (size_t i = 0; i < want.size(); ++i) {
    const double x = static_cast<double>(got.as<float>()[i]);
    // Written so that a NaN fails.
    if (!(std::fabs(x - want[i]) <= tolerance * largest))
      return fmt::format("{}[{}] of {}: {} instead of {}, largest {}", name, i, want.size(), x, want[i], largest);
  }
  return "";
}

PlanGradients backward(const Plan& plan, const TensorView& dout) {
  const Problem& p = plan.problem;
  const Index rows = plan.rows_per_head();
  Tensor o(DType::f32, {p.B, p.Hq, rows, p.Dv}), lse(DType::f32, {p.B, p.Hq, rows});
  attend(plan, {o.as<float>(), p.Hq * rows * p.Dv, rows * p.Dv, p.Dv, lse.as<float>()});
  PlanGradients g = attend_backward(plan, o.view(), lse.view(), dout);
  fold(plan, g);
  return g;
}

AttendGradients gradients(const std::string& call, const AttendInput& in, const Sample& dout) {
  return attend_backward(MechanismCall::parse(call), in, dout.view());
}

namespace {

void check_three(const Case& c, const Tensor& dq, const Tensor& dk, const Tensor& dv, const Gradients& want) {
  const double tolerance = gradient_tolerance(c.arithmetic);
  CAPTURE(c.describe());
  CHECK_GRADIENT("dq", dq, want.dq, tolerance);
  CHECK_GRADIENT("dk", dk, want.dk, tolerance);
  CHECK_GRADIENT("dv", dv, want.dv, tolerance);
}

}  // namespace

void check_gradients(const Case& c, const AttendGradients& got, const Gradients& want) {
  check_three(c, got.dq, got.dk, got.dv, want);
}
void check_gradients(const Case& c, const PlanGradients& got, const Gradients& want) {
  check_three(c, got.dq, got.sources[0].dk, got.sources[0].dv, want);
}

bool same_bits(const Tensor& a, const Tensor& b) {
  return a.shape() == b.shape() && std::memcmp(a.data(), b.data(), static_cast<size_t>(a.bytes())) == 0;
}
bool same_bits(const AttendGradients& a, const AttendGradients& b) {
  return same_bits(a.dq, b.dq) && same_bits(a.dk, b.dk) && same_bits(a.dv, b.dv);
}

ForwardBackward forward_backward(const std::string& call, const AttendInput& in, const Sample& dout) {
  const MechanismCall by = MechanismCall::parse(call);
  ForwardBackward got;
  got.gradients = attend_backward(by, in, dout.view(), &got.out);
  CHECK(same_bits(got.out.o, attend(call, in).o));
  const AttendGradients again = attend_backward(by, in, dout.view(), got.out.o.view(), got.out.lse.view());
  CHECK(same_bits(again, got.gradients));
  return got;
}

}  // namespace heed::test
