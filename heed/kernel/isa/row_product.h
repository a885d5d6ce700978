// One row of activations times a matrix in the format of its file: what decoding reads, it reads once and as it is.
// Included inside each instruction set's own namespace, after words.h.
//
// A block of 32 weights is d·q + m (m = 0, -8·d, … by format) with q of 4 to 8 bits, and 32 inputs are a scale s times
// whole numbers x of 16 bits: their product is d·s·Σ q·x + m·s·Σ x, where Σ q·x is exact in 32-bit integers and s·Σ x
// was made once for all rows. Reading floats instead would take three times the instructions, and be bound by them.

// The parts of a block are always inlined, and the block itself is a template's argument: a call for 32 weights halves
// the speed, and the compiler's own bounds are those of a whole file.

using Byte = std::uint8_t;

/// What a row collects: `lanes`, and in the second of `rest` Σ d·s·Σ x or Σ m·s·Σ x.
struct RowSum {
  Floats lanes;
  Pair rest;
};

/// Inputs at a block of weights: x, and per 32 of them the pair s and s·Σ x.
struct BlockInput {
  const std::int16_t* x;
  const float* scale;
};

inline std::uint32_t u32_at(const Byte* p) {
  std::uint32_t x;
  __builtin_memcpy(&x, p, sizeof x);
  return x;
}

/// Rounds n values (a multiple of 32) to 16-bit integers, with s and s·Σ x for each 32 of them.
inline void round_row(const float* values, Index n, std::int16_t* x, float* scale) {
  for (Index g = 0; g < n / 32; ++g) {
    const float* v = values + g * 32;
    F largest = zero();
    for (int i = 0; i < 32; i += W) largest = max(largest, max(load(v + i), zero() - load(v + i)));
    const float most = max_lane(largest);
    const float inverse = most > 0 ? 32767 / most : 0;
    std::int32_t all = 0;
    for (int i = 0; i < 32; ++i) {
      const auto rounded = static_cast<std::int32_t>(__builtin_rintf(v[i] * inverse));
      x[g * 32 + i] = static_cast<std::int16_t>(rounded);
      all += rounded;
    }
    scale[2 * g] = most / 32767;
    scale[2 * g + 1] = scale[2 * g] * static_cast<float>(all);
  }
}

/// Σ q·x of 32 weights, those of the first 16 and of the last, times a factor.
[[gnu::always_inline]] inline void add_products(Words first, Words last, const std::int16_t* x, Floats factor,
                                                RowSum& r) {
  const Sums sums = multiply_pairs(first, load_words(x)) + multiply_pairs(last, load_words(x + 16));
  r.lanes = multiply_add(factor, to_floats(sums), r.lanes);
}
/// The same times d·s; dm: d and what the sum of inputs is multiplied by.
[[gnu::always_inline]] inline void add_block(Words first, Words last, Pair dm, const BlockInput& in, RowSum& r) {
  const Pair factors = dm * load_pair(in.scale);
  r.rest += factors;
  add_products(first, last, in.x, eight(factors), r);
}

// One block of each format: p, its inputs. Of 32 nibbles in 16 bytes, element j < 16 is the low one of byte j and
// element j + 16 the high one.

[[gnu::always_inline]] inline void four_bit_block(const Byte* qs, Pair dm, const BlockInput& in, RowSum& r) {
  const Words q = words_u8(qs);
  add_block(q & 15, q >> 4, dm, in, r);
}
[[gnu::always_inline]] inline void five_bit_block(const Byte* qs, std::uint32_t fifth, Pair dm, const BlockInput& in,
                                                  RowSum& r) {
  const Words q = words_u8(qs);
  add_block((q & 15) | fifth_bits(fifth), (q >> 4) | fifth_bits(fifth >> 16), dm, in, r);
}
[[gnu::always_inline]] inline void q4_0_block(const Byte* p, const BlockInput& in, RowSum& r) {  // d, qs [16]
  four_bit_block(p + 2, one_half(p), in, r);
}
[[gnu::always_inline]] inline void q4_1_block(const Byte* p, const BlockInput& in, RowSum& r) {  // d, m, qs [16]
  four_bit_block(p + 4, two_halves(p), in, r);
}
[[gnu::always_inline]] inline void q5_0_block(const Byte* p, const BlockInput& in,
                                              RowSum& r) {  // d, fifth bits, qs [16]
  five_bit_block(p + 6, u32_at(p + 2), one_half(p), in, r);
}
[[gnu::always_inline]] inline void q5_1_block(const Byte* p, const BlockInput& in,
                                              RowSum& r) {  // d, m, fifth bits, qs [16]
  five_bit_block(p + 8, u32_at(p + 4), two_halves(p), in, r);
}
[[gnu::always_inline]] inline void q8_0_block(const Byte* p, const BlockInput& in, RowSum& r) {  // d, qs i8 [32]
  add_block(words_i8(p + 2), words_i8(p + 18), one_half(p), in, r);
}

