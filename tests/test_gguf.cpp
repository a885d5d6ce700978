// GGUF files: the two real models, small ones made here, and files that lie.
#include <doctest/doctest.h>
#include <fmt/format.h>

#include <cmath>
#include <ctime>
#include <map>

#include "heed/base/error.h"
#include "heed/base/file.h"
#include "heed/model/gguf.h"
#include "support/cache.h"
#include "support/gguf_writer.h"

using heed::Error;
using heed::Index;
using heed::WeightFormat;
using heed::model::Gguf;
using heed::test::counted;
using heed::test::GgufWriter;
using heed::test::le;

namespace {

std::span<const std::byte> bytes_of(const std::string& file) {
  return {reinterpret_cast<const std::byte*>(file.data()), file.size()};
}

// What parsing these bytes says; "" when it succeeds.
std::string complaint(const std::string& file) {
  try {
    Gguf::parse(bytes_of(file), "x.gguf");
  } catch (const Error& e) {
    return e.what();
  }
  return "";
}
std::string complaint(const GgufWriter& w) { return complaint(w.file()); }

std::map<std::string, int> formats(const Gguf& file) {
  std::map<std::string, int> count;
  for (const auto& t : file.tensors()) ++count[std::string(heed::name_of(t.format))];
  return count;
}

std::vector<double> ramp(size_t n) {
  std::vector<double> x(n);
  for (size_t i = 0; i < n; ++i) x[i] = std::sin(static_cast<double>(i));
  return x;
}

GgufWriter small() {
  GgufWriter w;
  w.text("general.architecture", "llama").u32("llama.block_count", 2).f32("llama.rope.freq_base", 1e5f);
  w.texts("tokenizer.ggml.tokens", {"a", "", "longer than a short string buffer"}).f32s("scores", {1, -2.5f});
  w.i32s("types", {3, -1}).boolean("flag", true).i32("negative", -7).u64("big", ~std::uint64_t{0});
  w.tensor("a", {3, 64}, WeightFormat::q4_0, ramp(192));
  w.tensor("b", {5}, WeightFormat::f32, ramp(5));
  w.tensor("c", {2, 2, 256}, WeightFormat::q6_k, ramp(1024));
  return w;
}

}  // namespace

TEST_CASE("SmolLM2's file") {
  const Gguf file = Gguf::open(heed::test::cached("smollm2-135m-instruct-q4_1.gguf"));
  CHECK(file.version() == 3);
  CHECK(file.text("general.architecture") == "llama");
  CHECK(file.integer("llama.block_count") == 30);
  CHECK(file.number("llama.rope.freq_base") == 1e5);
  CHECK(file.texts("tokenizer.ggml.tokens").size() == 49152);
  CHECK(file.texts("tokenizer.ggml.tokens")[1] == "<|im_start|>");
  CHECK(file.texts("tokenizer.ggml.merges").size() == 48900);
  CHECK(formats(file) == std::map<std::string, int>{{"Q4_1", 210}, {"Q8_0", 1}, {"F32", 61}});
  CHECK(file.tensor("blk.29.ffn_down.weight", {576, 1536}).rows() == 576);
  CHECK(file.find("output.weight") == nullptr);
}

TEST_CASE("Gemma 3's file, its 262,144 tokens read quickly") {
  const std::string path = heed::test::cached("gemma-3-270m-q4_k_m.gguf");
  const std::clock_t start = std::clock();
  const Gguf file = Gguf::open(path);
  CHECK(static_cast<double>(std::clock() - start) / CLOCKS_PER_SEC < 0.3);  // of one core
  CHECK(file.text("general.architecture") == "gemma3");
  CHECK(file.texts("tokenizer.ggml.tokens").size() == 262144);
  CHECK(file.texts("tokenizer.ggml.tokens")[238] == "<0x00>");
  CHECK(file.numbers("tokenizer.ggml.scores").size() == 262144);
  CHECK(file.integers("tokenizer.ggml.token_type").size() == 262144);
  CHECK(formats(file) ==
        std::map<std::string, int>{{"Q5_0", 81}, {"Q8_0", 10}, {"Q4_K", 27}, {"Q6_K", 9}, {"F32", 109}});
  const auto& embedding = file.tensor("token_embd.weight", {262144, 640});
  CHECK(heed::name_of(embedding.format) == "Q8_0");
  CHECK(embedding.row_bytes() == 680);
}

