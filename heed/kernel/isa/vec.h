// Vectors of the widest kind that the enclosing translation unit may use, under one set of names.
// Included inside each instruction set's own namespace, so no copy can leak into another's code.
// W floats a vector; `bits` are lane masks, lane i at bit i. load_first and load_second widen one number each of W
// pairs of bf16.

#if defined(__AVX512F__)

inline constexpr int W = 16;
using F = __m512;
inline F load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, F x) { _mm512_storeu_ps(p, x); }
inline F set1(float x) { return _mm512_set1_ps(x); }
inline F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
inline F max(F a, F b) { return _mm512_max_ps(a, b); }
inline F min(F a, F b) { return _mm512_min_ps(a, b); }
inline float max_lane(F x) { return _mm512_reduce_max_ps(x); }
inline float sum_lanes(F x) { return _mm512_reduce_add_ps(x); }
/// Lane i is a where bit i is set, else b.
inline F select(std::uint32_t bits, F a, F b) { return _mm512_mask_blend_ps(static_cast<__mmask16>(bits), b, a); }
inline std::uint32_t less(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
/// The lanes whose bits are set, in order, before others.
inline F pack_lanes(std::uint32_t bits, F x) { return _mm512_maskz_compress_ps(static_cast<__mmask16>(bits), x); }
inline F round(F x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
/// x · 2^n for whole n; underflow gives zero, and so does n = -inf whatever x is, NaN included.
inline F scale_by_power(F x, F n) { return _mm512_scalef_ps(x, n); }
inline F clamp_exponent(F x) { return x; }
inline F load_f16(const std::uint8_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
/// W signed bytes as floats.
inline F load_bytes(const std::int8_t* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
inline F load_bf16(const std::uint8_t* p) {
  return _mm512_castsi512_ps(
      _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16));
}
inline F load_first(const bf16* p) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_loadu_si512(p), 16)); }
inline F load_second(const bf16* p) {
  return _mm512_castsi512_ps(_mm512_and_si512(_mm512_loadu_si512(p), _mm512_set1_epi32(~0xffff)));
}

#elif defined(__AVX2__)

inline constexpr int W = 8;
using F = __m256;
inline F load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, F x) { _mm256_storeu_ps(p, x); }
inline F set1(float x) { return _mm256_set1_ps(x); }
inline F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
inline F max(F a, F b) { return _mm256_max_ps(a, b); }
inline F min(F a, F b) { return _mm256_min_ps(a, b); }
inline float max_lane(F x) {
  __m128 h = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  h = _mm_max_ps(h, _mm_movehl_ps(h, h));
  return _mm_cvtss_f32(_mm_max_ss(h, _mm_movehdup_ps(h)));
}
inline float sum_lanes(F x) {
  __m128 h = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  h = _mm_add_ps(h, _mm_movehl_ps(h, h));
  return _mm_cvtss_f32(_mm_add_ss(h, _mm_movehdup_ps(h)));
}
inline F select(std::uint32_t bits, F a, F b) {
  const __m256i lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i chosen = _mm256_and_si256(_mm256_set1_epi32(static_cast<int>(bits)), lane);
  return _mm256_blendv_ps(b, a, _mm256_castsi256_ps(_mm256_cmpeq_epi32(chosen, lane)));
}
inline std::uint32_t less(F a, F b) {
  return static_cast<std::uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_LT_OQ)));
}
inline F pack_lanes(std::uint32_t bits, F x) {
  const std::uint64_t bytes = _pdep_u64(bits, 0x0101010101010101u) * 0xff;
  const std::uint64_t lanes = _pext_u64(0x0706050403020100u, bytes);
  return _mm256_permutevar8x32_ps(x, _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(static_cast<long long>(lanes))));
}
inline F round(F x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
/// x · 2^n for whole n in [-125, 127] and x in [0.5, 2); smaller n gives zero, and so
/// does n = -inf whatever x is, NaN included.
inline F scale_by_power(F x, F n) {
  const __m256i shifted = _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23);
  const F y = _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(x), shifted));
  return _mm256_and_ps(y, _mm256_cmp_ps(n, _mm256_set1_ps(-125), _CMP_GE_OQ));
}
inline F clamp_exponent(F x) { return x; }
inline F load_f16(const std::uint8_t* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline F load_bytes(const std::int8_t* p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
inline F load_bf16(const std::uint8_t* p) {
  return _mm256_castsi256_ps(
      _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 16));
}
inline F load_first(const bf16* p) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), 16));
}
inline F load_second(const bf16* p) {
  return _mm256_castsi256_ps(
      _mm256_and_si256(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), _mm256_set1_epi32(~0xffff)));
}

#else

