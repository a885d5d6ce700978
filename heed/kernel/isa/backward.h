// The backward pass of a few rows over up to four panels: weights again, then four products with them.
// Included inside each instruction set's own namespace, after attend.h.

/// Scores to natural units as apply_rule makes them, keeping the soft-cap's derivative at them.
inline void apply_rule_and_slope(const PanelTask& t, const float* add, float* s, float* slope, Index from, Index to) {
  for (Index j = from; j < to; j += W) {
    F x = load(s + j) * set1(t.scale);
    if (t.softcap != 0) {
      const F y = tanh(x * set1(1 / t.softcap));
      store(slope + j, set1(1) - y * y);
      x = set1(t.softcap) * y;
    }
    if (add != nullptr) x = x + load(add + j);
    store(s + j, x);
  }
}

/// Columns [from, to) of a row: scores s become weights and dp, the gradients of weights, those of scores. factor
/// takes scores to base 2, as lse is.
inline void weights_and_gradients(float* s, float* dp, Index from, Index to, float factor, const std::uint64_t* words,
                                  float lse, float delta) {
  const F f = set1(factor), reference = set1(-lse), d = set1(delta);
  for (Index j = from; j < to; j += W) {
    const F x = words == nullptr ? load(s + j) : visible_score(s, j, words);
    const F p = exp2<true>(fma(x, f, reference));
    store(s + j, p);
    store(dp + j, p * (load(dp + j) - d));
  }
}

/// As weights_and_gradients, for columns in groups. A token's weight is w = (its share a of its group)·(its landmark's
/// weight); with r = Σ a·dp over the group, its score has the gradient w·(dp - r) and the landmark's (Σ w)·(r - delta).
inline void grouped_weights_and_gradients(float* s, float* dp, Index from, Index to, float factor,
                                          const std::uint64_t* words, const Groups& groups, float lse, float delta) {
  if (words != nullptr)
    for (Index j = from; j < to; j += W) store(s + j, visible_score(s, j, words));
  alignas(64) float x[chunk_columns + W], y[chunk_columns + W];  // a group's scores and dp, whole vectors
  Index done = from;
  const auto zeros_up_to = [&](Index end) {
    for (; done < end; ++done) s[done] = dp[done] = 0;
  };
  for (Index g = 0; g < groups.count; ++g) {
    const Index gate = groups.gate[g], start = g == 0 ? groups.begin : groups.gate[g - 1] + 1;
    const Index begin = start > from ? start : from, n = gate - begin;
    if (gate < from || gate >= to || s[gate] == minus_infinity) continue;
    F top = set1(minus_infinity);
    for (Index j = 0; j < n; ++j) x[j] = s[begin + j], y[j] = dp[begin + j];
    for (Index j = n; j < round_up(n, Index{W}); ++j) x[j] = minus_infinity, y[j] = 0;
    for (Index j = 0; j < n; j += W) top = max(top, load(x + j));
    const float highest = max_lane(top) * factor;
    if (highest == minus_infinity) continue;  // no token is seen
    const F f = set1(factor), reference = set1(-highest);
    F sum = zero(), weighted = zero();
    for (Index j = 0; j < n; j += W) {
      const F e = exp2<true>(fma(load(x + j), f, reference));
      sum = sum + e, weighted = fma(e, load(y + j), weighted);
      store(x + j, e);
    }
    const float total = sum_lanes(sum), weight = __builtin_exp2f(s[gate] * factor - lse),
                r = sum_lanes(weighted) / total;
    const F share = set1(weight / total), mean = set1(r);
    for (Index j = 0; j < n; j += W) {
      const F p = load(x + j) * share;
      store(x + j, p);
      store(y + j, p * (load(y + j) - mean));
    }
    zeros_up_to(begin);
    for (Index j = 0; j < n; ++j) s[begin + j] = x[j], dp[begin + j] = y[j];
    s[gate] = 0, dp[gate] = weight * (r - delta);
    done = gate + 1;
  }
  zeros_up_to(to);
}

