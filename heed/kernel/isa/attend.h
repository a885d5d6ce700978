// One pass of flash attention over up to four panels: scores, online softmax, weighted values.
// Included inside each instruction set's own namespace, after product.h.

inline constexpr float log2_e = 1.44269504f;
inline constexpr float minus_infinity = -__builtin_inff();
inline constexpr Index panel_vectors = panel_columns / W;

/// Where the weights of a row go: in place as f32, or rounded to bf16 for the bf16 product.
#if defined(__AVX512BF16__)
inline void store_weights(bf16* p, F a, F b) { _mm512_storeu_si512(p, (__m512i)_mm512_cvtne2ps_pbh(b, a)); }
#else
inline void store_weights(bf16* p, F a, F b) {
  for (int i = 0; i < W; ++i) p[i] = to_bf16(a[i]), p[W + i] = to_bf16(b[i]);
}
#endif
inline void store_weights(float* p, F a, F b) { store(p, a), store(p + W, b); }

/// Applies everything but the plain scale to a row of scores, in natural units.
inline void apply_rule(const PanelTask& t, Index rank, const std::uint64_t* words, float* s, Index columns) {
  const float* add = t.add == nullptr ? nullptr : t.add + rank * t.add_stride;
  for (Index j = 0; j < columns; j += W) {
    F x = load(s + j) * set1(t.scale);
    if (t.softcap != 0) x = set1(t.softcap) * tanh(x * set1(1 / t.softcap));
    if (add != nullptr) x = x + load(add + j);
    store(s + j, x);
  }
  if (t.gate < 0) return;
  // Landmark: inside a block the weights are softmax(tokens) · weight(landmark), so as one softmax
  // over everything a token's score is s - lse(block's tokens) + s(landmark).
  float most = minus_infinity;
  const auto attended = [&](Index j) { return j != t.gate && ((words[j / 64] >> (j % 64)) & 1) != 0; };
  for (Index j = 0; j < columns; ++j)
    if (attended(j) && s[j] > most) most = s[j];
  float sum = 0;
  for (Index j = 0; j < columns; ++j)
    if (attended(j)) sum += __builtin_expf(s[j] - most);
  const float shift = s[t.gate] - (most + __builtin_logf(sum));
  for (Index j = 0; j < columns; ++j)
    if (j != t.gate) s[j] += shift;
  s[t.gate] = minus_infinity;
}

/// Turns a row of scores into weights and brings the row's (m, l, acc) up to date; `factor` takes
/// scores to base 2. A row that sees nothing leaves its state alone and gets zero weights.
template <bool fine, class P>
inline void softmax_row(float* s, P* p, Index columns, float factor, const std::uint64_t* words, float& m, float& l,
                        float* acc, Index dvp) {
  F top = set1(minus_infinity);
  if (words == nullptr) {
    for (Index j = 0; j < columns; j += W) top = max(top, load(s + j));
  } else {
    // Masked scores are selected away, never added to: a column without data may hold anything.
    for (Index j = 0; j < columns; j += W) {
      const F x = select(static_cast<std::uint32_t>(words[j / 64] >> (j % 64)), load(s + j), set1(minus_infinity));
      store(s + j, x);
      top = max(top, x);
    }
  }
  const float most = max_lane(top) * factor;
  if (most == minus_infinity) {
    for (Index j = 0; j < columns; j += 2 * W) store_weights(p + j, zero(), zero());
    return;
  }
  if (most > m) {
    // The first columns find acc = 0 and l = 0, which no factor changes.
    if (m != minus_infinity) {
      const float shrink = __builtin_exp2f(m - most);
      l *= shrink;
      for (Index e = 0; e < dvp; e += W) store(acc + e, load(acc + e) * set1(shrink));
    }
    m = most;
  }
  const F reference = set1(-m), f = set1(factor);
  F sum0 = zero(), sum1 = zero();
  for (Index j = 0; j < columns; j += 2 * W) {
    const F a = exp2<fine>(fma(load(s + j), f, reference)), b = exp2<fine>(fma(load(s + j + W), f, reference));
    sum0 = sum0 + a, sum1 = sum1 + b;
    store_weights(p + j, a, b);
  }
  l += sum_lanes(sum0 + sum1);
}

