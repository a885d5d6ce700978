// Bare loops of multiply-adds: what a core of this machine can do at most, to measure kernels by.
// Included inside each instruction set's own namespace, after vec.h.

#if defined(__AVX512F__)
inline constexpr int peak_sums = 24;
#else
inline constexpr int peak_sums = 10;
#endif

inline double peak_f32(Index steps) {
  F sum[peak_sums];
#pragma GCC unroll 24
  for (int i = 0; i < peak_sums; ++i) sum[i] = set1(static_cast<float>(i));
  F a = set1(0.999f), b = set1(1e-3f);
  for (Index step = 0; step < steps; ++step) {
    asm volatile("" : "+x"(a), "+x"(b));  // else the loop would be folded
#pragma GCC unroll 24
    for (int i = 0; i < peak_sums; ++i) sum[i] = fma(sum[i], a, b);
  }
  F total = zero();
  for (int i = 0; i < peak_sums; ++i) total = total + sum[i];
  volatile float sink = sum_lanes(total);
  (void)sink;
  return 2.0 * W * peak_sums * static_cast<double>(steps);
}

#if defined(HEED_TILES) && !defined(HEED_TILES_EMULATED)
inline double peak_bf16(Index steps) {
  alignas(64) static const std::uint8_t zeros[16 * 64] = {};
  configure_tiles();
  tile_load<4>(zeros, 64), tile_load<5>(zeros, 64), tile_load<6>(zeros, 64), tile_load<7>(zeros, 64);
  tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
  for (Index step = 0; step < steps; ++step)
    tile_dot<0, 4, 6>(), tile_dot<1, 4, 7>(), tile_dot<2, 5, 6>(), tile_dot<3, 5, 7>();
  return 4.0 * 2 * 16 * 16 * 32 * static_cast<double>(steps);
}
#elif defined(__AVX512BF16__)
inline double peak_bf16(Index steps) {
  F sum[peak_sums];
#pragma GCC unroll 24
  for (int i = 0; i < peak_sums; ++i) sum[i] = set1(static_cast<float>(i));
  __m512i a = _mm512_set1_epi32(0x3f803f80), b = _mm512_set1_epi32(0x3a803a80);
  for (Index step = 0; step < steps; ++step) {
    asm volatile("" : "+x"(a), "+x"(b));
#pragma GCC unroll 24
    for (int i = 0; i < peak_sums; ++i) sum[i] = _mm512_dpbf16_ps(sum[i], (__m512bh)a, (__m512bh)b);
  }
  F total = zero();
  for (int i = 0; i < peak_sums; ++i) total = total + sum[i];
  volatile float sink = sum_lanes(total);
  (void)sink;
  return 4.0 * W * peak_sums * static_cast<double>(steps);
}
#else
inline double peak_bf16(Index) { return 0; }
#endif

// Products of bytes, unsigned times signed, summed as 32-bit integers; an operation is a multiplication or an addition,
// as above. Without dot products of bytes: pairs to 16 bits, pairs of those to 32, and an addition.
#if defined(HEED_TILES) && !defined(HEED_TILES_EMULATED)
inline double peak_int8(Index steps) {
  alignas(64) static const std::uint8_t zeros[16 * 64] = {};
  configure_tiles();
  tile_load<4>(zeros, 64), tile_load<5>(zeros, 64), tile_load<6>(zeros, 64), tile_load<7>(zeros, 64);
  tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
  for (Index step = 0; step < steps; ++step)
    tile_dot_bytes<0, 4, 6>(), tile_dot_bytes<1, 4, 7>(), tile_dot_bytes<2, 5, 6>(), tile_dot_bytes<3, 5, 7>();
  return 4.0 * 2 * 16 * 16 * 64 * static_cast<double>(steps);
}
#elif defined(__AVX2__)
#if defined(__AVX512F__)
using Quads = __m512i;
#else
using Quads = __m256i;
#endif
inline Quads dot_bytes(Quads sum, Quads a, Quads b) {
#if defined(__AVX512VNNI__)
  return _mm512_dpbusd_epi32(sum, a, b);
#elif defined(__AVX512F__)
  return _mm512_add_epi32(sum, _mm512_madd_epi16(_mm512_maddubs_epi16(a, b), _mm512_set1_epi16(1)));
#else
  return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(a, b), _mm256_set1_epi16(1)));
#endif
}
inline double peak_int8(Index steps) {
  Quads sum[peak_sums] = {}, a = {}, b = {};
  for (Index step = 0; step < steps; ++step) {
    asm volatile("" : "+x"(a), "+x"(b));
#pragma GCC unroll 24
    for (int i = 0; i < peak_sums; ++i) {
      sum[i] = dot_bytes(sum[i], a, b);
      asm volatile("" : "+x"(sum[i]));  // the sums are not looked at
    }
  }
  return 8.0 * W * peak_sums * static_cast<double>(steps);
}
#else
inline double peak_int8(Index) { return 0; }
#endif

/// Reads n floats once; the sum keeps the reads alive.
inline float read_all(const float* p, Index n) {
  F sum[4] = {zero(), zero(), zero(), zero()};
  for (Index i = 0; i + 4 * W <= n; i += 4 * W)
    for (int j = 0; j < 4; ++j) sum[j] = sum[j] + load(p + i + j * W);
  return sum_lanes((sum[0] + sum[1]) + (sum[2] + sum[3]));
}
