// C = A·B on packed panels, packing of panels, and the row functions of models.
// Included inside each instruction set's own namespace, after product.h.

template <class T, class Stored = T>
void gemm(Index m, Index n, Index k, const T* a, Index lda, const Stored* b, float* c, Index ldc, bool accumulate) {
  constexpr Index pair = sizeof(Stored) == 2 ? 2 : 1;
  begin_products();
  // A panel stays in the second-level cache while every row passes over it.
  for (Index column = 0; column < n; column += panel_columns, b += k * panel_columns) {
    const Index left = round_up(n - column, Index{16}), columns = left < panel_columns ? left : panel_columns;
    for (Index first = 0; first < m; first += group_rows<T>) {
      const Index rows = m - first < group_rows<T> ? m - first : group_rows<T>;
      const T* ar[group_rows<T>];
      float* cr[group_rows<T>];
      for (Index i = 0; i < rows; ++i) ar[i] = a + (first + i) * lda, cr[i] = c + (first + i) * ldc + column;
      product<T>(rows, ar, b, panel_columns * pair, k, columns, cr, accumulate);
    }
  }
}

#if defined(__AVX2__)
inline constexpr Index turned = 8;
/// to[j·ldt + i] = from[i·ldf + j] for i, j < `turned`: pairs, then fours, then halves change places.
inline void turn_block(const float* from, Index ldf, float* to, Index ldt) {
  __m256 x[8], y[8];
  for (int i = 0; i < 8; ++i) x[i] = _mm256_loadu_ps(from + i * ldf);
  for (int i = 0; i < 8; i += 2)
    y[i] = _mm256_unpacklo_ps(x[i], x[i + 1]), y[i + 1] = _mm256_unpackhi_ps(x[i], x[i + 1]);
  for (int i = 0; i < 8; i += 4)
    for (int j = 0; j < 2; ++j) {
      x[i + 2 * j] = _mm256_shuffle_ps(y[i + j], y[i + 2 + j], 0x44);
      x[i + 2 * j + 1] = _mm256_shuffle_ps(y[i + j], y[i + 2 + j], 0xee);
    }
  for (int j = 0; j < 4; ++j) {
    _mm256_storeu_ps(to + j * ldt, _mm256_permute2f128_ps(x[j], x[j + 4], 0x20));
    _mm256_storeu_ps(to + (j + 4) * ldt, _mm256_permute2f128_ps(x[j], x[j + 4], 0x31));
  }
}
#else
inline constexpr Index turned = 4;
inline void turn_block(const float* from, Index ldf, float* to, Index ldt) {
  for (Index j = 0; j < turned; ++j)
    for (Index i = 0; i < turned; ++i) to[j * ldt + i] = from[i * ldf + j];
}
#endif

inline void pack_keys_f32(const float* x, Index ldx, Index columns, Index d, Index d_padded, float* panel) {
  const Index whole_columns = columns / turned * turned, whole_d = d / turned * turned;
  for (Index f = 0; f < whole_d; f += turned)
    for (Index c = 0; c < whole_columns; c += turned)
      turn_block(x + c * ldx + f, ldx, panel + f * panel_columns + c, panel_columns);
  for (Index f = 0; f < d_padded; ++f)
    for (Index c = f < whole_d ? whole_columns : 0; c < panel_columns; ++c)
      panel[f * panel_columns + c] = f < d && c < columns ? x[c * ldx + f] : 0;
}

inline std::uint16_t round_bits(float x) { return to_bf16(x).bits; }

inline void pack_keys_bf16(const float* x, Index ldx, Index columns, Index d, Index d_padded, bf16* panel) {
  for (Index f = 0; f < d_padded; ++f)
    for (Index c = 0; c < panel_columns; ++c)
      panel[(f / 2 * panel_columns + c) * 2 + f % 2].bits = f < d && c < columns ? round_bits(x[c * ldx + f]) : 0;
}

