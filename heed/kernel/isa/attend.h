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

/// Applies everything but the plain scale to columns [from, to) of a row of scores, in natural units. `add`:
/// the row's addends, or null.
inline void apply_rule(const PanelTask& t, const float* add, float* s, Index from, Index to) {
  for (Index j = from; j < to; j += W) {
    F x = load(s + j) * set1(t.scale);
    if (t.softcap != 0) x = set1(t.softcap) * tanh(x * set1(1 / t.softcap));
    if (add != nullptr) x = x + load(add + j);
    store(s + j, x);
  }
}

/// Masked scores are selected away, never added to: a column without data may hold anything.
inline F visible_score(const float* s, Index j, const std::uint64_t* words) {
  return select(static_cast<std::uint32_t>(words[j / 64] >> (j % 64)), load(s + j), set1(minus_infinity));
}

/// A row has met a score of `most`, base 2: its reference grows with it.
inline void raise_maximum(float most, float& m, float& l, float* acc, Index dvp) {
  if (most <= m) return;
  // The first columns find acc = 0 and l = 0, which no factor changes.
  if (m != minus_infinity) {
    const float shrink = __builtin_exp2f(m - most);
    l *= shrink;
    for (Index e = 0; e < dvp; e += W) store(acc + e, load(acc + e) * set1(shrink));
  }
  m = most;
}

/// Turns columns [from, to) of a row of scores into weights and brings the row's (m, l, acc) up to date;
/// `factor` takes scores to base 2. A row that sees nothing leaves its state alone and gets zero weights.
template <bool fine, class P>
inline void softmax_row(float* s, P* p, Index from, Index to, float factor, const std::uint64_t* words, float& m,
                        float& l, float* acc, Index dvp) {
  F top = set1(minus_infinity);
  if (words == nullptr) {
    F other = top;  // two chains
    for (Index j = from; j < to; j += 2 * W) top = max(top, load(s + j)), other = max(other, load(s + j + W));
    top = max(top, other);
  } else {
    for (Index j = from; j < to; j += W) {
      const F x = visible_score(s, j, words);
      store(s + j, x);
      top = max(top, x);
    }
  }
  const float most = max_lane(top) * factor;
  if (most == minus_infinity) {
    for (Index j = from; j < to; j += 2 * W) store_weights(p + j, zero(), zero());
    return;
  }
  raise_maximum(most, m, l, acc, dvp);
  const F reference = set1(-m), f = set1(factor);
  F sum0 = zero(), sum1 = zero();
  for (Index j = from; j < to; j += 2 * W) {
    const F a = exp2<fine>(fma(load(s + j), f, reference)), b = exp2<fine>(fma(load(s + j + W), f, reference));
    sum0 = sum0 + a, sum1 = sum1 + b;
    store_weights(p + j, a, b);
  }
  l += sum_lanes(sum0 + sum1);
}

/// The groups of a task: [begin, gate[0]], (gate[0], gate[1]], …, each closed by its gate.
struct Groups {
  Index begin = 0, count = 0;
  std::int32_t gate[chunk_columns];
  Index end() const { return count == 0 ? begin : gate[count - 1] + 1; }
};

inline void list_groups(const PanelTask& t, Groups& groups) {
  groups.begin = t.gates_begin;
  for (Index p = 0; p < t.panels; ++p)
    for (std::uint64_t left = t.gates[p]; left != 0; left &= left - 1)
      groups.gate[groups.count++] = static_cast<std::int32_t>(p * panel_columns + __builtin_ctzll(left));
}

/// The first n lanes.
inline std::uint32_t lanes_below(Index n) { return (std::uint32_t{1} << n) - 1; }

