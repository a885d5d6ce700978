// Tables of kernels to test: every instruction set that this machine has, each proven to be the one
// in use, and the loops around AMX tiles with the tiles themselves played by arrays.
#pragma once

#include <doctest/doctest.h>

#include <cstring>
#include <functional>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "heed/kernel/kernels.h"
#include "support/cases.h"

#define HEED_ISA amx_emulated
#define HEED_TILES
#define HEED_TILES_EMULATED
#include "heed/kernel/isa/table.h"

namespace heed::test {

inline constexpr float inf = std::numeric_limits<float>::infinity();

/// Every table that this machine can run, selected, and the emulated one.
inline void for_each_table(const std::function<void(const Kernels&)>& body) {
  for (const std::string& isa : available_isas()) {
    const UseIsa use(isa);
    REQUIRE(kernels().name == isa);
    body(kernels());
  }
  body(amx_emulated::table);
}

inline std::mt19937_64 random_bits(17);

inline float normal() {
  static std::normal_distribution<double> distribution(0, 1);
  return static_cast<float>(distribution(random_bits));
}

inline std::vector<float> normals(Index n, bool rounded = false) {
  std::vector<float> x(static_cast<size_t>(n));
  for (float& e : x) e = rounded ? static_cast<float>(nearest_bf16(normal())) : normal();
  return x;
}

inline bf16 bits_of(double x) {  // x is a bf16 already
  const float f = static_cast<float>(x);
  std::uint32_t u;
  std::memcpy(&u, &f, 4);
  return {static_cast<std::uint16_t>(u >> 16)};
}

inline Index up_to(Index n, Index step) { return (n + step - 1) / step * step; }

/// Writes x, which is a T already.
template <class T>
void put(std::vector<T>& to, Index i, float x) {
  if constexpr (sizeof(T) == 2) to[static_cast<size_t>(i)] = bits_of(x);
  else to[static_cast<size_t>(i)] = static_cast<T>(x);
}

/// Calls body(table, float{}) and, where the table has a bf16 product, body(table, bf16{}).
template <class Body>
void for_both(Body body) {
  for_each_table([&](const Kernels& k) {
    body(k, float{});
    if (k.bf16_dot) body(k, bf16{});
  });
}

}  // namespace heed::test
