// Weight formats: every block layout against blocks built bit by bit, and against bytes worked out by hand.
#include <doctest/doctest.h>

#include <cmath>
#include <cstring>

#include "heed/base/error.h"
#include "heed/base/random.h"
#include "support/gguf_writer.h"

using heed::Index;
using heed::WeightFormat;
using heed::test::Encoded;

namespace {

struct Known {
  WeightFormat format;
  std::uint32_t number;
  const char* name;
  Index elements, bytes;
  double steps;                // quantisation steps from the least to the greatest value of a group; 0: floats
  std::vector<size_t> halves;  // where in a block its f16 scales stand
};

const Known known[] = {
    {WeightFormat::f32, 0, "F32", 1, 4, 0, {}},
    {WeightFormat::f16, 1, "F16", 1, 2, 0, {}},
    {WeightFormat::q4_0, 2, "Q4_0", 32, 18, 15, {0}},
    {WeightFormat::q4_1, 3, "Q4_1", 32, 20, 15, {0, 2}},
    {WeightFormat::q5_0, 6, "Q5_0", 32, 22, 31, {0}},
    {WeightFormat::q5_1, 7, "Q5_1", 32, 24, 31, {0, 2}},
    {WeightFormat::q8_0, 8, "Q8_0", 32, 34, 254, {0}},
    {WeightFormat::q4_k, 12, "Q4_K", 256, 144, 15, {0, 2}},
    {WeightFormat::q5_k, 13, "Q5_K", 256, 176, 31, {0, 2}},
    {WeightFormat::q6_k, 14, "Q6_K", 256, 210, 63, {208}},
    {WeightFormat::bf16, 30, "BF16", 1, 2, 0, {}},
};

// Widened from an odd address, into memory that starts as NaN.
std::vector<float> widen(WeightFormat format, const std::vector<std::byte>& bytes, size_t count) {
  std::vector<std::byte> shifted(bytes.size() + 1);
  std::memcpy(shifted.data() + 1, bytes.data(), bytes.size());
  std::vector<float> out(count + 1, NAN);
  heed::dequantize(format, shifted.data() + 1, static_cast<Index>(count), out.data());
  CHECK(std::isnan(out.back()));  // nothing behind the last element
  out.pop_back();
  return out;
}

// Exact: every format's value needs one rounding at most.
size_t differences(const std::vector<float>& got, const std::vector<double>& want) {
  REQUIRE(got.size() == want.size());
  size_t wrong = 0;
  for (size_t i = 0; i < got.size(); ++i)
    wrong += got[i] == static_cast<float>(want[i]) || (std::isnan(got[i]) && std::isnan(want[i])) ? 0 : 1;
  return wrong;
}

std::vector<std::byte> bytes_of(std::initializer_list<int> list) {
  std::vector<std::byte> bytes;
  for (const int b : list) bytes.push_back(static_cast<std::byte>(b));
  return bytes;
}

}  // namespace

TEST_CASE("formats have the numbers, names and blocks of the file format") {
  for (const Known& k : known) {
    CAPTURE(k.name);
    WeightFormat found{};
    CHECK(heed::weight_format(k.number, found));
    CHECK(found == k.format);
    CHECK(static_cast<std::uint32_t>(k.format) == k.number);
    CHECK(heed::name_of(k.format) == k.name);
    CHECK(heed::block_layout(k.format).elements == k.elements);
    CHECK(heed::block_layout(k.format).bytes == k.bytes);
  }
  WeightFormat untouched = WeightFormat::q8_0;
  for (const std::uint32_t other : {4u, 5u, 9u, 10u, 11u, 15u, 16u, 29u, 31u, 0xffffffffu})
    CHECK_FALSE(heed::weight_format(other, untouched));
  CHECK(untouched == WeightFormat::q8_0);
  CHECK(heed::supported_weight_formats() == "F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K, Q6_K");
}

