// GGUF files written by heed: read back as what they were made from.
#include <doctest/doctest.h>

#include <cmath>
#include <limits>

#include "heed/base/error.h"
#include "heed/base/file.h"
#include "heed/model/gguf_write.h"
#include "heed/model/weights.h"
#include "support/folder.h"
#include "support/tiny_model.h"

using namespace heed;
using namespace heed::model;
using heed::test::TinyModel;
using heed::test::TinySizes;

namespace {

std::span<const std::byte> bytes_of(const std::string& file) { return std::as_bytes(std::span(file)); }

void check_same(const Gguf& got, const Gguf& want) {
  CHECK(got.metadata() == want.metadata());
  REQUIRE(got.tensors().size() == want.tensors().size());
  for (size_t i = 0; i < want.tensors().size(); ++i) {
    const GgufTensor &a = got.tensors()[i], &b = want.tensors()[i];
    CHECK(a.name == b.name);
    CHECK(a.format == b.format);
    CHECK(a.shape == b.shape);
    CHECK(std::ranges::equal(a.bytes, b.bytes));
  }
}

std::string refusal(const GgufMetadata& metadata, const std::vector<GgufTensor>& tensors) {
  const test::Folder folder;
  std::string message = "accepted";
  try {
    write_gguf(folder / "x.gguf", metadata, tensors);
  } catch (const Error& e) {
    message = std::string(e.what()).substr((folder / "x.gguf").size());
    CHECK(folder.names().empty());
  }
  return message;
}

void check_same(const ModelInfo& got, const ModelInfo& want) {
  CHECK(got.architecture == want.architecture);
  CHECK(got.name == want.name);
  CHECK(std::vector{got.layers, got.width, got.ffn, got.heads, got.kv_heads, got.head_size, got.vocabulary, got.context,
                    got.window} == std::vector{want.layers, want.width, want.ffn, want.heads, want.kv_heads,
                                               want.head_size, want.vocabulary, want.context, want.window});
  CHECK(std::vector{got.rms_eps, got.rope_base, got.rope_base_local} ==
        std::vector{want.rms_eps, want.rope_base, want.rope_base_local});
  CHECK(got.local == want.local);
  CHECK(got.tied_output == want.tied_output);
  CHECK(got.embedding_scale == want.embedding_scale);
}

}  // namespace

TEST_CASE("a file that was read is written again with the same metadata and tensors") {
  const test::Folder folder;
  for (const WeightFormat format : {WeightFormat::f32, WeightFormat::f16, WeightFormat::q4_0, WeightFormat::q6_k}) {
    TinySizes s;
    s.width = 256, s.ffn = 256, s.heads = 4, s.kv_heads = 4, s.head_size = 64, s.layers = 1, s.weights = format;
    test::GgufWriter w = TinyModel(s).metadata();
    w.f32s("numbers", {1.5f, -std::numeric_limits<float>::infinity(), 1e-30f})
        .i32("negative", -7)
        .boolean("flag", true);
    w.u64("large", ~std::uint64_t{0}).raw("wide", 12, test::le(std::bit_cast<std::uint64_t>(0.1)));
    w.raw("wide integers", 9,
          test::le(11u) + test::le(std::uint64_t{2}) + test::le(std::int64_t{1}) + test::le(std::int64_t{1} << 40));
    w.texts("no texts", {}).f32s("no numbers", {});
    w.tensor("five", {5}, WeightFormat::f32, {1, 2, 3, 4, 5});  // ends off the alignment
    TinyModel(s).write_tensors(w);
    const std::string made = w.file();
    const Gguf want = Gguf::parse(bytes_of(made), "made.gguf");
    write_gguf(folder / "again.gguf", want.metadata(), want.tensors());
    const Gguf got = Gguf::open(folder / "again.gguf");
    CHECK(got.version() == 3);
    check_same(got, want);
  }
}