inline void round_bf16(const float* x, Index n, bf16* out) {
  for (Index i = 0; i < n; ++i) {
    std::uint32_t u;
    __builtin_memcpy(&u, x + i, sizeof u);
    const std::uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16, quiet = (u >> 16) | 0x40u;
    out[i].bits = static_cast<std::uint16_t>((u & 0x7fffffffu) > 0x7f800000u ? quiet : rounded);
  }
}

inline float dot(const float* a, const float* b, Index n) {
  F sum0 = zero(), sum1 = zero();
  Index i = 0;
  for (; i + 2 * W <= n; i += 2 * W) {
    sum0 = fma(load(a + i), load(b + i), sum0);
    sum1 = fma(load(a + i + W), load(b + i + W), sum1);
  }
  float sum = sum_lanes(sum0 + sum1);
  for (; i < n; ++i) sum += a[i] * b[i];
  return sum;
}

/// Σ x², in f64: a norm scales all that follows it, so its error would reach every score of a row at once, and the
/// choices of a mechanism with it.
inline double sum_of_squares(const float* x, Index n) {
  constexpr int lanes = 8;  // independent, so that the compiler may keep them in vectors
  double sums[lanes] = {};
  Index i = 0;
  for (; i + lanes <= n; i += lanes)
#pragma GCC unroll 8
    for (int j = 0; j < lanes; ++j) sums[j] += static_cast<double>(x[i + j]) * static_cast<double>(x[i + j]);
  double sum = 0;
  for (const double part : sums) sum += part;
  for (; i < n; ++i) sum += static_cast<double>(x[i]) * static_cast<double>(x[i]);
  return sum;
}

inline void rms_norm(const float* x, const float* weight, Index n, float eps, float* out) {
  const double mean = sum_of_squares(x, n) / static_cast<double>(n);
  const float r = static_cast<float>(1 / __builtin_sqrt(mean + static_cast<double>(eps)));
  for (Index i = 0; i < n; ++i) out[i] = x[i] * r * weight[i];
}

/// Calls f on every vector of a and b; the last, ragged one is padded with zeros.
template <class Function>
inline void map_pairs(const float* a, const float* b, Index n, float* out, Function f) {
  Index i = 0;
  for (; i + W <= n; i += W) store(out + i, f(load(a + i), load(b + i)));
  if (i == n) return;
  float x[W] = {}, y[W] = {};
  for (Index j = i; j < n; ++j) x[j - i] = a[j], y[j - i] = b[j];
  store(x, f(load(x), load(y)));
  for (Index j = i; j < n; ++j) out[j] = x[j - i];
}

inline void silu_mul(const float* gate, const float* up, Index n, float* out) {
  map_pairs(gate, up, n, out, [](F g, F u) {
    const F e = exp2<true>(min(max(g * set1(-log2_e), set1(-120)), set1(120)));
    return g * u / (set1(1) + e);
  });
}

inline void gelu_mul(const float* gate, const float* up, Index n, float* out) {
  map_pairs(gate, up, n, out, [](F g, F u) {
    const F inner = set1(0.7978845608f) * fma(set1(0.044715f) * g, g * g, g);
    return set1(0.5f) * g * (set1(1) + tanh(inner)) * u;
  });
}

inline void log_sum_exp(const float* x, Index n, float& maximum, float& sum) {
  F top = set1(minus_infinity);
  Index i = 0;
  for (; i + W <= n; i += W) top = max(top, load(x + i));
  float most = max_lane(top);
  for (Index j = i; j < n; ++j) most = x[j] > most ? x[j] : most;
  if (most == minus_infinity) return;
  if (most > maximum) {
    sum *= __builtin_expf(maximum - most);
    maximum = most;
  }
  const F f = set1(log2_e), reference = set1(-maximum);
  F total = zero();
  for (i = 0; i + W <= n; i += W) total = total + exp2<true>((load(x + i) + reference) * f);
  sum += sum_lanes(total);
  for (; i < n; ++i) sum += __builtin_expf(x[i] - maximum);
}