TEST_CASE("encoded values come back exactly, and near what was encoded") {
  heed::Random random(7);
  for (const Known& k : known)
    for (const double amplitude : {0.02, 1.0, 50.0}) {
      CAPTURE(k.name);
      CAPTURE(amplitude);
      std::vector<double> x(static_cast<size_t>(3 * k.elements * (k.elements == 1 ? 261 : 1)));
      double largest = 0;
      for (double& value : x) {
        value = amplitude * random.normal();
        largest = std::max(largest, std::fabs(value));
      }
      const Encoded e = heed::test::encode(k.format, x);
      REQUIRE(static_cast<Index>(e.bytes.size()) == static_cast<Index>(x.size()) / k.elements * k.bytes);
      CHECK(differences(widen(k.format, e.bytes, x.size()), e.values) == 0);
      CHECK(differences(widen(k.format, e.bytes, x.size()), heed::test::decode(k.format, e.bytes)) == 0);
      // Two steps of the widest group there can be; floats have at least 8 bits.
      const double most = k.steps == 0 ? largest / 256 : 2 * 2 * largest / k.steps;
      for (size_t i = 0; i < x.size(); ++i) REQUIRE(std::fabs(e.values[i] - x[i]) <= most);
    }
}

TEST_CASE("any bits decode as the format describes") {
  heed::Random random(11);
  for (const Known& k : known) {
    if (k.elements == 1) continue;
    CAPTURE(k.name);
    std::vector<std::byte> bytes(static_cast<size_t>(40 * k.bytes));
    for (std::byte& b : bytes) b = static_cast<std::byte>(random.next());
    // Scales between 2^-8 and 2^8 with any sign, so that f64 holds every value exactly.
    for (size_t start = 0; start < bytes.size(); start += static_cast<size_t>(k.bytes))
      for (const size_t at : k.halves) {
        const double scale = std::ldexp(1 + random.uniform(), static_cast<int>(random.below(16)) - 8);
        const std::string field = heed::test::le(heed::test::f16_bits(random.below(2) == 0 ? scale : -scale));
        std::memcpy(&bytes[start + at], field.data(), 2);
      }
    const size_t count = static_cast<size_t>(40 * k.elements);
    CHECK(differences(widen(k.format, bytes, count), heed::test::decode(k.format, bytes)) == 0);
  }
}

TEST_CASE("every f16 and bf16 widens exactly") {
  std::vector<std::byte> all;
  for (int i = 0; i < 0x10000; ++i) {
    all.push_back(static_cast<std::byte>(i));
    all.push_back(static_cast<std::byte>(i >> 8));
  }
  const std::vector<float> half = widen(WeightFormat::f16, all, 0x10000);
  const std::vector<float> brain = widen(WeightFormat::bf16, all, 0x10000);
  CHECK(differences(half, heed::test::decode(WeightFormat::f16, all)) == 0);
  CHECK(differences(brain, heed::test::decode(WeightFormat::bf16, all)) == 0);
  CHECK(half[0x0001] == 0x1p-24f);
  CHECK(half[0x03ff] == 1023 * 0x1p-24f);
  CHECK(half[0x0400] == 0x1p-14f);
  CHECK(half[0x7bff] == 65504.0f);
  CHECK(half[0xfc00] == -INFINITY);
  CHECK(std::signbit(half[0x8000]));
  CHECK(brain[0x3fc0] == 1.5f);
}

