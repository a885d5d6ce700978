#include "cli/attend_reference.h"

#include <algorithm>
#include <cmath>

namespace heed::cli {
namespace {

// Features of one column of a source, in f64.
class Columns {
 public:
  Columns(const CheckedCall& call, const AttendInput& in, const Plan& plan)
      : in_(in), plan_(plan), kv_(*call.inputs.kv), wide_(static_cast<size_t>(std::max(in.k.shape[3], in.v.shape[3]))) {
  }

  void keys(const Source& source, const SourceView& view, Index b, Index kv_head, Index column, double* out) {
    const bool input = view.keys == kv_.keys(b * plan_.problem.Hk + kv_head);
    read(input ? &in_.k : nullptr, b, kv_head, column, plan_.problem.D, out,
         [&](Index f) { return element(source.layout, view.keys, source.layout.key_offset(column, f)); });
  }
  void values(const Source& source, const SourceView& view, Index b, Index kv_head, Index column, double* out) {
    const bool input = view.values == kv_.values(b * plan_.problem.Hk + kv_head);
    read(input ? &in_.v : nullptr, b, kv_head, column, plan_.problem.Dv, out,
         [&](Index e) { return element(source.layout, view.values, source.layout.value_offset(column, e)); });
  }

 private:
  static double element(const PanelLayout& layout, const void* data, Index at) {
    return static_cast<double>(layout.dtype == DType::f32 ? static_cast<const float*>(data)[at]
                                                          : to_f32(static_cast<const bf16*>(data)[at]));
  }
  template <class Packed>
  void read(const TensorView* given, Index b, Index head, Index column, Index n, double* out, Packed packed) {
    if (given == nullptr) {
      for (Index i = 0; i < n; ++i) out[i] = packed(i);
      return;
    }
    read_f32(given->at({b, head, column}), given->dtype, given->stride[3], n, wide_.data());
    std::copy_n(wide_.data(), n, out);
  }

  const AttendInput& in_;
  const Plan& plan_;
  const KeyValues& kv_;
  std::vector<float> wide_;
};

}  // namespace

std::optional<ReferenceRows> ReferenceRows::of(const CheckedCall& call, const AttendInput& in, const Plan& plan) {
  const Problem& p = plan.problem;
  if (!plan.rule.plain() || !plan.output_by_token) return {};
  ReferenceRows rows;
  rows.tokens_ = {0, p.N / 3, p.N / 2, p.N - 1};
  rows.tokens_.erase(std::unique(rows.tokens_.begin(), rows.tokens_.end()), rows.tokens_.end());
  Columns columns(call, in, plan);
  const TensorView& queries = plan.queries.view();
  std::vector<float> q(static_cast<size_t>(p.D));
  std::vector<double> k(static_cast<size_t>(p.D)), v(static_cast<size_t>(p.Dv));
  bool gated = false;
  walk(plan, [&](const RowBlock& block, const std::vector<Tile>& tiles) {
    for (const Tile& tile : tiles) {
      gated = gated || tile.gated;
      const Source& source = plan.sources[static_cast<size_t>(tile.source)];
      const SourceView& view = source.views[static_cast<size_t>(
          source.per_query_head ? block.b * p.Hq + block.head : block.b * p.Hk + block.kv_head)];
      for (Index i = 0; i < tile.rows.count; ++i) {
        const Index token = block.token(tile.rows[i]);
        const auto at = std::find(rows.tokens_.begin(), rows.tokens_.end(), token);
        if (at == rows.tokens_.end()) continue;
        read_f32(queries.at({block.b, block.head, token}), queries.dtype, queries.stride[3], p.D, q.data());
        Sum& sum = rows.sums_[{block.b * p.Hq + block.head, static_cast<size_t>(at - rows.tokens_.begin())}];
        sum.value.resize(static_cast<size_t>(p.Dv));
        for (Index c = 0; c < tile.columns.count; ++c) {
          if (!sees(plan, block, tile, i, c)) continue;
          const Index column = tile.columns[c];
          columns.keys(source, view, block.b, block.kv_head, column, k.data());
          columns.values(source, view, block.b, block.kv_head, column, v.data());
          double s = 0;
          for (size_t f = 0; f < k.size(); ++f) s += static_cast<double>(q[f]) * k[f];
          s *= static_cast<double>(plan.rule.scale);
          if (view.log_weight != nullptr) s += static_cast<double>(view.log_weight[column]);
          const double w = std::exp(s);
          sum.weight += w;
          for (size_t e = 0; e < v.size(); ++e) sum.value[e] += w * v[e];
        }
      }
    }
  });
  if (gated) return {};
  return rows;
}

double ReferenceRows::error(const std::function<double(Index, size_t, Index)>& got) const {
  double worst = 0, most = 0;
  for (const auto& [key, sum] : sums_) {
    if (sum.weight <= 0) continue;
    for (size_t e = 0; e < sum.value.size(); ++e) {
      const double want = sum.value[e] / sum.weight;
      most = std::max(most, std::abs(want));
      worst = std::max(worst, std::abs(want - got(key.first, key.second, static_cast<Index>(e))));
    }
  }
  return worst / most;
}

}  // namespace heed::cli
