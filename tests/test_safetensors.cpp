// safetensors files: what is written comes back, what others write is read, what lies is refused.
#include <doctest/doctest.h>

#include <cstring>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "heed/base/error.h"
#include "heed/base/file.h"
#include "heed/model/safetensors.h"
#include "support/folder.h"
#include "support/gguf_writer.h"

using heed::DType;
using heed::Error;
using heed::Shape;
using heed::TensorView;
using heed::model::SafetensorsFile;
using heed::model::write_safetensors;
using heed::test::Folder;
using heed::test::le;

namespace {

std::string file_of(const std::string& header, const std::string& data = "") {
  return le(std::uint64_t{header.size()}) + header + data;
}

SafetensorsFile parse(const std::string& file) {
  return SafetensorsFile::parse({reinterpret_cast<const std::byte*>(file.data()), file.size()}, "x");
}

// What parsing says; "" when it succeeds.
std::string complaint_about(const std::string& file) {
  try {
    parse(file);
  } catch (const Error& e) {
    return e.what();
  }
  return "";
}
std::string complaint(const std::string& header, const std::string& data = std::string(16, 'd')) {
  return complaint_about(file_of(header, data));
}

template <class T>
std::vector<T> values(const TensorView& t) {
  std::vector<T> x(static_cast<size_t>(heed::elements(t.shape)));
  if (!x.empty()) std::memcpy(x.data(), t.data, x.size() * sizeof(T));
  return x;
}

}  // namespace

TEST_CASE("every dtype and shape comes back from a file") {
  const Folder folder;
  const std::vector<float> f{1, -2.5f, 3, 4, 5, 6};
  const std::vector<std::uint16_t> h{0x3c00, 0xc000, 1};
  const std::vector<std::int32_t> i{-1, 1 << 30};
  const std::vector<std::uint8_t> u{0, 1, 255};
  write_safetensors(folder / "a",
                    {{"mask", TensorView(u.data(), DType::u8, {3})},
                     {"q", TensorView(f.data(), DType::f32, {1, 2, 3})},
                     {"half \"quoted\"", TensorView(h.data(), DType::f16, {3, 1})},
                     {"brain", TensorView(h.data(), DType::bf16, {3})},
                     {"doc", TensorView(i.data(), DType::i32, {2})},
                     {"scalar", TensorView(f.data() + 1, DType::f32, {})},
                     {"empty", TensorView(nullptr, DType::f32, {0, 7})}},
                    {{"format", "heed"}, {"note", "two\nlines"}});
  const SafetensorsFile file = SafetensorsFile::open(folder / "a");
  CHECK(file.names() == std::vector<std::string>{"brain", "doc", "empty", "half \"quoted\"", "mask", "q", "scalar"});
  CHECK(file.metadata() == heed::model::SafetensorsMetadata{{"format", "heed"}, {"note", "two\nlines"}});
  CHECK(file.tensor("q").dtype == DType::f32);
  CHECK(file.tensor("q").shape == Shape{1, 2, 3});
  CHECK(file.tensor("q").stride == Shape{6, 3, 1});
  CHECK(values<float>(file.tensor("q")) == f);
  CHECK(file.tensor("half \"quoted\"").dtype == DType::f16);
  CHECK(values<std::uint16_t>(file.tensor("half \"quoted\"")) == h);
  CHECK(file.tensor("brain").dtype == DType::bf16);
  CHECK(values<std::int32_t>(file.tensor("doc")) == i);
  CHECK(values<std::uint8_t>(file.tensor("mask")) == u);
  CHECK(file.tensor("scalar").shape.empty());
  CHECK(values<float>(file.tensor("scalar")) == std::vector<float>{-2.5f});
  CHECK(file.tensor("empty").shape == Shape{0, 7});
  CHECK_FALSE(file.tensor("empty").empty());
  CHECK(file.find("k") == nullptr);
  CHECK_THROWS_WITH_AS(file.tensor("k"), (folder / "a: tensor k is missing").c_str(), Error);
}