TEST_CASE("what a model and its vocabulary say of themselves is read back") {
  const test::Folder folder;
  TinySizes gemma;
  gemma.architecture = "gemma3", gemma.layers = 7, gemma.width = 40, gemma.heads = 2, gemma.kv_heads = 1;
  gemma.head_size = 32, gemma.window = 16;
  TinySizes untied;
  untied.tied = false, untied.context = 100000;
  for (const TinySizes& sizes : {TinySizes{}, gemma, untied}) {
    const std::string made = TinyModel(sizes).file();
    const Gguf file = Gguf::parse(bytes_of(made), "made.gguf");
    GgufMetadata metadata = metadata_of(read_info(file));
    metadata.merge(metadata_of(Vocabulary::from(file)));
    write_gguf(folder / "x.gguf", metadata, file.tensors());
    const Gguf again = Gguf::open(folder / "x.gguf");
    check_same(read_info(again), read_info(file));
    const Vocabulary got = Vocabulary::from(again), want = Vocabulary::from(file);
    CHECK(got.tokens == want.tokens);
    CHECK(got.kinds == want.kinds);
    CHECK(got.merges == want.merges);
    CHECK(got.model + got.pre == want.model + want.pre);
    CHECK((got.bos == want.bos && got.eos == want.eos && got.unknown == want.unknown));
    CHECK((got.add_bos == want.add_bos && got.add_space_prefix == want.add_space_prefix));
  }
}

TEST_CASE("a SentencePiece vocabulary is read back") {
  Vocabulary v;
  v.model = "llama", v.bos = 1, v.eos = 2, v.unknown = 0, v.add_bos = true, v.add_space_prefix = false;
  v.tokens = {"<unk>", "<s>", "</s>", "a"};
  v.scores = {0, 0, 0, -1.25f};
  v.kinds = {TokenKind::unknown, TokenKind::control, TokenKind::control, TokenKind::normal};
  const test::Folder folder;
  write_gguf(folder / "v.gguf", metadata_of(v), {});
  const Vocabulary got = Vocabulary::from(Gguf::open(folder / "v.gguf"));
  CHECK(got.model == "llama");
  CHECK(got.tokens == v.tokens);
  CHECK(got.scores == v.scores);
  CHECK(got.kinds == v.kinds);
  CHECK((got.bos == v.bos && got.eos == v.eos && got.unknown == v.unknown && got.add_bos && !got.add_space_prefix));
}

TEST_CASE("the byte vocabulary: a token's id is its byte") {
  const auto tokenizer = Tokenizer::make(Vocabulary::bytes());
  const std::string text = "In the beginning\n\t\"\xc3\xa9\xe2\x82\xac\" 0123 \x01\x7f<|endoftext|>";
  std::vector<Token> want;
  for (const char c : text) want.push_back(static_cast<unsigned char>(c));
  CHECK(tokenizer->encode(text, false) == want);
  CHECK(tokenizer->decode(want) == text);
  for (Token b = 0; b < 256; ++b) CHECK(tokenizer->decode(b) == std::string(1, static_cast<char>(b)));
  CHECK(tokenizer->vocabulary().tokens.size() == 257);
  CHECK(tokenizer->ends_text(256));
  CHECK(!tokenizer->bos());
}

TEST_CASE("files that could not be read back are not written") {
  const std::vector<float> x{1, 2, 3, 4};
  const GgufTensor good{"t", WeightFormat::f32, {2, 2}, std::as_bytes(std::span(x))};
  CHECK(refusal({}, {good}) == "accepted");
  CHECK(refusal({}, {good, good}) == ": tensor t: duplicate name");
  CHECK(refusal({{"general.alignment", std::uint64_t{64}}}, {}) ==
        ": general.alignment among the metadata, expected none: it is 32");
  CHECK(refusal({{"", true}}, {}) == ": a metadata key without a name");
  const auto changed = [&](const std::function<void(GgufTensor&)>& change) {
    GgufTensor t = good;
    change(t);
    return refusal({}, {t});
  };
  CHECK(changed([](GgufTensor& t) { t.name.clear(); }) == ": a tensor without a name");
  CHECK(changed([](GgufTensor& t) { t.shape = {2, 3}; }) == ": tensor t: 16 bytes, expected 24");
  CHECK(changed([](GgufTensor& t) { t.shape = {1, 1, 1, 1, 4}; }) == ": tensor t: 5 dimensions, expected 1 … 4");
  CHECK(changed([](GgufTensor& t) { t.shape = {0, 2}; }) == ": tensor t: shape = [0, 2], expected every extent >= 1");
  CHECK(changed([](GgufTensor& t) { t.format = WeightFormat::q8_0; }) ==
        ": tensor t: rows of 2 elements of Q8_0, expected a multiple of 32");
}