TEST_CASE("a real file cut anywhere is an error that names it") {
  const auto mapped = heed::MappedFile::open(heed::test::cached("smollm2-135m-instruct-q4_1.gguf"));
  const std::span<const std::byte> all = mapped.bytes();
  const Gguf whole = Gguf::parse(all, "whole");
  size_t header = all.size(), cuts = 0;
  for (const auto& t : whole.tensors()) header = std::min(header, static_cast<size_t>(t.bytes.data() - all.data()));
  for (size_t length = 0; length < all.size(); length += length < header + 65536 ? 4096 : 4 << 20, ++cuts) {
    CAPTURE(length);
    CHECK_THROWS_WITH_AS(Gguf::parse(all.first(length), "cut.gguf"), doctest::Contains("cut.gguf: "), Error);
  }
  CHECK(cuts > 300);
}

TEST_CASE("metadata and tensors of a small file, versions 2 and 3") {
  for (const std::uint32_t version : {2u, 3u}) {
    GgufWriter w = small();
    std::string bytes = w.file();
    bytes[4] = static_cast<char>(version);
    const Gguf file = Gguf::parse(bytes_of(bytes), "x.gguf");
    CHECK(file.version() == static_cast<int>(version));
    CHECK(file.file_bytes() == static_cast<Index>(bytes.size()));
    CHECK(file.text("general.architecture") == "llama");
    CHECK(file.integer("llama.block_count") == 2);
    CHECK(file.number("llama.block_count") == 2);
    CHECK(file.number("llama.rope.freq_base") == 1e5);
    CHECK(file.texts("tokenizer.ggml.tokens")[2] == "longer than a short string buffer");
    CHECK(file.numbers("scores") == std::vector<double>{1, -2.5});
    CHECK(file.integers("types") == std::vector<std::int64_t>{3, -1});
    CHECK(file.boolean_or("flag", false));
    CHECK(file.integer("negative") == -7);
    CHECK(file.integer_or("absent", 5) == 5);
    CHECK(file.number_or("absent", 0.5) == 0.5);
    CHECK(file.boolean_or("absent", true));
    CHECK(file.text_or("absent", "x") == "x");
    CHECK(file.tensors().size() == 3);
    CHECK(file.tensor("c", {2, 2, 256}).rows() == 4);
    CHECK(file.tensor("c", {2, 2, 256}).row_bytes() == 210);
    CHECK(file.tensor("b", {5}).rows() == 1);
  }
}

TEST_CASE("rows hold what was encoded, under any alignment") {
  for (const std::uint32_t alignment : {1u, 8u, 32u, 256u}) {
    CAPTURE(alignment);
    GgufWriter w;
    w.align(alignment);
    std::map<std::string, std::vector<double>> want;
    for (const auto f : {WeightFormat::f32, WeightFormat::f16, WeightFormat::bf16, WeightFormat::q4_0,
                         WeightFormat::q4_1, WeightFormat::q5_0, WeightFormat::q5_1, WeightFormat::q8_0,
                         WeightFormat::q4_k, WeightFormat::q5_k, WeightFormat::q6_k})
      want[std::string(heed::name_of(f))] = w.tensor(heed::name_of(f), {3, 256}, f, ramp(768));
    const std::string bytes = w.file();
    const Gguf file = Gguf::parse(bytes_of(bytes), "x.gguf");
    for (const auto& [name, values] : want) {
      CAPTURE(name);
      for (Index r = 0; r < 3; ++r) {
        std::vector<float> row(256, NAN);
        file.tensor(name, {3, 256}).read_row(r, row.data());
        for (size_t i = 0; i < 256; ++i)
          REQUIRE(row[i] == static_cast<float>(values[static_cast<size_t>(r) * 256 + i]));
      }
    }
  }
}