/// As softmax_row, for columns in groups: the gates compete in the row's softmax, and what one wins is
/// shared out by a softmax over the tokens of its group. As one softmax over everything a token's score
/// is s - lse(group's tokens) + s(gate); here every exponential is taken once.
template <bool fine, class P>
inline void softmax_groups(float* s, P* p, Index from, Index to, float factor, const std::uint64_t* words,
                           const Groups& groups, float& m, float& l, float* acc, Index dvp) {
  if (words != nullptr)
    for (Index j = from; j < to; j += W) store(s + j, visible_score(s, j, words));
  const auto zeros = [s](Index begin, Index end) {
    for (Index j = begin; j < end; ++j) s[j] = 0;
  };
  const auto begin_of = [&](Index g) {
    const Index begin = g == 0 ? groups.begin : groups.gate[g - 1] + 1;
    return begin > from ? begin : from;
  };
  // Tokens fill whole vectors and the first lanes of one more.
  const auto whole_of = [](Index begin, Index gate) { return begin + (gate - begin) / W * W; };

  alignas(64) float weight[chunk_columns + W], highest[chunk_columns];
  float most = minus_infinity;
  for (Index g = 0; g < groups.count; ++g) {
    const Index gate = groups.gate[g], begin = begin_of(g);
    weight[g] = highest[g] = minus_infinity;
    if (gate < from || gate >= to || s[gate] == minus_infinity) continue;
    const Index whole = whole_of(begin, gate);
    F top = select(lanes_below(gate - whole), load(s + whole), set1(minus_infinity));
    for (Index j = begin; j < whole; j += W) top = max(top, load(s + j));
    highest[g] = max_lane(top) * factor;
    if (highest[g] == minus_infinity) continue;  // no token is seen
    weight[g] = s[gate] * factor;
    most = weight[g] > most ? weight[g] : most;
  }
  if (most == minus_infinity) {
    for (Index j = from; j < to; j += 2 * W) store_weights(p + j, zero(), zero());
    return;
  }
  raise_maximum(most, m, l, acc, dvp);
  for (Index i = 0; i < W; ++i) weight[groups.count + i] = minus_infinity;
  for (Index g = 0; g < groups.count; g += W) store(weight + g, exp2<fine>(load(weight + g) + set1(-m)));

  const F f = set1(factor);
  Index done = from;
  for (Index g = 0; g < groups.count; ++g) {
    if (weight[g] == 0) continue;  // not seen, or nothing beside others
    const Index gate = groups.gate[g], begin = begin_of(g), whole = whole_of(begin, gate);
    zeros(done, begin);
    const std::uint32_t tail = lanes_below(gate - whole);
    const F reference = set1(-highest[g]), behind = load(s + whole);
    const F last = select(tail, exp2<fine>(fma(behind, f, reference)), zero());
    F sum = last;
    for (Index j = begin; j < whole; j += W) {
      const F x = exp2<fine>(fma(load(s + j), f, reference));
      sum = sum + x;
      store(s + j, x);
    }
    const F share = set1(weight[g] / sum_lanes(sum));
    for (Index j = begin; j < whole; j += W) store(s + j, load(s + j) * share);
    store(s + whole, select(tail, last * share, behind));
    s[gate] = 0;
    l += weight[g];
    done = gate + 1;
  }
  zeros(done, to);
  if constexpr (sizeof(P) == 2)
    for (Index j = from; j < to; j += 2 * W) store_weights(p + j, load(s + j), load(s + j + W));
}

/// Columns at the ends that no row sees are left out in strips of this many: whole pairs of vectors, so that a
/// row's sums run the same way whatever the strips, and what a tile of the bf16 product needs.
template <class T>
inline constexpr Index strip = W == 16 || sizeof(T) == 2 ? 32 : 16;

/// Columns [from, to) that some of the rows [first, first + rows) of a task see, from and to multiples of `step`; and
/// whether any of the rows does not see them all. Strips that no row of these sees are left out at both ends; masks
/// that hide nothing are dropped. Neither changes a bit: a hidden column has weight zero.
struct Seen {
  Index from, to;
  bool tested;
};
inline Seen seen_strip(const PanelTask& t, Index first, Index rows, Index step) {
  if (t.words == nullptr) return {0, t.panels * panel_columns, false};
  if (t.word_stride == 0) first = 0, rows = 1;
  std::uint64_t any[4] = {}, hidden = 0;
  for (Index i = first; i < first + rows; ++i)
    for (Index p = 0; p < t.panels; ++p) any[p] |= t.words[i * t.word_stride + p];
  Index begin = 0, end = t.panels;
  while (begin < end && any[begin] == 0) ++begin;
  while (end > begin && any[end - 1] == 0) --end;
  if (begin == end) return {0, 0, false};
  Index from = begin * panel_columns + __builtin_ctzll(any[begin]);
  Index to = end * panel_columns - __builtin_clzll(any[end - 1]);
  from = from / step * step, to = round_up(to, step);
  for (Index p = begin; p < end; ++p) {
    std::uint64_t inside = ~std::uint64_t{0};
    if (from > p * panel_columns) inside &= inside << (from - p * panel_columns);
    if (to < (p + 1) * panel_columns) inside &= ~std::uint64_t{0} >> ((p + 1) * panel_columns - to);
    for (Index i = first; i < first + rows; ++i) hidden |= inside & ~t.words[i * t.word_stride + p];
  }
  return {from, to, hidden != 0};
}