template <class T>
void attend_rows(const PanelTask& t) {
  const Index dp = t.layout.dp, dvp = t.layout.dvp, panel_size = t.layout.panel_elements();
  constexpr Index pair = sizeof(T) == 2 ? 2 : 1;
  const bool plain = t.softcap == 0 && t.add == nullptr && t.gate < 0 && t.scale > 0;
  begin_products();
  alignas(64) float scores[group_rows<T> * chunk_columns];
  alignas(64) T weights[sizeof(T) == 2 ? group_rows<T> * chunk_columns : 1];

  for (Index first = 0; first < t.rows; first += group_rows<T>) {
    const Index rows = t.rows - first < group_rows<T> ? t.rows - first : group_rows<T>;
    // Panels that no row of the group sees are left out at both ends; masks that hide nothing are
    // dropped. Neither changes a bit: a hidden column has weight zero.
    Index begin = 0, end = t.panels;
    bool tested = t.words != nullptr;
    if (tested) {
      std::uint64_t any[4] = {}, all = ~std::uint64_t{0};
      for (Index i = first; i < first + rows; ++i)
        for (Index p = 0; p < t.panels; ++p) any[p] |= t.words[i * 4 + p];
      while (begin < end && any[begin] == 0) ++begin;
      while (end > begin && any[end - 1] == 0) --end;
      if (begin == end) continue;
      for (Index i = first; i < first + rows; ++i)
        for (Index p = begin; p < end; ++p) all &= t.words[i * 4 + p];
      tested = ~all != 0 || t.gate >= 0;
    }
    const Index panels = end - begin, columns = panels * panel_columns;

    const T* q[group_rows<T>];
    const T* w[group_rows<T>];
    float *s[group_rows<T>], *acc[group_rows<T>], *s_panel[group_rows<T>];
    Index rank[group_rows<T>];
    for (Index i = 0; i < rows; ++i) {
      rank[i] = t.row_list == nullptr ? t.first_row + first + i : t.row_list[first + i];
      q[i] = static_cast<const T*>(t.q) + rank[i] * dp;
      acc[i] = t.acc + rank[i] * dvp;
      s[i] = scores + i * chunk_columns;
      if constexpr (sizeof(T) == 2)
        w[i] = weights + i * chunk_columns;
      else
        w[i] = s[i];
    }
    for (Index p = 0; p < panels; ++p) {
      for (Index i = 0; i < rows; ++i) s_panel[i] = s[i] + p * panel_columns;
      product<T>(rows, q, static_cast<const T*>(t.k) + (begin + p) * panel_size, panel_columns * pair, dp, panel_columns,
                 s_panel, false);
    }
    for (Index i = 0; i < rows; ++i) {
      const std::uint64_t* words = tested ? t.words + (first + i) * 4 + begin : nullptr;
      float factor = t.scale * log2_e;
      if (!plain) {
        PanelTask shifted = t;
        if (t.add != nullptr) shifted.add = t.add + begin * panel_columns;
        if (t.gate >= 0) shifted.gate = t.gate - begin * panel_columns;
        apply_rule(shifted, first + i, words, s[i], columns);
        factor = log2_e;
      }
      softmax_row<sizeof(T) == 4>(s[i], const_cast<T*>(w[i]), columns, factor, words, t.m[rank[i]], t.l[rank[i]], acc[i],
                                  dvp);
    }
    product<T>(rows, w, static_cast<const T*>(t.v) + begin * panel_columns * dvp, dvp * pair, columns, dvp, acc, true);
  }
}