TEST_CASE("blocks worked out by hand") {
  SUBCASE("Q4_0: 2 (q - 8)") {  // d = 2, first byte holds 1 (element 0) and 15 (element 16), the rest 8
    auto b = bytes_of({0x00, 0x40, 0xf1});
    b.resize(18, std::byte{0x88});
    const auto x = widen(WeightFormat::q4_0, b, 32);
    CHECK(x[0] == -14);
    CHECK(x[16] == 14);
    CHECK(x[1] == 0);
  }
  SUBCASE("Q5_1: 0.5 q + 1") {  // d = 0.5, m = 1; fifth bits of elements 0 and 31
    auto b = bytes_of({0x00, 0x38, 0x00, 0x3c, 0x01, 0x00, 0x00, 0x80});
    b.resize(24, std::byte{0x32});
    const auto x = widen(WeightFormat::q5_1, b, 32);
    CHECK(x[0] == 10);    // 0.5 (2 + 16) + 1
    CHECK(x[1] == 2);     // 0.5 · 2 + 1
    CHECK(x[30] == 2.5);  // 0.5 · 3 + 1
    CHECK(x[31] == 10.5);
  }
  SUBCASE("Q8_0: 0.25 q") {
    auto b = bytes_of({0x00, 0x34, 0x80, 0x7f});
    b.resize(34, std::byte{0xff});
    const auto x = widen(WeightFormat::q8_0, b, 32);
    CHECK(x[0] == -32);
    CHECK(x[1] == 31.75);
    CHECK(x[31] == -0.25);
  }
  SUBCASE("Q4_K: scales and minima of six bits in twelve bytes") {
    // d = 1, dmin = 2. Group 0: scale 63, minimum 1. Group 4: scale 2 + 16·3 = 50, minimum 3 + 16·1 = 19.
    auto b = bytes_of({0x00, 0x3c, 0x00, 0x40, 0xff, 0, 0, 0, 0x41, 0, 0, 0, 0x32, 0, 0, 0});
    b.resize(144, std::byte{0x21});  // even groups q = 1, odd groups q = 2
    const auto x = widen(WeightFormat::q4_k, b, 256);
    CHECK(x[0] == 63 - 2);
    CHECK(x[32] == 0);  // group 1 has no scale
    CHECK(x[128] == 50 - 38);
    CHECK(x[255] == 0);
  }
  SUBCASE("Q5_K: a fifth bit per group and element") {
    auto b = bytes_of({0x00, 0x3c, 0x00, 0x00, 1, 1, 1, 1, 0, 0, 0, 0, 1, 1, 1, 1});
    b.resize(48, std::byte{0});
    b[16] = std::byte{0x82};  // element 0 of groups 1 and 7
    b.resize(176, std::byte{0x43});
    const auto x = widen(WeightFormat::q5_k, b, 256);
    CHECK(x[0] == 3);
    CHECK(x[32] == 20);
    CHECK(x[33] == 4);
    CHECK(x[224] == 20);
  }
  SUBCASE("Q6_K: four runs of 32 in each half, a signed scale for 16") {
    std::vector<std::byte> b(210);
    b[0] = std::byte{0xa5};        // run 0 element 0: low 5; run 2: low 10
    b[64 + 32] = std::byte{0x0f};  // second half, run 1 element 0: low 15
    b[128] = std::byte{0x31};      // first half: run 0 gets 1, run 2 gets 3
    b[192] = std::byte{1};         // scale of elements 0 … 15
    b[196] = std::byte{0xfe};      // of elements 64 … 79: -2
    b[202] = std::byte{4};         // of elements 160 … 175
    b[209] = std::byte{0x3c};      // d = 1
    const auto x = widen(WeightFormat::q6_k, b, 256);
    CHECK(x[0] == 5 + 16 - 32);
    CHECK(x[64] == -2 * (10 + 48 - 32));
    CHECK(x[160] == 4 * (15 - 32));
    CHECK(x[1] == -32);
    CHECK(x[16] == 0);
  }
}

TEST_CASE("part of a block is refused") {
  float out[256];
  const std::byte block[256]{};
  CHECK_THROWS_WITH_AS(heed::dequantize(WeightFormat::q4_k, block, 32, out),
                       "32 elements of Q4_K, expected a multiple of 256", heed::Error);
  heed::dequantize(WeightFormat::q4_k, block, 0, out);
}
