// The product of f32 rows and panels stored in fewer bits, which are widened on their way to the registers, and of few
// rows, which waits for memory. Included inside each instruction set's own namespace, after product.h.
//
// Columns are summed in the order of product.h, so panels of bf16 give the bits that their numbers would give as f32.
// A pair of bf16 lies in one lane: a shift takes the first of it, a mask the second. Bytes are whole numbers, and the
// scales of their columns belong to the sums (keys) or to the weights (values).

#if defined(__AVX512F__)
inline constexpr int registers = 32;
#else
inline constexpr int registers = 16;
#endif

template <Index part>
inline F load_wide(const bf16* p) {
  return part == 0 ? load_first(p) : load_second(p);
}
template <Index part>
inline F load_wide(const std::int8_t* p) {
  return load_bytes(p);
}

template <Index part>
inline F load_wide(const float* p) {
  return load(p);
}

/// One step of the sum: part `part` of a pair (0 where there are none). What is fewer, rows or vectors, waits in
/// registers for the other.
template <Index part, int rows, int vectors, class Stored>
inline void add_step(const float* const* a, const Stored* b, Index step, F (&sum)[rows][vectors]) {
  constexpr Index pair = sizeof(Stored) == 2 ? 2 : 1;
  if constexpr (rows < vectors) {
    F av[rows];
#pragma GCC unroll 8
    for (int i = 0; i < rows; ++i) av[i] = set1(a[i][step]);
#pragma GCC unroll 8
    for (int j = 0; j < vectors; ++j) {
      const F bv = load_wide<part>(b + j * W * pair);
#pragma GCC unroll 8
      for (int i = 0; i < rows; ++i) sum[i][j] = fma(av[i], bv, sum[i][j]);
    }
  } else {
    F bv[vectors];
#pragma GCC unroll 8
    for (int j = 0; j < vectors; ++j) bv[j] = load_wide<part>(b + j * W * pair);
#pragma GCC unroll 8
    for (int i = 0; i < rows; ++i) {
      const F av = set1(a[i][step]);
#pragma GCC unroll 8
      for (int j = 0; j < vectors; ++j) sum[i][j] = fma(av, bv[j], sum[i][j]);
    }
  }
}

/// ahead: elements from a step of B to what is asked of memory meanwhile, or 0.
template <int rows, int vectors, class Stored>
inline void tile_wide(const float* const* a, const Stored* b, Index ldb, Index k, float* const* c, Index column,
                      bool accumulate, Index ahead) {
  constexpr Index pair = sizeof(Stored) == 2 ? 2 : 1, line = 64;
  F sum[rows][vectors];
  const float* row[rows];
#pragma GCC unroll 8
  for (int i = 0; i < rows; ++i) {
    row[i] = a[i];
#pragma GCC unroll 8
    for (int j = 0; j < vectors; ++j) sum[i][j] = accumulate ? load(c[i] + column + j * W) : zero();
  }
  // Tiles side by side ask for what comes next one after the other, in the order of memory.
  constexpr Index share = vectors * W * pair * static_cast<Index>(sizeof(Stored));  // bytes, in each step
  const char* next = reinterpret_cast<const char*>(b - column * pair + ahead + column * k);
  for (Index step = 0; step < k; step += pair, b += ldb, next += share) {
    if (ahead != 0)
      for (Index i = 0; i < share; i += line) __builtin_prefetch(next + i);
    add_step<0>(row, b, step, sum);
    if constexpr (pair == 2) add_step<1>(row, b, step + 1, sum);
  }
#pragma GCC unroll 8
  for (int i = 0; i < rows; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < vectors; ++j) store(c[i] + column + j * W, sum[i][j]);
}

/// Vectors of columns that a tile of so few rows takes: few rows need more of them, as a multiply-add must not wait for
/// the one before it. Sums, the rows' numbers, a vector of B and a mask stay in registers.
template <int rows>
constexpr int vectors_of() {
  int vectors = tile_vectors;
  while ((vectors + 1) * rows + rows + 2 <= registers && (vectors + 1) * W <= panel_columns) ++vectors;
  return vectors > 4 * tile_vectors ? 4 * tile_vectors : vectors;
}

template <int rows, int vectors, class Stored>
inline void product_wide(const float* const* a, const Stored* b, Index ldb, Index k, Index column, Index columns,
                         float* const* c, bool accumulate, Index ahead) {
  constexpr Index pair = sizeof(Stored) == 2 ? 2 : 1;
  for (; column + vectors * W <= columns; column += vectors * W)
    tile_wide<rows, vectors>(a, b + column * pair, ldb, k, c, column, accumulate, ahead);
  if constexpr (vectors > 1)
    if (column < columns) product_wide<rows, (vectors + 1) / 2>(a, b, ldb, k, column, columns, c, accumulate, ahead);
}

/// The contract of product() in product.h, for f32 rows and any panels; k is even where they are bf16. ahead: elements
/// of B from where a step reads to what will be read next, or 0: B is in cache.
template <class Stored>
inline void streaming_product(Index rows, const float* const* a, const Stored* b, Index ldb, Index k, Index columns,
                              float* const* c, bool accumulate, Index ahead) {
  const auto of = [&]<int n>(Vectors<n>) {
    product_wide<n, vectors_of<n>()>(a, b, ldb, k, 0, columns, c, accumulate, ahead);
  };
  switch (rows) {
    case 1: return of(Vectors<1>{});
    case 2: return of(Vectors<2>{});
    case 3: return of(Vectors<3>{});
    case 4: return of(Vectors<4>{});
    case 5:
      if constexpr (tile_rows >= 5) return of(Vectors<5>{});
      break;
    case 6:
      if constexpr (tile_rows >= 6) return of(Vectors<6>{});
      break;
  }
}

template <class T, class Stored>
  requires(sizeof(Stored) < sizeof(T))
inline void product(Index rows, const T* const* a, const Stored* b, Index ldb, Index k, Index columns, float* const* c,
                    bool accumulate) {
  streaming_product(rows, a, b, ldb, k, columns, c, accumulate, 0);
}

/// Panels of pairs as rows of f32: in [steps][width] pairs, out [2·steps, width]; width a multiple of W.
inline void widen_pairs(const bf16* in, Index steps, Index width, float* out) {
  for (Index step = 0; step < steps; ++step, in += 2 * width, out += 2 * width)
    for (Index j = 0; j < width; j += W) {
      store(out + j, load_first(in + 2 * j));
      store(out + width + j, load_second(in + 2 * j));
    }
}

/// n bytes as f32, n a multiple of W.
inline void widen_bytes(const std::int8_t* in, Index n, float* out) {
  for (Index j = 0; j < n; j += W) store(out + j, load_wide<0>(in + j));
}

/// x[j] *= scale[j] for columns [from, to), multiples of W.
inline void scale_columns(float* x, const float* scale, Index from, Index to) {
  for (Index j = from; j < to; j += W) store(x + j, load(x + j) * load(scale + j));
}