TEST_CASE("the file is laid out as the format asks") {
  const Folder folder;
  const std::uint8_t byte = 7;
  const float number = 1;
  write_safetensors(folder / "a",
                    {{"b", TensorView(&byte, DType::u8, {1})}, {"a", TensorView(&number, DType::f32, {1})}});
  const std::string bytes = heed::read_file(folder / "a");
  std::uint64_t header = 0;
  std::memcpy(&header, bytes.data(), 8);
  CHECK(header % 8 == 0);
  CHECK(bytes.size() == 8 + header + 5);
  const auto json = nlohmann::json::parse(bytes.substr(8, header));
  const auto want = nlohmann::json::parse(R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},
                                              "b":{"dtype":"U8","shape":[1],"data_offsets":[4,5]}})");
  CHECK(json == want);
}

TEST_CASE("strided views are written in row-major order") {
  const Folder folder;
  const std::vector<float> x{0, 1, 2, 3, 4, 5};  // [2, 3], written transposed
  write_safetensors(folder / "a", {{"t", TensorView(x.data(), DType::f32, {3, 2}, {1, 3})},
                                   {"reversed", TensorView(x.data() + 5, DType::f32, {6}, {-1})},
                                   {"repeated", TensorView(x.data() + 2, DType::f32, {2, 2}, {0, 0})},
                                   {"plain", TensorView(x.data(), DType::f32, {6})}});
  const SafetensorsFile file = SafetensorsFile::open(folder / "a");
  CHECK(values<float>(file.tensor("t")) == std::vector<float>{0, 3, 1, 4, 2, 5});
  CHECK(values<float>(file.tensor("reversed")) == std::vector<float>{5, 4, 3, 2, 1, 0});
  CHECK(values<float>(file.tensor("repeated")) == std::vector<float>{2, 2, 2, 2});
  CHECK(values<float>(file.tensor("plain")) == x);

  // More than the writer's buffer holds.
  std::vector<std::uint16_t> wide(700 * 1000);
  for (size_t i = 0; i < wide.size(); ++i) wide[i] = static_cast<std::uint16_t>(i * 31);
  write_safetensors(folder / "b", {{"w", TensorView(wide.data(), DType::f16, {1000, 700}, {1, 1000})}});
  const auto got = values<std::uint16_t>(SafetensorsFile::open(folder / "b").tensor("w"));
  size_t wrong = 0;
  for (size_t i = 0; i < 1000; ++i)
    for (size_t j = 0; j < 700; ++j) wrong += got[i * 700 + j] != wide[j * 1000 + i];
  CHECK(wrong == 0);
}

TEST_CASE("a refused or failing write leaves nothing behind") {
  const Folder folder;
  const float x = 1;
  const TensorView one(&x, DType::f32, {1});
  const std::string path = folder / "a";
  CHECK_THROWS_WITH_AS(write_safetensors(path, {{"t", one}, {"t", one}}),
                       (path + ": tensor t: duplicate or reserved name").c_str(), Error);
  CHECK_THROWS_WITH_AS(write_safetensors(path, {{"__metadata__", one}}),
                       (path + ": tensor __metadata__: duplicate or reserved name").c_str(), Error);
  CHECK_THROWS_WITH_AS(write_safetensors(path, {{"\xff", one}}),
                       (path + ": a tensor name or metadata text is not UTF-8").c_str(), Error);
  CHECK_THROWS_WITH_AS(write_safetensors(folder / "no/a", {{"t", one}}),
                       (folder / "no/a: cannot be written: No such file or directory").c_str(), Error);
  CHECK(folder.names().empty());
}

