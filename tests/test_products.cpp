// Products, packing and row functions of every instruction set that this machine has, against f64.
#include <algorithm>
#include <cmath>

#include "support/tables.h"

using namespace heed;
using namespace heed::test;

TEST_CASE("gemm equals its sums") {
  for_both([](const Kernels& k, auto kind) {
    using T = decltype(kind);
    constexpr bool paired = sizeof(T) == 2;
    for (const Index m : {1, 3, 6, 7, 32, 41})
      for (const Index n : {1, 16, 17, 63, 64, 65, 100, 200})
        for (Index depth : {1, 2, 31, 64, 300, 1100}) {
          if (depth == 1100 && n > 65) continue;
          if (paired) depth = up_to(depth, k.key_step);
          const Index lda = depth + (paired ? 6 : 5), ldc = up_to(n, 16) + 3, panels = (n + 63) / 64;
          const std::vector<float> a = normals(m * lda, paired), b = normals(depth * n, paired);
          std::vector<T> a_packed(a.size()), b_packed(static_cast<size_t>(panels * 64 * depth), T{});
          for (size_t i = 0; i < a.size(); ++i) put(a_packed, static_cast<Index>(i), a[i]);
          for (Index f = 0; f < depth; ++f)
            for (Index j = 0; j < n; ++j) {
              const Index p = j / 64, c = j % 64;
              put(b_packed, paired ? ((p * depth / 2 + f / 2) * 64 + c) * 2 + f % 2 : (p * depth + f) * 64 + c,
                  b[static_cast<size_t>(f * n + j)]);
            }
          for (const bool accumulate : {false, true}) {
            std::vector<float> start = normals(m * ldc), c = start;
            if (!accumulate) c.assign(c.size(), std::numeric_limits<float>::quiet_NaN());
            if constexpr (paired)
              k.gemm_bf16(m, n, depth, a_packed.data(), lda, b_packed.data(), c.data(), ldc, accumulate);
            else k.gemm_f32(m, n, depth, a_packed.data(), lda, b_packed.data(), c.data(), ldc, accumulate);
            double worst = 0;
            bool outside = true;
            for (Index i = 0; i < m; ++i) {
              for (Index j = 0; j < n; ++j) {
                double sum = accumulate ? start[static_cast<size_t>(i * ldc + j)] : 0, size = std::fabs(sum) + 1e-3;
                for (Index f = 0; f < depth; ++f) {
                  const double x = double(a[static_cast<size_t>(i * lda + f)]) * b[static_cast<size_t>(f * n + j)];
                  sum += x, size += std::fabs(x);
                }
                const double off = std::fabs(c[static_cast<size_t>(i * ldc + j)] - sum) / size;
                worst = std::max(worst, std::isnan(off) ? 1e9 : off);
              }
              for (Index j = up_to(n, 16); j < ldc; ++j) {
                const float x = c[static_cast<size_t>(i * ldc + j)];
                outside = outside && (accumulate ? x == start[static_cast<size_t>(i * ldc + j)] : std::isnan(x));
              }
            }
            // In units of the sum of magnitudes: f32 sums in any order.
            CHECK_MESSAGE(worst < 3e-6, k.name, paired ? " bf16 " : " f32 ", m, " x ", n, " x ", depth, ": off by ",
                          worst);
            CHECK(outside);
          }
        }
  });
}

TEST_CASE("packed keys lie as panels.h says") {
  for_each_table([](const Kernels& k) {
    for (const Index d : {1, 2, 7, 33, 64})
      for (const Index columns : {1, 5, 63, 64}) {
        const Index ldx = d + 3, dp = up_to(d, 32);
        const std::vector<float> x = normals(columns * ldx);
        std::vector<float> panel(static_cast<size_t>(64 * d), 9);
        k.pack_keys_f32(x.data(), ldx, columns, d, d, panel.data());
        std::vector<bf16> pairs(static_cast<size_t>(64 * dp), bf16{9});
        k.pack_keys_bf16(x.data(), ldx, columns, d, dp, pairs.data());
        Index wrong = 0;
        for (Index f = 0; f < dp; ++f)
          for (Index c = 0; c < 64; ++c) {
            const float want = f < d && c < columns ? x[static_cast<size_t>(c * ldx + f)] : 0;
            if (f < d) wrong += panel[static_cast<size_t>(f * 64 + c)] != want;
            wrong += pairs[static_cast<size_t>((f / 2 * 64 + c) * 2 + f % 2)].bits != bits_of(nearest_bf16(want)).bits;
          }
        CHECK_MESSAGE(wrong == 0, k.name, " d ", d, " columns ", columns);
      }
  });
}