TEST_CASE("typed reads say what is wrong") {
  const std::string bytes = small().file();
  const Gguf file = Gguf::parse(bytes_of(bytes), "x.gguf");
  CHECK_THROWS_WITH_AS(file.integer("absent"), "x.gguf: absent is missing", Error);
  CHECK_THROWS_WITH_AS(file.integer("general.architecture"),
                       "x.gguf: general.architecture is text, expected an integer", Error);
  CHECK_THROWS_WITH_AS(file.integer_or("flag", 1), "x.gguf: flag is a boolean, expected an integer", Error);
  CHECK_THROWS_WITH_AS(file.integer("big"), "x.gguf: big = 18446744073709551615, expected less than 2^63", Error);
  CHECK_THROWS_WITH_AS(file.number_or("flag", 1), "x.gguf: flag is a boolean, expected a number", Error);
  CHECK_THROWS_WITH_AS(file.boolean_or("negative", true), "x.gguf: negative is an integer, expected a boolean", Error);
  CHECK_THROWS_WITH_AS(file.text("scores"), "x.gguf: scores is an array of numbers, expected text", Error);
  CHECK_THROWS_WITH_AS(file.texts("types"), "x.gguf: types is an array of integers, expected an array of text", Error);
  CHECK_THROWS_WITH_AS(file.tensor("absent", {2, 3}), "x.gguf: tensor absent is missing, expected shape [2, 3]", Error);
  CHECK_THROWS_WITH_AS(file.tensor("a", {64, 3}), "x.gguf: tensor a: shape = [3, 64], expected [64, 3]", Error);
}

TEST_CASE("a small file cut at any byte is an error") {
  const std::string bytes = small().file();
  REQUIRE(complaint(bytes) == "");
  for (size_t length = 0; length < bytes.size(); ++length) {
    CAPTURE(length);
    CHECK(complaint(bytes.substr(0, length)).starts_with("x.gguf: "));
  }
}

TEST_CASE("not a file, not a GGUF file, not a version that is read") {
  CHECK_THROWS_WITH_AS(Gguf::open("/nowhere/x.gguf"), "/nowhere/x.gguf: cannot be read: No such file or directory",
                       Error);
  CHECK_THROWS_WITH_AS(Gguf::open("/"), "/: not a regular file", Error);
  CHECK(complaint("") == "x.gguf: not a GGUF file");
  CHECK(complaint("PK\x03\x04 and more") == "x.gguf: not a GGUF file");
  CHECK(complaint(GgufWriter(1)) == "x.gguf: GGUF version 1, expected 2 or 3 (little endian)");
  CHECK(complaint(GgufWriter(3u << 24)) == "x.gguf: GGUF version 50331648, expected 2 or 3 (little endian)");
  CHECK(complaint(GgufWriter()) == "");
}

TEST_CASE("counts and lengths that lie are refused before anything is allocated for them") {
  constexpr std::uint64_t huge = std::uint64_t{1} << 63;
  CHECK(complaint(GgufWriter().claim_tensors(huge)) ==
        "x.gguf: header: 9223372036854775808 tensors at byte 8, expected at most the 0 that fit into the file");
  CHECK(complaint(GgufWriter().u32("a", 1).claim_keys(1000)) ==
        "x.gguf: header: 1000 metadata keys at byte 16, expected at most the 1 that fit into the file");
  CHECK(complaint(GgufWriter().raw("a", 8, le(huge))) ==
        "x.gguf: a: 9223372036854775808 bytes at byte 45, expected at most the 0 that the file has left");
  CHECK(complaint(GgufWriter().raw("a", 9, le(8u) + le(huge) + counted("b"))) ==
        "x.gguf: a: 9223372036854775808 elements at byte 41, expected at most the 1 that fit into the file");
  CHECK(complaint(GgufWriter().raw("a", 9, le(12u) + le(huge / 4) + "12345678")) ==
        "x.gguf: a: 2305843009213693952 elements at byte 41, expected at most the 1 that fit into the file");
  CHECK(complaint("GGUF" + le(3u) + le(std::uint64_t{0}) + le(std::uint64_t{1}) + le(~std::uint64_t{0}) + "abcdefgh") ==
        "x.gguf: metadata key 0: 18446744073709551615 bytes at byte 32, expected at most the 8 that the file has left");
}