TEST_CASE("tensors that stand at odd addresses are realigned, holes and overlaps inside the file are read") {
  std::string data = "?";
  for (const std::uint32_t bits : {0x3f800000u, 0x40000000u}) data += le(bits);
  for (int pad = 0; pad < 8; ++pad) {
    const std::string file = file_of(R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[1,9]},)"
                                     R"("b":{"dtype":"U8","shape":[3],"data_offsets":[6,9]}})" +
                                         std::string(pad, ' '),
                                     data);
    const SafetensorsFile parsed = parse(file);
    CHECK(reinterpret_cast<std::uintptr_t>(parsed.tensor("a").data) % 4 == 0);
    CHECK(values<float>(parsed.tensor("a")) == std::vector<float>{1, 2});
    CHECK(values<std::uint8_t>(parsed.tensor("b")) == std::vector<std::uint8_t>{0, 0, 0x40});
  }
  // Overlapping tensors at odd addresses cannot multiply the file's size in memory.
  std::string header = "{";
  for (int i = 0; i < 100; ++i)
    header += (i > 0 ? ",\"" : "\"") + std::to_string(i) + R"(":{"dtype":"F32","shape":[256],"data_offsets":[1,1025]})";
  header += "}";
  while (header.size() % 8 != 0) header += ' ';
  CHECK(complaint(header, std::string(1025, 'd')) ==
        "x: tensor 1: overlaps other tensors and is not aligned to its elements");
}

TEST_CASE("unsupported dtypes are refused by name") {
  const auto with = [](const std::string& dtype) {
    return complaint(R"({"q":{"dtype":")" + dtype + R"(","shape":[2],"data_offsets":[0,16]}})");
  };
  CHECK(with("F64") == "x: tensor q: dtype = f64, expected f32, f16 or bf16");
  CHECK(with("I64") == "x: tensor q: dtype = I64, expected F32, F16, BF16, I32 or U8");
  CHECK(with("f32") == "x: tensor q: dtype = f32, expected F32, F16, BF16, I32 or U8");
  CHECK(with("\\n") == "x: tensor q: dtype = \\x0a, expected F32, F16, BF16, I32 or U8");
}

TEST_CASE("shapes and offsets that lie are refused") {
  const auto with = [](const std::string& shape, const std::string& offsets) {
    return complaint(R"({"q":{"dtype":"F32","shape":)" + shape + R"(,"data_offsets":)" + offsets + "}}");
  };
  CHECK(with("[4]", "[0,16]") == "");
  CHECK(with("[0]", "[16,16]") == "");
  CHECK(with("[3]", "[0,16]") == "x: tensor q: data_offsets = [0, 16] hold 16 bytes, expected 12 for shape [3] of f32");
  CHECK(with("[4]", "[4,20]") == "x: tensor q: data_offsets = [4, 20], expected to ascend within the 16 bytes of data");
  CHECK(with("[4]", "[16,0]") == "x: tensor q: data_offsets = [16, 0], expected to ascend within the 16 bytes of data");
  CHECK(with("[4]", "[18446744073709551615,15]") ==
        "x: tensor q: data_offsets = [18446744073709551615, 15], expected to ascend within the 16 bytes of data");
  CHECK(with("[4]", "[0]") == "x: tensor q: 1 data_offsets, expected 2");
  CHECK(with("[4]", "[0,16,16]") == "x: tensor q: 3 data_offsets, expected 2");
  CHECK(with("[4611686018427387904,4]", "[0,16]") == "x: tensor q: shape of more than 2^62 bytes");
  CHECK(with("[4294967296,4294967297,4]", "[0,16]") == "x: tensor q: shape of more than 2^62 bytes");
  CHECK(with("[0,18446744073709551615]", "[0,0]") == "x: tensor q: shape of more than 2^62 bytes");
  CHECK(with("[-4]", "[0,16]") == "x: tensor q: shape: holds -4, expected integers 0 … 2^64 - 1");
  CHECK(with("[4.5]", "[0,16]") == "x: tensor q: shape: holds 4.5, expected integers 0 … 2^64 - 1");
  CHECK(with("[\"4\"]", "[0,16]") == "x: tensor q: shape: holds text, expected integers >= 0");
  CHECK(with("[[4]]", "[0,16]") == "x: tensor q: shape: holds an array, expected integers >= 0");
  CHECK(with("4", "[0,16]") == "x: tensor q: shape: a number, expected dtype (text), shape or data_offsets (arrays)");
}