inline void attend_backward(const BackwardTask& b) {
  const PanelTask& t = b.scores;
  const Index d = t.layout.d, dv = t.layout.dv, qp = b.qp, dvp = b.dvp, columns = t.panels * panel_columns;
  const bool plain = t.softcap == 0 && t.add == nullptr && t.scale > 0;
  constexpr Index group = group_rows<float>, stride = BackwardTask::stride;
  begin_products();
  alignas(64) float slope[chunk_columns];
  Groups groups;
  if (t.gates != nullptr) list_groups(t, groups);
  const auto clear = [](float* x, Index from, Index to) {
    for (Index j = from; j < to; ++j) x[j] = 0;
  };

  // Rows: weights, gradients of scores, and what they give to the queries.
  Index begin = columns, end = 0;  // columns that some row sees
  for (Index first = 0; first < t.rows; first += group) {
    const Index rows = t.rows - first < group ? t.rows - first : group;
    auto [from, to, tested] = seen_strip(t, first, rows, strip<float>);
    if (t.gates != nullptr) {
      const Index groups_begin = groups.begin / strip<float> * strip<float>;
      const Index groups_end = round_up(groups.end(), strip<float>);
      from = groups_begin > from ? groups_begin : from, to = groups_end < to ? groups_end : to;
    }
    if (from >= to) from = to = 0;
    begin = from < to && from < begin ? from : begin;
    end = to > end ? to : end;
    const float *q[group], *dout[group], *weights[group];
    float *p[group], *ds[group], *dq[group], *p_panel[group], *ds_panel[group];
    for (Index i = 0; i < rows; ++i) {
      const Index rank = t.row_list == nullptr ? t.first_row + first + i : t.row_list[first + i];
      q[i] = b.q + (first + i) * qp, dout[i] = b.dout + (first + i) * dvp;
      p[i] = b.p + (first + i) * stride, ds[i] = b.ds + (first + i) * stride;
      weights[i] = ds[i] + from;
      dq[i] = b.dq + rank * qp;
      clear(p[i], 0, from), clear(ds[i], 0, from), clear(p[i], to, columns), clear(ds[i], to, columns);
    }
    for (Index column = from; column < to;) {
      const Index panel = column / panel_columns, inner = column % panel_columns;
      const Index width = (panel + 1) * panel_columns < to ? panel_columns - inner : to - column;
      for (Index i = 0; i < rows; ++i) p_panel[i] = p[i] + column, ds_panel[i] = ds[i] + column;
      const float* k = static_cast<const float*>(t.k) + panel * d * panel_columns + inner;
      const float* v = b.values + panel * dv * panel_columns + inner;
      product<float>(rows, q, k, panel_columns, d, width, p_panel, false);
      product<float>(rows, dout, v, panel_columns, dv, width, ds_panel, false);
      column += width;
    }
    for (Index i = 0; i < rows; ++i) {
      const std::uint64_t* words = tested ? t.words + (first + i) * t.word_stride : nullptr;
      float factor = t.scale * log2_e;
      if (!plain) {
        const float* add = t.add == nullptr ? nullptr : t.add + (first + i) * t.add_stride;
        apply_rule_and_slope(t, add, p[i], slope, from, to);
        factor = log2_e;
      }
      const float lse = b.lse[first + i] * log2_e, delta = b.delta[first + i];
      if (t.gates == nullptr) weights_and_gradients(p[i], ds[i], from, to, factor, words, lse, delta);
      else grouped_weights_and_gradients(p[i], ds[i], from, to, factor, words, groups, lse, delta);
      if (b.dcolumn != nullptr)
        for (Index j = from; j < to; j += W) store(b.dcolumn + j, load(b.dcolumn + j) + load(ds[i] + j));
      if (b.dscore != nullptr)
        for (Index j = 0; j < columns; j += W) store(b.dscore + (first + i) * stride + j, load(ds[i] + j));
      if (t.softcap != 0)
        for (Index j = from; j < to; j += W) store(ds[i] + j, load(ds[i] + j) * load(slope + j));
    }
    if (from < to) product<float>(rows, weights, b.keys + from * qp, qp, to - from, qp, dq, true);
  }
  if (begin >= end) return;

  // Columns: what all rows give to keys and values.
  transposed_product(end - begin, b.p + begin, stride, b.dout, dvp, t.rows, dvp, b.dv + begin * dvp, dvp);
  transposed_product(end - begin, b.ds + begin, stride, b.q, qp, t.rows, qp, b.dk + begin * qp, qp);
}
