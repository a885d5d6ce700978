// Linear layers against sums in f64, for every instruction set of the machine.

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "heed/base/random.h"
#include "heed/model/linear.h"
#include "support/cases.h"
#include "support/gguf_writer.h"
#include "support/naive.h"

using namespace heed;
using namespace heed::model;

namespace {

struct Matrix {
  Index rows, columns;
  std::vector<float> values;

  Matrix(Index r, Index c, std::uint64_t seed) : rows(r), columns(c) {
    Random random(seed);
    for (Index i = 0; i < r * c; ++i) values.push_back(static_cast<float>(random.normal()));
  }
  GgufTensor tensor() const { return {"w", WeightFormat::f32, {rows, columns}, std::as_bytes(std::span(values))}; }
  double at(Index r, Index c, DType arithmetic) const {
    const double x = values[static_cast<size_t>(r * columns + c)];
    return arithmetic == DType::bf16 ? test::nearest_bf16(x) : x;
  }
};

constexpr float untouched = -12345;

// Largest |y - reference|, and whether anything beside the rows' padding was written.
double worst(const Matrix& w, const Matrix& x, DType arithmetic, const std::vector<float>& y, Index ldy) {
  double most = 0;
  for (Index r = 0; r < x.rows; ++r)
    for (Index o = 0; o < w.rows; ++o) {
      double sum = 0;
      for (Index i = 0; i < w.columns; ++i) sum += x.at(r, i, arithmetic) * w.at(o, i, arithmetic);
      const double e = std::abs(sum - static_cast<double>(y[static_cast<size_t>(r * ldy + o)]));
      most = std::isnan(e) ? std::numeric_limits<double>::infinity() : std::max(most, e);
    }
  for (Index r = 0; r < x.rows; ++r)
    for (Index o = round_up(w.rows, Index{16}); o < ldy; ++o) CHECK(y[static_cast<size_t>(r * ldy + o)] == untouched);
  return most;
}

}  // namespace

TEST_CASE("a linear layer is x W^T") {
  for (const std::string& isa : available_isas()) {
    const test::UseIsa use(isa);
    REQUIRE(std::string(kernels().name) == isa);
    for (DType arithmetic : {DType::f32, DType::bf16})
      for (Index outputs : {1, 63, 64, 145})
        for (Index inputs : {1, 31, 32, 130})
          for (Index rows : {1, 2, 133}) {
            const Matrix w(outputs, inputs, 1), x(rows, inputs, 2);
            const Linear linear(w.tensor(), arithmetic);
            CHECK(linear.bytes() >= Linear::packed_bytes(outputs, inputs, arithmetic));
            CHECK(linear.bytes() < Linear::packed_bytes(outputs, inputs, arithmetic) + 64);
            Activations a;
            a.assign(x.values.data(), rows, inputs, arithmetic);
            const Index ldy = round_up(outputs, Index{16}) + 16;
            std::vector<float> y(static_cast<size_t>(rows * ldy), untouched);
            linear.apply(a, y.data(), ldy);
            CHECK_MESSAGE(worst(w, x, arithmetic, y, ldy) < 2e-5 * std::sqrt(static_cast<double>(inputs)) + 1e-6, isa,
                          " ", name_of(arithmetic), " ", rows, "x", inputs, " -> ", outputs);
          }
  }
}

TEST_CASE("several layers at once, threads and single panels give the same bits") {
  const Index inputs = 80, rows = 300;
  const Matrix w1(576, inputs, 1), w2(70, inputs, 2), x(rows, inputs, 3);
  for (DType arithmetic : {DType::f32, DType::bf16}) {
    const Linear a(w1.tensor(), arithmetic), b(w2.tensor(), arithmetic);
    Activations in;
    in.assign(x.values.data(), rows, inputs, arithmetic);
    std::vector<float> first, last;
    for (int threads : {1, 2, 5}) {
      const test::UseThreads use(threads);
      std::vector<float> ya(static_cast<size_t>(rows * 576)), yb(static_cast<size_t>(rows * 80));
      const Linear::Job jobs[] = {{&a, ya.data(), 576}, {&b, yb.data(), 80}};
      Linear::apply_all(in, jobs);
      ya.insert(ya.end(), yb.begin(), yb.end());
      if (threads == 1) first = ya;
      CHECK(test::same_bits(first, ya));
    }
    std::vector<float> panel(64 * 3);
    a.apply_panels(in, 298, 2, 8, 1, panel.data(), 64);
    last.assign(first.begin() + 298 * 576 + 512, first.begin() + 298 * 576 + 576);
    CHECK(test::same_bits(last, {panel.begin(), panel.begin() + 64}));
    a.apply_panels(in, 7, 1, 0, 2, panel.data(), 128);
    last.assign(first.begin() + 7 * 576, first.begin() + 7 * 576 + 128);
    CHECK(test::same_bits(last, {panel.begin(), panel.begin() + 128}));
  }
}