TEST_CASE("metadata that makes no sense is refused") {
  CHECK(complaint(GgufWriter().u32("a", 1).u32("a", 2)) == "x.gguf: a: duplicate metadata key");
  CHECK(complaint(GgufWriter().u32("", 1)) == "x.gguf: metadata key 0: empty name");
  CHECK(complaint(GgufWriter().raw("a", 13, "xxxx")) == "x.gguf: a: value type 13, expected 0 … 12");
  CHECK(complaint(GgufWriter().raw("a", 9, le(99u) + le(std::uint64_t{0}))) ==
        "x.gguf: a: value type 99, expected 0 … 12");
  CHECK(complaint(GgufWriter().raw("a", 7, "\x02")) == "x.gguf: a: boolean = 2, expected 0 or 1");
  CHECK(complaint(GgufWriter().raw("a", 9, le(9u) + le(std::uint64_t{1}) + le(9u) + le(std::uint64_t{1}))) ==
        "x.gguf: a: array of arrays, expected an array of numbers, booleans or text");
  CHECK(complaint(GgufWriter().raw("a", 9, le(10u) + le(std::uint64_t{1}) + le(~std::uint64_t{0}))) ==
        "x.gguf: a: element = 18446744073709551615, expected less than 2^63");
  CHECK(complaint(GgufWriter().u32("two\nlines\\", 1).u32("two\nlines\\", 1)) ==
        "x.gguf: two\\x0alines\\x5c: duplicate metadata key");
  for (const std::uint32_t alignment : {0u, 3u, 48u, 0x80000000u})
    CHECK(complaint(GgufWriter().align(alignment)) ==
          fmt::format("x.gguf: general.alignment: {}, expected a power of two up to 2^30", alignment));
  CHECK(complaint(GgufWriter().text("general.alignment", "32")) ==
        "x.gguf: general.alignment: text, expected an unsigned integer");
}

TEST_CASE("tensors that make no sense are refused") {
  const std::string data(4096, 'x');
  const auto one = [&](const std::vector<std::uint64_t>& extents, std::uint32_t type, std::uint64_t offset = 0) {
    GgufWriter w;
    w.data(data.data(), data.size());
    return complaint(w.raw_tensor("t", extents, type, offset));
  };
  constexpr std::uint64_t big = std::uint64_t{1} << 32;
  CHECK(one({1024}, 0) == "");
  CHECK(one({}, 0) == "x.gguf: tensor t: 0 dimensions, expected 1 … 4");
  CHECK(one({1, 1, 1, 1, 1}, 0) == "x.gguf: tensor t: 5 dimensions, expected 1 … 4");
  CHECK(one({4, 0}, 0) == "x.gguf: tensor t: extent 0, expected >= 1");
  CHECK(one({~std::uint64_t{0}}, 0) ==
        "x.gguf: tensor t: extent 18446744073709551615 after 1 elements, expected at most 2^60 in all");
  CHECK(one({big, big, 2}, 0) ==
        "x.gguf: tensor t: extent 4294967296 after 4294967296 elements, expected at most 2^60 in all");
  CHECK(one({32}, 10) == "x.gguf: tensor t: tensor type 10, expected one of F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, "
                         "Q8_0, Q4_K, Q5_K, Q6_K");
  CHECK(one({128, 2}, 12) == "x.gguf: tensor t: rows of 128 elements of Q4_K, expected a multiple of 256");
  CHECK(one({1025}, 0) ==
        "x.gguf: tensor t: 4100 bytes at offset 0, expected to lie within the 4096 bytes of tensor data");
  CHECK(one({8}, 0, 4096) ==
        "x.gguf: tensor t: 32 bytes at offset 4096, expected to lie within the 4096 bytes of tensor data");
  CHECK(one({8}, 0, ~std::uint64_t{31}) == "x.gguf: tensor t: 32 bytes at offset 18446744073709551584, expected to lie "
                                           "within the 4096 bytes of tensor data");
  CHECK(one({8}, 0, 16) == "x.gguf: tensor t: offset 16, expected a multiple of 32");

  GgufWriter twice, overlap;
  twice.data(data.data(), data.size());
  overlap.data(data.data(), data.size());
  CHECK(complaint(twice.raw_tensor("t", {8}, 0, 0).raw_tensor("t", {8}, 0, 32)) ==
        "x.gguf: tensor t: duplicate tensor name");
  CHECK(complaint(overlap.raw_tensor("t", {8}, 0, 32).raw_tensor("u", {9}, 0, 0)) ==
        "x.gguf: tensor t: overlaps tensor u");
  CHECK(complaint(GgufWriter().raw_tensor("", {8}, 0, 0)) == "x.gguf: tensor 0: empty name");
}
