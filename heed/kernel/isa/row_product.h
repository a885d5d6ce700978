// One row of activations times a matrix in the format of its file: what decoding reads, it reads once and as it is.
// Included inside each instruction set's own namespace, after gemm.h.
//
// A block of 32 weights is x = d·q + m (m = 0, -8·d, … by format), so its share of a product is d·Σ q·x + m·Σ x: the
// sums of 32 inputs are made once for all rows. q are widened to floats in registers.

using Byte = std::uint8_t;

/// What a row collects: acc by lanes, and what needs no lanes.
struct RowSum {
  F acc;
  float rest;
};

/// Σ over 32 weights of q·x, by lanes; nibbles(k) gives lanes W·k … of the low (k·W < 16) and the high nibbles.
template <class Quants>
inline F dot_32(const float* x, Quants q) {
  F a = to_float(q(0)) * load(x), b = to_float(q(1)) * load(x + W);
#pragma GCC unroll 8
  for (int k = 2; k < 32 / W; k += 2) {
    a = fma(to_float(q(k)), load(x + k * W), a);
    b = fma(to_float(q(k + 1)), load(x + (k + 1) * W), b);
  }
  return a + b;
}

/// Lanes W·k … of 32 nibbles: element j < 16 is the low one of byte j, element j + 16 the high one.
inline I nibbles(const Byte* qs, int k) {
  return k * W < 16 ? bits_and(load_u8(qs + k * W), 15) : shift_right(load_u8(qs + k * W - 16), 4);
}

/// The same with bit j of `fifth` as bit 4 of element j.
inline I five_bits(const Byte* qs, std::uint32_t fifth, int k) {
  const std::uint32_t half = (k * W < 16 ? fifth & 0xffffu : fifth >> 16) << 4;
  return bits_or(nibbles(qs, k), bits_and(spread_bits(half, k * W % 16), 16));
}

inline std::uint32_t u32_at(const Byte* p) {
  std::uint32_t x;
  __builtin_memcpy(&x, p, sizeof x);
  return x;
}

// One block of each format: p, its inputs x, the sums of each 32 of them.

inline void q4_0_block(const Byte* p, const float* x, const float* sums, RowSum& r) {  // d, qs [16]
  const float d = half_at(p);
  r.acc = fma(set1(d), dot_32(x, [&](int k) { return nibbles(p + 2, k); }), r.acc);
  r.rest -= 8 * d * sums[0];
}
inline void q4_1_block(const Byte* p, const float* x, const float* sums, RowSum& r) {  // d, m, qs [16]
  r.acc = fma(set1(half_at(p)), dot_32(x, [&](int k) { return nibbles(p + 4, k); }), r.acc);
  r.rest += half_at(p + 2) * sums[0];
}
inline void q5_0_block(const Byte* p, const float* x, const float* sums, RowSum& r) {  // d, fifth bits, qs [16]
  const float d = half_at(p);
  const std::uint32_t fifth = u32_at(p + 2);
  r.acc = fma(set1(d), dot_32(x, [&](int k) { return five_bits(p + 6, fifth, k); }), r.acc);
  r.rest -= 16 * d * sums[0];
}
inline void q5_1_block(const Byte* p, const float* x, const float* sums, RowSum& r) {  // d, m, fifth bits, qs [16]
  const std::uint32_t fifth = u32_at(p + 4);
  r.acc = fma(set1(half_at(p)), dot_32(x, [&](int k) { return five_bits(p + 8, fifth, k); }), r.acc);
  r.rest += half_at(p + 2) * sums[0];
}
inline void q8_0_block(const Byte* p, const float* x, const float*, RowSum& r) {  // d, qs i8 [32]
  r.acc = fma(set1(half_at(p)), dot_32(x, [&](int k) { return load_i8(p + 2 + k * W); }), r.acc);
}
// 32 bytes serve two groups of 32, the even one by its low nibbles.
inline void q4_k_block(const Byte* p, const float* x, const float* sums, RowSum& r) {  // d, dmin, scales [12], qs [128]
  const GroupScales g = group_scales(p + 4, half_at(p), half_at(p + 2));
  for (int group = 0; group < 8; ++group) {
    const Byte* qs = p + 16 + group / 2 * 32;
    const int shift = group % 2 * 4;
    const F dot = dot_32(x + group * 32, [&](int k) { return bits_and(shift_right(load_u8(qs + k * W), shift), 15); });
    r.acc = fma(set1(g.scale[group]), dot, r.acc);
    r.rest -= g.minimum[group] * sums[group];
  }
}
// Bit g of byte j of qh is the fifth bit of element j of group g.
inline void q5_k_block(const Byte* p, const float* x, const float* sums, RowSum& r) {  // …, qh [32], qs [128]
  const GroupScales g = group_scales(p + 4, half_at(p), half_at(p + 2));
  for (int group = 0; group < 8; ++group) {
    const Byte* qs = p + 48 + group / 2 * 32;
    const int shift = group % 2 * 4;
    const F dot = dot_32(x + group * 32, [&](int k) {
      const I fifth = bits_and(shift_left(shift_right(load_u8(p + 16 + k * W), group), 4), 16);
      return bits_or(bits_and(shift_right(load_u8(qs + k * W), shift), 15), fifth);
    });
    r.acc = fma(set1(g.scale[group]), dot, r.acc);
    r.rest -= g.minimum[group] * sums[group];
  }
}
// Two halves of 128, each four runs of 32: runs 0 and 1 have the low nibbles of ql [0, 32) and [32, 64), runs 2 and 3
// the high ones; run r has bits 2r and 2r + 1 of qh on top. 16 elements share a scale; q stands for q - 32.
inline void q6_k_block(const Byte* p, const float* x, const float*, RowSum& r) {  // ql [128], qh [64], scales [16], d
  const float d = half_at(p + 208);
  for (int half = 0; half < 2; ++half)
    for (int run = 0; run < 4; ++run) {
      const Byte *low = p + half * 64 + run % 2 * 32, *high = p + 128 + half * 32;
      const int shift = run / 2 * 4;
#pragma GCC unroll 8
      for (int part = 0; part < 2; ++part) {
        std::int8_t scale;
        __builtin_memcpy(&scale, p + 192 + half * 8 + run * 2 + part, 1);
        F dot = zero();
#pragma GCC unroll 4
        for (int k = 0; k < 16 / W; ++k) {
          const int at = part * 16 + k * W;
          const I top = shift_left(bits_and(shift_right(load_u8(high + at), 2 * run), 3), 4);
          const I q = bits_or(bits_and(shift_right(load_u8(low + at), shift), 15), top);
          dot = fma(to_float(q) - set1(32), load(x + half * 128 + run * 32 + at), dot);
        }
        r.acc = fma(set1(d * static_cast<float>(scale)), dot, r.acc);
      }
    }
}