/// Of 256 elements in eight groups: each group's d·scale·s. What the minima take away is taken at once.
struct GroupFactors {
  float of[8];
};
[[gnu::always_inline]] inline GroupFactors group_factors(const Byte* p, const BlockInput& in,
                                                         RowSum& r) {  // d, dmin, packed [12]
  const GroupScales g = group_scales(p + 4);
  const Floats a = load_floats(in.scale), b = load_floats(in.scale + 8);
  const Floats scale = __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14);
  const Floats sum = __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15);
  const Floats factor = eight(one_half(p)) * floats_u8(g.scale) * scale;
  r.lanes = multiply_add(eight(-one_half(p + 2)) * floats_u8(g.minimum), sum, r.lanes);
  GroupFactors f;
  __builtin_memcpy(&f, &factor, sizeof f);
  return f;
}
// 32 bytes serve two groups of 32, the even one by its low nibbles.
[[gnu::always_inline]] inline void q4_k_block(const Byte* p, const BlockInput& in,
                                              RowSum& r) {  // d, dmin, scales [12], qs [128]
  const GroupFactors g = group_factors(p, in, r);
#pragma GCC unroll 4
  for (int pair = 0; pair < 4; ++pair) {
    const Words first = words_u8(p + 16 + pair * 32), last = words_u8(p + 32 + pair * 32);
    add_products(first & 15, last & 15, in.x + pair * 64, eight(g.of[2 * pair]), r);
    add_products(first >> 4, last >> 4, in.x + pair * 64 + 32, eight(g.of[2 * pair + 1]), r);
  }
}
// Bit g of byte j of qh is the fifth bit of element j of group g.
[[gnu::always_inline]] inline void q5_k_block(const Byte* p, const BlockInput& in, RowSum& r) {  // …, qh [32], qs [128]
  const GroupFactors g = group_factors(p, in, r);
  const Words high_first = words_u8(p + 16), high_last = words_u8(p + 32);
#pragma GCC unroll 4
  for (int pair = 0; pair < 4; ++pair) {
    const Words first = words_u8(p + 48 + pair * 32), last = words_u8(p + 64 + pair * 32);
    const auto fifth = [](Words high, int group) { return ((high >> group) & 1) << 4; };
    add_products((first & 15) | fifth(high_first, 2 * pair), (last & 15) | fifth(high_last, 2 * pair), in.x + pair * 64,
                 eight(g.of[2 * pair]), r);
    add_products((first >> 4) | fifth(high_first, 2 * pair + 1), (last >> 4) | fifth(high_last, 2 * pair + 1),
                 in.x + pair * 64 + 32, eight(g.of[2 * pair + 1]), r);
  }
}
// Two halves of 128, each four runs of 32: runs 0 and 1 have the low nibbles of ql [0, 32) and [32, 64), runs 2 and 3
// the high ones; run r has bits 2r and 2r + 1 of qh on top. 16 elements share a scale; q stands for q - 32.
[[gnu::always_inline]] inline void q6_k_block(const Byte* p, const BlockInput& in,
                                              RowSum& r) {  // ql [128], qh [64], scales i8 [16], d
  const Floats a = load_floats(in.scale), b = load_floats(in.scale + 8), d = eight(one_half(p + 208));
  const Floats factors[2] = {d * floats_i8(p + 192) * __builtin_shufflevector(a, a, 0, 0, 2, 2, 4, 4, 6, 6),
                             d * floats_i8(p + 200) * __builtin_shufflevector(b, b, 0, 0, 2, 2, 4, 4, 6, 6)};
  float factor[16];
  __builtin_memcpy(factor, factors, sizeof factor);
#pragma GCC unroll 2
  for (int half = 0; half < 2; ++half)
#pragma GCC unroll 2
    for (int part = 0; part < 2; ++part) {
      const Words low[2] = {words_u8(p + half * 64 + part * 16), words_u8(p + half * 64 + 32 + part * 16)};
      const Words high = words_u8(p + 128 + half * 32 + part * 16);
#pragma GCC unroll 4
      for (int run = 0; run < 4; ++run) {
        const Words q = ((low[run % 2] >> run / 2 * 4) & 15) | (((high >> 2 * run) & 3) << 4);
        const Sums sums = multiply_pairs(q - 32, load_words(in.x + half * 128 + run * 32 + part * 16));
        r.lanes = multiply_add(eight(factor[half * 8 + run * 2 + part]), to_floats(sums), r.lanes);
      }
    }
}