TEST_CASE("round_bf16 rounds to nearest, ties to even") {
  for_each_table([](const Kernels& k) {
    std::vector<float> x = normals(1000);
    for (Index e = -130; e < 128; ++e)
      for (const double f : {1.0, 1 + 0x1p-8, 1 + 0x3p-8, 1 + 0x1p-8 + 0x1p-23, 1 + 0x1p-8 - 0x1p-23, 2 - 0x1p-23})
        x.push_back(static_cast<float>((e % 2 == 0 ? 1 : -1) * std::ldexp(f, static_cast<int>(e))));
    x.insert(x.end(),
             {0.0f, -0.0f, inf, -inf, std::numeric_limits<float>::max(), std::numeric_limits<float>::denorm_min()});
    for (const size_t n : {x.size(), size_t{1}, size_t{15}, size_t{17}}) {
      std::vector<bf16> out(x.size(), bf16{0x1234});
      k.round_bf16(x.data(), static_cast<Index>(n), out.data());
      Index wrong = 0;
      for (size_t i = 0; i < x.size(); ++i) {
        if (i >= n) {
          wrong += out[i].bits != 0x1234;
          continue;
        }
        const double want = nearest_bf16(x[i]);
        std::uint16_t bits = bits_of(want).bits;
        if (std::fabs(want) > 3.4e38) bits = std::signbit(x[i]) ? 0xff80 : 0x7f80;
        wrong += out[i].bits != bits;
      }
      CHECK_MESSAGE(wrong == 0, k.name);
    }
    float sneaky;
    const std::uint32_t low = 0x7f800001;  // a NaN whose upper half alone is infinity
    std::memcpy(&sneaky, &low, 4);
    const float quiet = std::numeric_limits<float>::quiet_NaN(), nans[3] = {quiet, -quiet, sneaky};
    bf16 out[3];
    k.round_bf16(nans, 3, out);
    for (const bf16 o : out) CHECK((o.bits & 0x7fff) > 0x7f80);
  });
}

