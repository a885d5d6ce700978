// The bf16 product on AMX tiles: 32 × 32 sums in four tiles, A and B in two each.
// Included inside an instruction set's namespace, after product.h, where HEED_TILES is defined.
//
// A tile of A is 16 rows × 32 features. A tile of B is 16 pairs of features × 16 columns, which is
// how packed panels lie. With HEED_TILES_EMULATED the eight tiles are plain arrays, so that the
// loops around them can be tested where there is no AMX.

#if defined(HEED_TILES_EMULATED)

struct TileRegister {
  alignas(64) unsigned char bytes[16][64];
};
inline thread_local TileRegister tile_file[8];
inline void configure_tiles() {}
template <int t>
inline void tile_zero() {
  tile_file[t] = {};
}
template <int t>
inline void tile_load(const void* p, Index stride) {
  for (int r = 0; r < 16; ++r) __builtin_memcpy(tile_file[t].bytes[r], static_cast<const char*>(p) + r * stride, 64);
}
template <int t>
inline void tile_store(float* p, Index stride) {
  for (int r = 0; r < 16; ++r) __builtin_memcpy(reinterpret_cast<char*>(p) + r * stride, tile_file[t].bytes[r], 64);
}
template <int c, int a, int b>
inline void tile_dot() {
  const auto widen = [](const unsigned char* p) {
    bf16 x;
    __builtin_memcpy(&x, p, 2);
    return to_f32(x);
  };
  for (int m = 0; m < 16; ++m)
    for (int n = 0; n < 16; ++n) {
      float sum;
      __builtin_memcpy(&sum, &tile_file[c].bytes[m][4 * n], 4);
      for (int k = 0; k < 16; ++k)
        for (int half = 0; half < 2; ++half)
          sum += widen(&tile_file[a].bytes[m][4 * k + 2 * half]) * widen(&tile_file[b].bytes[k][4 * n + 2 * half]);
      __builtin_memcpy(&tile_file[c].bytes[m][4 * n], &sum, 4);
    }
}

#else

// Palette 1, eight tiles of 16 rows × 64 bytes. The compiler's own intrinsic tells it about eight
// of the operand's bytes only, so it may drop the stores of the rest: hence the memory clobber.
inline void configure_tiles() {
  struct alignas(64) Palette {
    std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
    std::uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  } palette;
  static_assert(sizeof(Palette) == 64);
  asm volatile("ldtilecfg %0" : : "m"(palette) : "memory");
}
// The compiler's tile intrinsics are macros that paste their operand's name into the instruction, so
// a template's parameter does not reach them: one instruction each by hand.
template <int t>
inline void tile_zero() {
  asm volatile("tilezero %%tmm%c0" : : "i"(t));
}
template <int t>
inline void tile_load(const void* p, Index stride) {
  asm volatile("tileloadd (%1,%2,1), %%tmm%c0" : : "i"(t), "r"(p), "r"(stride) : "memory");
}
template <int t>
inline void tile_store(float* p, Index stride) {
  asm volatile("tilestored %%tmm%c0, (%1,%2,1)" : : "i"(t), "r"(p), "r"(stride) : "memory");
}
template <int c, int a, int b>
inline void tile_dot() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(c), "i"(a), "i"(b));
}
/// The same for unsigned bytes of A and signed ones of B, as 32-bit integers.
template <int c, int a, int b>
inline void tile_dot_bytes() {
  asm volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(c), "i"(a), "i"(b));
}

#endif

/// Rows of A that one pass serves, and the features gathered at a time when they do not lie evenly.
inline constexpr Index tiled_rows = 32, gathered_features = 512;

/// 32 rows of A times 32 (or, not `two`, 16) columns of B, 32 features, added to tiles 0 to 3; open(Vectors<c>{}) comes
/// before the first use of tile c.
template <class Open>
inline void multiply_tiles(const bf16* a, Index a_bytes, const bf16* b, Index b_bytes, bool two, Open open) {
  const auto* below = reinterpret_cast<const char*>(a) + 16 * a_bytes;
  tile_load<4>(a, a_bytes);
  tile_load<6>(b, b_bytes);
  open(Vectors<0>{});
  tile_dot<0, 4, 6>();
  tile_load<5>(below, a_bytes);
  open(Vectors<2>{});
  tile_dot<2, 5, 6>();
  open(Vectors<1>{});
  if (two) {
    tile_load<7>(b + 32, b_bytes);
    tile_dot<1, 4, 7>();
  }
  open(Vectors<3>{});
  if (two) tile_dot<3, 5, 7>();
}

/// 32 rows of A (even stride, `k` features) times up to 32 columns of B, into `sums` [32][32].
inline void tiled_block(const bf16* a, Index stride, const bf16* b, Index ldb, Index k, bool two, float* sums) {
  tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
  for (Index f = 0; f < k; f += 32, b += 16 * ldb) multiply_tiles(a + f, stride * 2, b, ldb * 2, two, [](auto) {});
  tile_store<0>(sums, 128), tile_store<1>(sums + 16, 128);
  tile_store<2>(sums + 16 * 32, 128), tile_store<3>(sums + 16 * 32 + 16, 128);
}

/// The contract of product() in product.h, for up to 32 rows and k a multiple of 32.
inline void tiled_product(Index rows, const bf16* const* a, const bf16* b, Index ldb, Index k, Index columns,
                          float* const* c, bool accumulate) {
  alignas(64) bf16 gathered[tiled_rows * gathered_features];
  alignas(64) float sums[32 * 32];
  bool even = rows == tiled_rows;
  for (Index i = 2; even && i < rows; ++i) even = a[i] - a[i - 1] == a[1] - a[0];

  for (Index f = 0; f < k; f += gathered_features) {
    const Index features = k - f < gathered_features ? k - f : gathered_features;
    const bf16* block = a[0] + f;
    Index stride = even ? a[1] - a[0] : features;
    if (!even) {
      for (Index i = 0; i < tiled_rows; ++i)
        for (Index j = 0; j < features; ++j) gathered[i * features + j] = i < rows ? a[i][f + j] : bf16{};
      block = gathered;
    }
    const bool add = accumulate || f > 0;
    for (Index column = 0; column < columns; column += 32) {
      const bool two = column + 16 < columns;
      tiled_block(block, stride, b + f / 2 * ldb + column * 2, ldb, features, two, sums);
      const Index width = two ? 32 : 16;
      for (Index i = 0; i < rows; ++i)
        for (Index j = 0; j < width; j += W) {
          float* to = c[i] + column + j;
          const F x = load(sums + i * 32 + j);
          store(to, add ? load(to) + x : x);
        }
    }
  }
}
