// The microkernel: a few rows of A times packed columns of B, sums kept in registers.
// Included inside each instruction set's own namespace, after vec.h.
//
// The register tile is rows × (vectors·W) columns. AVX-512 has 32 registers: 6 × 64 takes 24 sums, 4 of
// B and 1 of A. AVX2 has 16: 6 × 16 takes 12 + 2 + 1. A row of A is read element by element (pair by
// pair in bf16) and broadcast; B streams, `ldb` elements from one step of the sum to the next.

// `unrolled` steps of a sum are written out: on AVX2, where a step is short, four of them gain 1 to 3 % of the peak.

#if defined(__AVX512F__)
inline constexpr int tile_rows = 6, tile_vectors = 4, unrolled = 1;
#elif defined(__AVX2__)
inline constexpr int tile_rows = 6, tile_vectors = 2, unrolled = 4;
#else
inline constexpr int tile_rows = 4, tile_vectors = 2, unrolled = 1;
#endif

template <int rows, int vectors>
inline void tile_f32(const float* const* a, const float* b, Index ldb, Index k, float* const* c, Index column,
                     bool accumulate) {
  F sum[rows][vectors];
  const float* row[rows];
#pragma GCC unroll 8
  for (int i = 0; i < rows; ++i) {
    row[i] = a[i];
#pragma GCC unroll 4
    for (int j = 0; j < vectors; ++j) sum[i][j] = accumulate ? load(c[i] + column + j * W) : zero();
  }
#pragma GCC unroll unrolled
  for (Index step = 0; step < k; ++step) {
    F bv[vectors];
#pragma GCC unroll 4
    for (int j = 0; j < vectors; ++j) bv[j] = load(b + j * W);
    b += ldb;
#pragma GCC unroll 8
    for (int i = 0; i < rows; ++i) {
      const F av = set1(row[i][step]);
#pragma GCC unroll 4
      for (int j = 0; j < vectors; ++j) sum[i][j] = fma(av, bv[j], sum[i][j]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < rows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < vectors; ++j) store(c[i] + column + j * W, sum[i][j]);
}

#if defined(__AVX512BF16__)
template <int rows, int vectors>
inline void tile_bf16(const bf16* const* a, const bf16* b, Index ldb, Index k, float* const* c, Index column,
                      bool accumulate) {
  F sum[rows][vectors];
  const std::int32_t* row[rows];  // pairs
#pragma GCC unroll 8
  for (int i = 0; i < rows; ++i) {
    row[i] = reinterpret_cast<const std::int32_t*>(a[i]);
#pragma GCC unroll 4
    for (int j = 0; j < vectors; ++j) sum[i][j] = accumulate ? load(c[i] + column + j * W) : zero();
  }
  for (Index step = 0; step < k / 2; ++step) {
    __m512bh bv[vectors];
#pragma GCC unroll 4
    for (int j = 0; j < vectors; ++j) bv[j] = (__m512bh)_mm512_loadu_si512(b + j * 2 * W);
    b += ldb;
#pragma GCC unroll 8
    for (int i = 0; i < rows; ++i) {
      const __m512bh av = (__m512bh)_mm512_set1_epi32(row[i][step]);
#pragma GCC unroll 4
      for (int j = 0; j < vectors; ++j) sum[i][j] = _mm512_dpbf16_ps(sum[i][j], av, bv[j]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < rows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < vectors; ++j) store(c[i] + column + j * W, sum[i][j]);
}
#endif

template <int rows, int vectors, class T>
inline void tile(const T* const* a, const T* b, Index ldb, Index k, float* const* c, Index column, bool accumulate) {
  if constexpr (sizeof(T) == 4) {
    tile_f32<rows, vectors>(a, b, ldb, k, c, column, accumulate);
  } else {
#if defined(__AVX512BF16__)
    tile_bf16<rows, vectors>(a, b, ldb, k, c, column, accumulate);
#endif
  }
}

/// c[i][0 … columns) = or += Σ_k a[i][k]·b[k][·] for `rows` rows (<= tile_rows); columns a multiple of W.
template <int rows, class T>
inline void product_of(const T* const* a, const T* b, Index ldb, Index k, Index columns, float* const* c,
                       bool accumulate) {
  constexpr Index pair = sizeof(T) == 2 ? 2 : 1;
  Index column = 0;
  for (; column + tile_vectors * W <= columns; column += tile_vectors * W)
    tile<rows, tile_vectors>(a, b + column * pair, ldb, k, c, column, accumulate);
  if constexpr (tile_vectors == 4)
    if (column + 2 * W <= columns) {
      tile<rows, 2>(a, b + column * pair, ldb, k, c, column, accumulate);
      column += 2 * W;
    }
  if (column < columns) tile<rows, 1>(a, b + column * pair, ldb, k, c, column, accumulate);
}

template <int n>
struct Vectors {};

#if defined(HEED_TILES)
#include "heed/kernel/isa/tiles.h"
#endif

/// Rows that one call of product() serves.
template <class T>
inline constexpr Index group_rows = tile_rows;

#if defined(HEED_TILES)
template <>
inline constexpr Index group_rows<bf16> = tiled_rows;
#endif

/// Called once before a run of products.
inline void begin_products() {
#if defined(HEED_TILES)
  configure_tiles();
#endif
}

template <class T>
inline void product(Index rows, const T* const* a, const T* b, Index ldb, Index k, Index columns, float* const* c,
                    bool accumulate) {
#if defined(HEED_TILES)
  if constexpr (sizeof(T) == 2) return tiled_product(rows, a, b, ldb, k, columns, c, accumulate);
#endif
  switch (rows) {
    case 1: return product_of<1>(a, b, ldb, k, columns, c, accumulate);
    case 2: return product_of<2>(a, b, ldb, k, columns, c, accumulate);
    case 3: return product_of<3>(a, b, ldb, k, columns, c, accumulate);
    case 4: return product_of<4>(a, b, ldb, k, columns, c, accumulate);
    case 5:
      if constexpr (tile_rows >= 5) return product_of<5>(a, b, ldb, k, columns, c, accumulate);
      break;
    case 6:
      if constexpr (tile_rows >= 6) return product_of<6>(a, b, ldb, k, columns, c, accumulate);
      break;
  }
}

/// A few rows of C += A^T·B: a points at the column of A that is C's first row, `lda` elements to its next element.
template <int rows, int vectors>
inline void tile_transposed(const float* a, Index lda, const float* b, Index ldb, Index k, float* c, Index ldc) {
  F sum[rows][vectors];
#pragma GCC unroll 8
  for (int i = 0; i < rows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < vectors; ++j) sum[i][j] = load(c + i * ldc + j * W);
  for (Index step = 0; step < k; ++step, a += lda, b += ldb) {
    F bv[vectors];
#pragma GCC unroll 4
    for (int j = 0; j < vectors; ++j) bv[j] = load(b + j * W);
#pragma GCC unroll 8
    for (int i = 0; i < rows; ++i) {
      const F av = set1(a[i]);
#pragma GCC unroll 4
      for (int j = 0; j < vectors; ++j) sum[i][j] = fma(av, bv[j], sum[i][j]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < rows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < vectors; ++j) store(c + i * ldc + j * W, sum[i][j]);
}

/// C[rows×columns] += A^T·B, A [k×rows] and B [k×columns] row-major, columns a multiple of W.
inline void transposed_product(Index rows, const float* a, Index lda, const float* b, Index ldb, Index k, Index columns,
                               float* c, Index ldc) {
  const auto strip = [&]<int vectors>(Index column, Vectors<vectors>) {
    Index i = 0;
    for (; i + tile_rows <= rows; i += tile_rows)
      tile_transposed<tile_rows, vectors>(a + i, lda, b + column, ldb, k, c + i * ldc + column, ldc);
    for (; i + 2 <= rows; i += 2)
      tile_transposed<2, vectors>(a + i, lda, b + column, ldb, k, c + i * ldc + column, ldc);
    if (i < rows) tile_transposed<1, vectors>(a + i, lda, b + column, ldb, k, c + i * ldc + column, ldc);
  };
  Index column = 0;
  for (; column + tile_vectors * W <= columns; column += tile_vectors * W) strip(column, Vectors<tile_vectors>{});
  for (; column < columns; column += W) strip(column, Vectors<1>{});
}