/// y[i] = Σ w[i][·]·x for rows of blocks of `elements` weights in `bytes` bytes.
template <Index elements, Index bytes, class Block>
inline void rows_of_blocks(const Byte* w, Index row_bytes, Index rows, Index n, const float* x, const float* sums,
                           float* y, Block block) {
  for (Index i = 0; i < rows; ++i) {
    const Byte* p = w + i * row_bytes;
    RowSum r{zero(), 0};
    for (Index at = 0; at < n; at += elements, p += bytes) block(p, x + at, sums + at / 32, r);
    y[i] = sum_lanes(r.acc) + r.rest;
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

inline void row_product(WeightFormat format, const void* weights, Index row_bytes, Index rows, Index n, const float* x,
                        const float* sums, float* y) {
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
    case WeightFormat::f32: return rows_of_floats<4>(w, row_bytes, rows, n, x, y, f32, f32_one);
    case WeightFormat::f16: return rows_of_floats<2>(w, row_bytes, rows, n, x, y, load_f16, half_at);
    case WeightFormat::bf16: return rows_of_floats<2>(w, row_bytes, rows, n, x, y, load_bf16, bf16_one);
    case WeightFormat::q4_0: return rows_of_blocks<32, 18>(w, row_bytes, rows, n, x, sums, y, q4_0_block);
    case WeightFormat::q4_1: return rows_of_blocks<32, 20>(w, row_bytes, rows, n, x, sums, y, q4_1_block);
    case WeightFormat::q5_0: return rows_of_blocks<32, 22>(w, row_bytes, rows, n, x, sums, y, q5_0_block);
    case WeightFormat::q5_1: return rows_of_blocks<32, 24>(w, row_bytes, rows, n, x, sums, y, q5_1_block);
    case WeightFormat::q8_0: return rows_of_blocks<32, 34>(w, row_bytes, rows, n, x, sums, y, q8_0_block);
    case WeightFormat::q4_k: return rows_of_blocks<256, 144>(w, row_bytes, rows, n, x, sums, y, q4_k_block);
    case WeightFormat::q5_k: return rows_of_blocks<256, 176>(w, row_bytes, rows, n, x, sums, y, q5_k_block);
    case WeightFormat::q6_k: return rows_of_blocks<256, 210>(w, row_bytes, rows, n, x, sums, y, q6_k_block);
  }
}