/// y[i] = Σ w[i][·]·x for rows of blocks of `elements` weights in `bytes` bytes; rest: how often what a row collected
/// besides its lanes counts. Two rows at a time, as each waits for its own sums: one of either half, so that memory is
/// read in two long runs.
template <Index elements, Index bytes, auto block>
inline void rows_of_blocks(const Byte* w, Index row_bytes, Index rows, Index n, const RowInput& in, float* y,
                           float rest) {
  const auto finish = [=](const RowSum& r) { return total(r.lanes) + rest * r.rest[1]; };
  constexpr Index ahead = 1024;  // bytes
  const Index half = rows / 2;
  for (Index i = 0; i < half; ++i) {
    RowSum a{eight(0.0f), Pair{}}, b = a;
    const Byte *p = w + i * row_bytes, *q = p + half * row_bytes;
    for (Index at = 0; at < n; at += elements, p += bytes, q += bytes) {
      const BlockInput here{in.x + at, in.scale + at / 16};
      __builtin_prefetch(p + ahead), __builtin_prefetch(q + ahead);
      block(p, here, a);
      block(q, here, b);
    }
    y[i] = finish(a), y[half + i] = finish(b);
  }
  if (rows % 2 == 1) {
    RowSum a{eight(0.0f), Pair{}};
    const Byte* p = w + (rows - 1) * row_bytes;
    for (Index at = 0; at < n; at += elements, p += bytes) block(p, BlockInput{in.x + at, in.scale + at / 16}, a);
    y[rows - 1] = finish(a);
  }
}

/// The same for plain floats of `bytes` bytes; one(p) reads one of them.
template <Index bytes, class Vector, class One>
inline void rows_of_floats(const Byte* w, Index row_bytes, Index rows, Index n, const float* x, float* y, Vector vector,
                           One one) {
  for (Index i = 0; i < rows; ++i) {
    const Byte* p = w + i * row_bytes;
    F a = zero(), b = zero();
    Index at = 0;
    for (; at + 2 * W <= n; at += 2 * W) {
      a = fma(vector(p + at * bytes), load(x + at), a);
      b = fma(vector(p + (at + W) * bytes), load(x + at + W), b);
    }
    float sum = sum_lanes(a + b);
    for (; at < n; ++at) sum += one(p + at * bytes) * x[at];
    y[i] = sum;
  }
}

inline void row_product(WeightFormat format, const void* weights, Index row_bytes, Index rows, Index n,
                        const RowInput& in, float* y) {
  const Byte* w = static_cast<const Byte*>(weights);
  const auto f32 = [](const Byte* p) { return load(reinterpret_cast<const float*>(p)); };
  const auto f32_one = [](const Byte* p) {
    float v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
  };
  const auto bf16_one = [](const Byte* p) {
    const std::uint32_t u = static_cast<std::uint32_t>(p[0] | p[1] << 8) << 16;
    float v;
    __builtin_memcpy(&v, &u, sizeof v);
    return v;
  };
  switch (format) {
    case WeightFormat::f32: return rows_of_floats<4>(w, row_bytes, rows, n, in.values, y, f32, f32_one);
    case WeightFormat::f16: return rows_of_floats<2>(w, row_bytes, rows, n, in.values, y, load_f16, half_at);
    case WeightFormat::bf16: return rows_of_floats<2>(w, row_bytes, rows, n, in.values, y, load_bf16, bf16_one);
    case WeightFormat::q4_0: return rows_of_blocks<32, 18, q4_0_block>(w, row_bytes, rows, n, in, y, -8);
    case WeightFormat::q4_1: return rows_of_blocks<32, 20, q4_1_block>(w, row_bytes, rows, n, in, y, 1);
    case WeightFormat::q5_0: return rows_of_blocks<32, 22, q5_0_block>(w, row_bytes, rows, n, in, y, -16);
    case WeightFormat::q5_1: return rows_of_blocks<32, 24, q5_1_block>(w, row_bytes, rows, n, in, y, 1);
    case WeightFormat::q8_0: return rows_of_blocks<32, 34, q8_0_block>(w, row_bytes, rows, n, in, y, 0);
    case WeightFormat::q4_k: return rows_of_blocks<256, 144, q4_k_block>(w, row_bytes, rows, n, in, y, 0);
    case WeightFormat::q5_k: return rows_of_blocks<256, 176, q5_k_block>(w, row_bytes, rows, n, in, y, 0);
    case WeightFormat::q6_k: return rows_of_blocks<256, 210, q6_k_block>(w, row_bytes, rows, n, in, y, 0);
  }
}