// GCC's and clang's vector extension: SSE2 on x86-64, NEON on Arm, plain code elsewhere.
inline constexpr int W = 4;
typedef float F __attribute__((vector_size(16)));
typedef std::int32_t I __attribute__((vector_size(16)));
inline F load(const float* p) {
  F x;
  __builtin_memcpy(&x, p, sizeof x);
  return x;
}
inline void store(float* p, F x) { __builtin_memcpy(p, &x, sizeof x); }
inline F set1(float x) { return F{x, x, x, x}; }
inline F fma(F a, F b, F c) { return a * b + c; }
inline F max(F a, F b) { return a > b ? a : b; }
inline F min(F a, F b) { return a < b ? a : b; }
inline float max_lane(F x) {
  const float a = x[0] > x[1] ? x[0] : x[1], b = x[2] > x[3] ? x[2] : x[3];
  return a > b ? a : b;
}
inline float sum_lanes(F x) { return (x[0] + x[2]) + (x[1] + x[3]); }
inline F select(std::uint32_t bits, F a, F b) {
  const I lane = {1, 2, 4, 8};
  const std::int32_t s = static_cast<std::int32_t>(bits & 15u);
  return ((I{s, s, s, s} & lane) == lane) ? a : b;
}
inline std::uint32_t less(F a, F b) {
  const I c = a < b;
  return static_cast<std::uint32_t>((c[0] & 1) | (c[1] & 2) | (c[2] & 4) | (c[3] & 8));
}
inline F pack_lanes(std::uint32_t bits, F x) {
  F packed = x;
  for (int i = 0, held = 0; i < 4; ++i)
    if ((bits >> i & 1) != 0) packed[held++] = x[i];
  return packed;
}
// Adding and taking away 1.5 · 2^23 leaves the nearest whole number, for |x| < 2^22.
inline F round(F x) { return (x + 12582912.0f) - 12582912.0f; }
inline F scale_by_power(F x, F n) {
  // Unsigned: lanes that will be selected away may hold anything, and their sum may run over.
  typedef std::uint32_t U __attribute__((vector_size(16)));
  const U shifted = (U) __builtin_convertvector(n, I) << 23;
  const F y = (F)((U)x + shifted);
  return n >= -125.0f ? y : F{};
}
inline F clamp_exponent(F x) { return max(x, set1(-126)); }
inline F load_f16(const std::uint8_t* p) {
  std::uint16_t h[4];
  __builtin_memcpy(h, p, sizeof h);
  return F{f16_to_f32(h[0]), f16_to_f32(h[1]), f16_to_f32(h[2]), f16_to_f32(h[3])};
}
inline F load_bytes(const std::int8_t* p) {
  return F{static_cast<float>(p[0]), static_cast<float>(p[1]), static_cast<float>(p[2]), static_cast<float>(p[3])};
}
inline F load_bf16(const std::uint8_t* p) {
  std::uint16_t h[4];
  __builtin_memcpy(h, p, sizeof h);
  return (F)(I{h[0] << 16, h[1] << 16, h[2] << 16, h[3] << 16});
}
// On little-endian machines.
inline F load_first(const bf16* p) {
  typedef std::uint32_t U __attribute__((vector_size(16)));
  U x;
  __builtin_memcpy(&x, p, sizeof x);
  return (F)(x << 16);
}
inline F load_second(const bf16* p) {
  typedef std::uint32_t U __attribute__((vector_size(16)));
  U x;
  __builtin_memcpy(&x, p, sizeof x);
  return (F)(x & 0xffff0000u);
}

#endif

/// One f16 as f32.
inline float half_at(const std::uint8_t* p) {
  std::uint16_t h;
  __builtin_memcpy(&h, p, sizeof h);
#if defined(__F16C__)
  return _cvtsh_ss(h);
#else
  return f16_to_f32(h);
#endif
}

inline F zero() { return set1(0); }

/// 2^x, relative error below 2e-7 (`fine`) or 1.1e-4, for x <= 127. -inf and deep underflow give 0.
template <bool fine>
inline F exp2(F x) {
  x = clamp_exponent(x);
  const F n = round(x), r = x - n;
  // Minimax polynomials of 2^r on [-1/2, 1/2], relative error; fitted by iterated least squares. The coarse one is
  // exact at 0, so that the largest score of a row weighs 1 and rounding its weight to bf16 loses nothing.
  F p;
  if constexpr (fine) {
    p = fma(set1(0.00132764717f), r, set1(0.00967554154f));
    p = fma(p, r, set1(0.0555071328f));
    p = fma(p, r, set1(0.240221197f));
    p = fma(p, r, set1(0.693146967f));
    p = fma(p, r, set1(1.00000007f));
  } else {
    p = fma(set1(0.0550089258f), r, set1(0.242210977f));
    p = fma(p, r, set1(0.69328293f));
    p = fma(p, r, set1(1));
  }
  return scale_by_power(p, n);
}

/// tanh(x), relative error below 1e-6.
inline F tanh(F x) {
  // Near zero an odd polynomial, as the other form cancels there.
  const F z = x * x;
  F p = fma(set1(-0.00551516191f), z, set1(0.020469418f));
  p = fma(p, z, set1(-0.0536880225f));
  p = fma(p, z, set1(0.133308303f));
  p = fma(p, z, set1(-0.333332598f));
  const F near = fma(x * z, p, x);
  const F e = exp2<true>(min(max(x * set1(2 * 1.44269504f), set1(-60)), set1(60)));
  const F far = set1(1) - set1(2) / (e + set1(1));
  return select(less(z, set1(0.4f)), near, far);
}