TEST_CASE("rows of activations may have a stride, and are checked") {
  const Matrix w(20, 24, 1), x(5, 24, 2);
  std::vector<float> wide(5 * 40, std::numeric_limits<float>::quiet_NaN());
  for (Index r = 0; r < 5; ++r) std::copy_n(x.values.begin() + r * 24, 24, wide.begin() + r * 40);
  for (DType arithmetic : {DType::f32, DType::bf16}) {
    const Linear linear(w.tensor(), arithmetic);
    Activations a;
    a.assign(wide.data(), 5, 24, arithmetic, 40);
    std::vector<float> y(5 * 32, untouched);
    linear.apply(a, y.data(), 32);
    CHECK(worst(w, x, arithmetic, y, 32) < 2e-4);
    a.assign(wide.data(), 5, 23, arithmetic, 40);
    CHECK_THROWS_WITH_AS(linear.apply(a, y.data(), 32), "activations: columns = 23, expected the layer's 24 inputs",
                         Error);
  }
}

TEST_CASE("one row is multiplied in every format of the file") {
  for (const std::string& isa : available_isas()) {
    const test::UseIsa use(isa);
    for (const WeightFormat format : {WeightFormat::f32, WeightFormat::f16, WeightFormat::bf16, WeightFormat::q4_0,
                                      WeightFormat::q4_1, WeightFormat::q5_0, WeightFormat::q5_1, WeightFormat::q8_0,
                                      WeightFormat::q4_k, WeightFormat::q5_k, WeightFormat::q6_k}) {
      const Index block = block_layout(format).elements;
      for (const Index outputs : {1, 33, 100}) {
        const Index inputs = block == 1 ? 37 : 3 * block;
        const Matrix w(outputs, inputs, 3), x(1, inputs, 4);
        const test::Encoded encoded = test::encode(format, std::vector<double>(w.values.begin(), w.values.end()));
        // At an odd address, as a tensor of a file may stand.
        std::vector<std::byte> shifted(1);
        shifted.insert(shifted.end(), encoded.bytes.begin(), encoded.bytes.end());
        const GgufTensor tensor{"w", format, {outputs, inputs}, std::span<const std::byte>(shifted).subspan(1)};
        const Linear exact(tensor, DType::f32, true), rounded(tensor, DType::bf16, true);
        std::vector<float> y(static_cast<size_t>(outputs), std::numeric_limits<float>::quiet_NaN());
        for (const int threads : {1, 2, -1}) {
          const test::UseThreads used(std::abs(threads));
          const Linear& linear = threads < 0 ? rounded : exact;
          const Linear::Job job{&linear, y.data(), outputs};
          Linear::apply_row(x.values.data(), {&job, 1});
          for (Index o = 0; o < outputs; ++o) {
            // With bf16 arithmetic formats of blocks meet inputs that are off by half of their 32's largest magnitude /
            // 32767 at most.
            double sum = 0, size = 0, rounding = 0;
            for (Index i = 0; i < inputs; ++i) {
              const double weight = encoded.values[static_cast<size_t>(o * inputs + i)];
              const double term = weight * static_cast<double>(x.values[static_cast<size_t>(i)]);
              sum += term, size += std::abs(term);
              if (block == 1 || &linear == &exact) continue;
              double most = 0;
              for (Index j = i / 32 * 32; j < i / 32 * 32 + 32; ++j)
                most = std::max(most, std::abs(static_cast<double>(x.values[static_cast<size_t>(j)])));
              rounding += std::abs(weight) * most / 32767 / 2;
            }
            const double error = std::abs(sum - static_cast<double>(y[static_cast<size_t>(o)]));
            CHECK_MESSAGE(error <= 3e-6 * size + rounding, isa, " ", name_of(format), " row ", o);
          }
        }
      }
    }
  }
}

TEST_CASE("a row is rounded to whole multiples of its largest magnitudes") {
  for (const std::string& isa : available_isas()) {
    const test::UseIsa use(isa);
    std::vector<float> values(96);
    Random random(5);
    for (size_t i = 0; i < 64; ++i) values[i] = static_cast<float>(random.normal()) * (i < 32 ? 1.0f : 1e-20f);
    std::vector<std::int16_t> x(96);  // the last 32 stay zero
    std::vector<float> scale(6);
    kernels().round_row(values.data(), 96, x.data(), scale.data());
    for (size_t g = 0; g < 3; ++g) {
      double sum = 0, most = 0;
      for (size_t i = g * 32; i < g * 32 + 32; ++i) most = std::max(most, std::abs(static_cast<double>(values[i])));
      for (size_t i = g * 32; i < g * 32 + 32; ++i) {
        const double rounded = static_cast<double>(scale[2 * g]) * x[i];
        CHECK(std::abs(rounded - static_cast<double>(values[i])) <= 0.5001 * most / 32767);
        sum += rounded;
      }
      CHECK(std::abs(static_cast<double>(scale[2 * g + 1]) - sum) <= 1e-6 * 32 * most);
    }
    CHECK(x[95] == 0);
    CHECK(scale[4] == 0);
  }
}

TEST_CASE("a layer that kept no file refuses to read its rows from one") {
  const Matrix w(4, 8, 1);
  const Linear linear(w.tensor(), DType::f32);
  float x[8] = {}, y[4];
  const Linear::Job job{&linear, y, 4};
  CHECK_FAILS(Linear::apply_row(x, {&job, 1}), Error,
              "linear: no file to read its rows from, expected a layer that kept it");
}