TEST_CASE("headers that are not what they should be are refused") {
  CHECK(complaint("{}") == "");
  CHECK(complaint("{}   ") == "");
  CHECK(complaint_about("") == "x: 0 bytes, expected a safetensors file of at least 8");
  CHECK(complaint_about("1234567") == "x: 7 bytes, expected a safetensors file of at least 8");
  CHECK(complaint_about(le(~std::uint64_t{0}) + "{}") ==
        "x: header of 18446744073709551615 bytes, expected at most the 2 that the file has left");
  CHECK(complaint_about(le(std::uint64_t{0})) == "x: not a safetensors file: the header does not start with {");
  CHECK(complaint("[]") == "x: not a safetensors file: the header does not start with {");
  CHECK(complaint("{\"q\":") == "x: header is not valid JSON at byte 14");
  CHECK(complaint("{} {}").starts_with("x: header is not valid JSON at byte "));
  CHECK(complaint("{\"\xff\":1}").starts_with("x: header is not valid JSON at byte "));
  CHECK(complaint("{\"q\":1e999}").starts_with("x: header is not valid JSON at byte "));
  CHECK(complaint(R"({"q":1})") == "x: header: q: a number, expected an object");
  CHECK(complaint(R"({"q":{}})") == "x: tensor q: dtype is missing");
  CHECK(complaint(R"({"q":{"dtype":"F32"}})") == "x: tensor q: shape is missing");
  CHECK(complaint(R"({"q":{"dtype":"F32","shape":[]}})") == "x: tensor q: data_offsets is missing");
  CHECK(complaint(R"({"q":{"dtype":"F32","dtype":"F32"}})") == "x: tensor q: dtype: duplicate key");
  CHECK(complaint(R"({"q":{"shape":[1],"shape":[1]}})") == "x: tensor q: shape: duplicate key");
  CHECK(complaint(R"({"q":{"other":true}})") ==
        "x: tensor q: other: a boolean, expected dtype (text), shape or data_offsets (arrays)");
  CHECK(complaint(R"({"q":{"shape":{}}})") ==
        "x: tensor q: shape: an object, expected dtype (text), shape or data_offsets (arrays)");
  const std::string q = R"("q":{"dtype":"F32","shape":[1],"data_offsets":[0,4]})";
  CHECK(complaint("{" + q + "," + q + "}") == "x: tensor q: duplicate name");
  CHECK(complaint(R"({"__metadata__":{"a":1}})") == "x: header: a: a number, expected text");
  CHECK(complaint(R"({"__metadata__":{"a":"1","a":"2"}})") == "x: header: a: duplicate key in __metadata__");
  CHECK(complaint(R"({"__metadata__":{},"__metadata__":{}})") == "x: header: duplicate __metadata__");
  CHECK(complaint(R"({"__metadata__":null})") == "x: header: __metadata__: null, expected an object");
}

TEST_CASE("nesting of any depth is refused where it starts") {
  for (const char* open : {"[", "{\"a\":"}) {
    std::string deep = "{\"q\":";
    for (int i = 0; i < 200000; ++i) deep += open;
    CHECK(complaint(deep).starts_with("x: "));
  }
}

TEST_CASE("a file cut at any byte is an error") {
  const Folder folder;
  const std::vector<float> x{1, 2, 3};
  write_safetensors(folder / "a", {{"x", TensorView(x.data(), DType::f32, {3})}}, {{"k", "v"}});
  const std::string bytes = heed::read_file(folder / "a");
  for (size_t length = 0; length < bytes.size(); ++length) CHECK(complaint_about(bytes.substr(0, length)) != "");
  CHECK_THROWS_WITH_AS(SafetensorsFile::open("/nowhere/x"), "/nowhere/x: cannot be read: No such file or directory",
                       Error);
}