/// T: what is multiplied; Stored: what panels hold.
template <class T, class Stored = T>
void attend_rows(const PanelTask& t) {
  const Index dp = t.layout.dp, dvp = t.layout.dvp, panel_size = t.layout.panel_elements();
  constexpr Index pair = sizeof(Stored) == 2 ? 2 : 1;
  const bool plain = t.softcap == 0 && t.add == nullptr && t.scale > 0;
  // Few rows wait for memory, which is asked for the panel after the one that is multiplied.
  const bool few = sizeof(T) == 4 && t.rows <= 2 * group_rows<T>;
  begin_products();
  alignas(64) float scores[group_rows<T> * chunk_columns + W];  // the last vector of a group may reach beyond
  alignas(64) T weights[sizeof(T) == 2 ? group_rows<T> * chunk_columns : 1];
  Groups groups;
  if (t.gates != nullptr) list_groups(t, groups);

  for (Index first = 0; first < t.rows; first += group_rows<T>) {
    const Index rows = t.rows - first < group_rows<T> ? t.rows - first : group_rows<T>;
    auto [from, to, tested] = seen_strip(t, first, rows, strip<T>);
    if (from >= to) continue;
    if (t.gates != nullptr) {
      const Index begin = groups.begin / strip<T> * strip<T>, end = round_up(groups.end(), strip<T>);
      from = begin > from ? begin : from, to = end < to ? end : to;
      if (from >= to) continue;
    }

    const T* q[group_rows<T>];
    const T* w[group_rows<T>];
    float *s[group_rows<T>], *acc[group_rows<T>], *s_panel[group_rows<T>];
    Index rank[group_rows<T>];
    for (Index i = 0; i < rows; ++i) {
      rank[i] = t.row_list == nullptr ? t.first_row + first + i : t.row_list[first + i];
      q[i] = static_cast<const T*>(t.q) + rank[i] * dp;
      acc[i] = t.acc + rank[i] * dvp;
      s[i] = scores + i * chunk_columns;
      if constexpr (sizeof(T) == 2) w[i] = weights + i * chunk_columns + from;
      else w[i] = s[i] + from;
    }
    for (Index column = from; column < to;) {
      const Index p = column / panel_columns, inner = column % panel_columns;
      const Index width = (p + 1) * panel_columns < to ? panel_columns - inner : to - column;
      for (Index i = 0; i < rows; ++i) s_panel[i] = s[i] + column;
      const Stored* k = static_cast<const Stored*>(t.k) + p * panel_size + inner * pair;
      if constexpr (sizeof(T) == 4)
        if (few) {
          streaming_product(rows, q, k, panel_columns * pair, dp, width, s_panel, false, panel_size);
          column += width;
          continue;
        }
      if (width == panel_columns)  // a constant lets the compiler unroll
        product<T>(rows, q, k, panel_columns * pair, dp, panel_columns, s_panel, false);
      else product<T>(rows, q, k, panel_columns * pair, dp, width, s_panel, false);
      column += width;
    }
    for (Index i = 0; i < rows; ++i) {
      const std::uint64_t* words = tested ? t.words + (first + i) * t.word_stride : nullptr;
      float factor = t.scale * log2_e;
      if (t.key_scale != nullptr) scale_columns(s[i], t.key_scale, from, to);
      if (!plain) {
        apply_rule(t, t.add == nullptr ? nullptr : t.add + (first + i) * t.add_stride, s[i], from, to);
        factor = log2_e;
      }
      constexpr bool fine = sizeof(T) == 4;
      T* p = const_cast<T*>(w[i]) - from;
      if (t.gates == nullptr)
        softmax_row<fine>(s[i], p, from, to, factor, words, t.m[rank[i]], t.l[rank[i]], acc[i], dvp);
      else softmax_groups<fine>(s[i], p, from, to, factor, words, groups, t.m[rank[i]], t.l[rank[i]], acc[i], dvp);
      if constexpr (sizeof(T) == 4)
        if (t.value_scale != nullptr) scale_columns(s[i], t.value_scale, from, to);
    }
    if constexpr (sizeof(T) == 4)
      if (few) {  // panel by panel, so that the next one is on its way in time
        for (Index column = from, end; column < to; column = end) {
          end = column / panel_columns * panel_columns + panel_columns;
          end = end < to ? end : to;
          const T* part[group_rows<T>];
          for (Index i = 0; i < rows; ++i) part[i] = s[i] + column;
          streaming_product(rows, part, static_cast<const Stored*>(t.v) + column * dvp, dvp * pair, end - column, dvp,
                            acc, true, panel_columns * dvp);
        }
        continue;
      }
    product<T>(rows, w, static_cast<const Stored*>(t.v) + from * dvp, dvp * pair, to - from, dvp, acc, true);
  }
}