TEST_CASE("rms_norm, silu_mul, gelu_mul, dot, log_sum_exp") {
  for_each_table([](const Kernels& k) {
    CAPTURE(k.name);
    for (const Index n : {1, 3, 16, 31, 64, 100, 577, 2048}) {
      CAPTURE(n);
      std::vector<float> a = normals(n), b = normals(n), out(static_cast<size_t>(n) + 1, 5);
      for (float& x : a) x *= 3;
      double square = 0, product = 0, size = 0;
      for (size_t i = 0; i < a.size(); ++i)
        square += double(a[i]) * a[i], product += double(a[i]) * b[i], size += std::fabs(double(a[i]) * b[i]);
      CHECK(std::fabs(k.dot(a.data(), b.data(), n) - product) <= 2e-6 * size);

      const auto worst = [&](const std::function<double(double, double)>& want) {
        double most = 0;
        for (size_t i = 0; i < a.size(); ++i) {
          const double w = want(a[i], b[i]), off = std::fabs(out[i] - w) / std::max(1.0, std::fabs(w));
          most = std::max(most, std::isnan(off) ? 1e9 : off);
        }
        CHECK(out.back() == 5);
        return most;
      };
      k.rms_norm(a.data(), b.data(), n, 1e-5f, out.data());
      const double r = 1 / std::sqrt(square / static_cast<double>(n) + double(1e-5f));
      CHECK(worst([&](double x, double w) { return x * r * w; }) < 2e-6);
      // Far ends: exp(-x) over- and underflows.
      if (n > 16)
        a[0] = 200, a[1] = -200, a[2] = 0, a[3] = -0.0f, a[static_cast<size_t>(n) - 1] = -90, a[4] = 1e-8f, a[5] = -30;
      k.silu_mul(a.data(), b.data(), n, out.data());
      CHECK(worst([](double x, double u) { return x / (1 + std::exp(-x)) * u; }) < 2e-6);
      k.gelu_mul(a.data(), b.data(), n, out.data());
      CHECK(worst([](double x, double u) {
              return 0.5 * x * (1 + std::tanh(std::sqrt(2 / std::acos(-1.0)) * (x + 0.044715 * x * x * x))) * u;
            }) < 1e-5);

      // In place, as models do it.
      std::vector<float> gate = a;
      k.silu_mul(gate.data(), b.data(), n, gate.data());
      k.silu_mul(a.data(), b.data(), n, out.data());
      CHECK(std::equal(gate.begin(), gate.end(), out.begin()));

      // In three pieces, the second one -inf throughout.
      float maximum = -inf, sum = 0;
      const std::vector<float> nothing(37, -inf);
      const Index half = n / 2;
      k.log_sum_exp(b.data(), half, maximum, sum);
      k.log_sum_exp(nothing.data(), 37, maximum, sum);
      k.log_sum_exp(b.data() + half, n - half, maximum, sum);
      double total = 0;
      for (const float x : b) total += std::exp(double(x));
      CHECK(maximum + std::log(double(sum)) == doctest::Approx(std::log(total)).epsilon(2e-6));
    }
    float maximum = -inf, sum = 0;
    const float nothing[5] = {-inf, -inf, -inf, -inf, -inf};
    k.log_sum_exp(nothing, 5, maximum, sum);
    CHECK(maximum == -inf);
    CHECK(sum == 0);
    std::vector<float> steep(40, -1000);
    steep[17] = 700;
    k.log_sum_exp(steep.data(), 40, maximum, sum);
    CHECK(maximum == 700);
    CHECK(sum == doctest::Approx(1).epsilon(1e-6));
  });
}

TEST_CASE("choose_top takes the head of a stable sort") {
  for_each_table([](const Kernels& k) {
    for (const Index n : {2, 5, 31, 32, 33, 64, 100, 128, 257, 1000, 5000})
      for (const Index wanted : {1, 2, 3, 7, 8, 9, 15, 16, 17, 40, 300})
        for (const int kind : {0, 1, 2, 3, 4, 5}) {
          if (wanted >= n) continue;
          std::vector<float> x = normals(n);
          std::vector<std::int32_t> order(x.size()), chosen(static_cast<size_t>(wanted));
          for (size_t i = 0; i < x.size(); ++i) {
            order[i] = static_cast<std::int32_t>(i);
            if (kind == 1) x[i] = std::round(x[i]);                                  // many ties
            if (kind == 2) x[i] = static_cast<float>(i) / 7;                         // ascending
            if (kind == 3) x[i] = -static_cast<float>(i) / 7;                        // descending
            if (kind == 4) x[i] = i % 3 == 0 ? x[i] : -inf;                          // hidden ones
            if (kind == 5) x[i] = i < static_cast<size_t>(n / 2) ? 1.0f : 1 + x[i];  // a plateau
          }
          for (const bool higher_wins : {false, true}) {
            std::vector<std::int32_t> want = order;
            std::sort(want.begin(), want.end(), [&](std::int32_t a, std::int32_t b) {
              const float u = x[static_cast<size_t>(a)], v = x[static_cast<size_t>(b)];
              return u != v ? u > v : higher_wins ? a > b : a < b;
            });
            want.resize(chosen.size());
            std::sort(want.begin(), want.end());
            k.choose_top(x.data(), n, wanted, higher_wins, chosen.data());
            INFO(k.name, " n ", n, " k ", wanted, " kind ", kind, " higher ", higher_wins);
            CHECK(chosen == want);
          }
        }
  });
}
