// Sixteen 16-bit integers at a time: what weights of 4 to 8 bits are multiplied as.
// Included inside each instruction set's own namespace, after vec.h. 256 bits wide on every x86 machine with AVX2: a
// row product is bound by memory, and wider vectors would not fit a block of 32 weights in halves of 16.

typedef std::int16_t Words __attribute__((vector_size(32)));
typedef std::int32_t Sums __attribute__((vector_size(32)));  // of eight pairs
typedef float Floats __attribute__((vector_size(32)));

inline Words load_words(const std::int16_t* p) {
  Words x;
  __builtin_memcpy(&x, p, sizeof x);
  return x;
}
inline Floats load_floats(const float* p) {
  Floats x;
  __builtin_memcpy(&x, p, sizeof x);
  return x;
}
typedef float Pair __attribute__((vector_size(16)));  // two numbers; what follows them is of no meaning

inline Floats eight(float x) { return Floats{x, x, x, x, x, x, x, x}; }

#if defined(__AVX2__)

inline __m128i sixteen_bytes(const std::uint8_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }
/// Sixteen bytes, unsigned or signed.
inline Words words_u8(const std::uint8_t* p) { return (Words)_mm256_cvtepu8_epi16(sixteen_bytes(p)); }
inline Words words_i8(const std::uint8_t* p) { return (Words)_mm256_cvtepi8_epi16(sixteen_bytes(p)); }
/// x[2i]·y[2i] + x[2i + 1]·y[2i + 1].
inline Sums multiply_pairs(Words x, Words y) { return (Sums)_mm256_madd_epi16((__m256i)x, (__m256i)y); }
inline Floats to_floats(Sums x) { return (Floats)_mm256_cvtepi32_ps((__m256i)x); }
/// Eight bytes, unsigned or signed.
inline __m128i eight_bytes(const std::uint8_t* p) { return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)); }
inline Floats floats_u8(const std::uint8_t* p) {
  return (Floats)_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(eight_bytes(p)));
}
inline Floats floats_i8(const std::uint8_t* p) {
  return (Floats)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(eight_bytes(p)));
}
/// Two f16 that follow each other; one f16 twice.
inline Pair two_halves(const std::uint8_t* p) { return (Pair)_mm_cvtph_ps(_mm_loadu_si32(p)); }
inline Pair one_half(const std::uint8_t* p) { return (Pair)_mm_cvtph_ps(_mm_broadcastw_epi16(_mm_loadu_si16(p))); }
inline Pair load_pair(const float* p) { return (Pair)_mm_castsi128_ps(_mm_loadu_si64(p)); }
/// The first of a pair, eight times.
inline Floats eight(Pair x) { return (Floats)_mm256_broadcastss_ps((__m128)x); }
inline Floats multiply_add(Floats a, Floats b, Floats c) {
  return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
}

#else

template <class Byte8>
inline Words widened(const std::uint8_t* p) {
  typedef Byte8 Bytes __attribute__((vector_size(16)));
  Bytes x;
  __builtin_memcpy(&x, p, sizeof x);
  return __builtin_convertvector(x, Words);
}
inline Words words_u8(const std::uint8_t* p) { return widened<std::uint8_t>(p); }
inline Words words_i8(const std::uint8_t* p) { return widened<std::int8_t>(p); }
inline Sums multiply_pairs(Words x, Words y) {
  Sums sums;
  for (int i = 0; i < 8; ++i) sums[i] = x[2 * i] * y[2 * i] + x[2 * i + 1] * y[2 * i + 1];
  return sums;
}
inline Floats to_floats(Sums x) { return __builtin_convertvector(x, Floats); }
template <class Byte1>
inline Floats eight_floats(const std::uint8_t* p) {
  Floats x;
  for (int i = 0; i < 8; ++i) x[i] = static_cast<Byte1>(p[i]);
  return x;
}
inline Floats floats_u8(const std::uint8_t* p) { return eight_floats<std::uint8_t>(p); }
inline Floats floats_i8(const std::uint8_t* p) { return eight_floats<std::int8_t>(p); }
inline Pair two_halves(const std::uint8_t* p) { return Pair{half_at(p), half_at(p + 2)}; }
inline Pair one_half(const std::uint8_t* p) { return Pair{half_at(p), half_at(p)}; }
inline Pair load_pair(const float* p) { return Pair{p[0], p[1]}; }
inline Floats eight(Pair x) { return eight(x[0]); }
inline Floats multiply_add(Floats a, Floats b, Floats c) { return a * b + c; }

#endif

/// 16 where bit i of `bits` is set, else 0, in word i.
inline Words fifth_bits(std::uint32_t bits) {
  const Words bit = {1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, -32768};
  const std::int16_t b = static_cast<std::int16_t>(bits);
  const Words all = {b, b, b, b, b, b, b, b, b, b, b, b, b, b, b, b};
  return ((all & bit) == bit) & 16;
}

inline float total(Floats x) { return ((x[0] + x[4]) + (x[2] + x[6])) + ((x[1] + x[5]) + (x[3] + x[7])); }
