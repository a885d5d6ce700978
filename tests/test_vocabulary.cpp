// Vocabularies made here: what their tokens, pre-tokenizers and prefixes do, and those that lie.
#include <doctest/doctest.h>

#include <cmath>
#include <set>

#include "support/gguf_writer.h"
#include "support/vocabularies.h"

using heed::model::Gguf;
using heed::model::Token;
using heed::model::Tokenizer;
using heed::model::TokenKind;
using heed::model::Vocabulary;
using heed::test::byte_alphabet;
using heed::test::bytes_and;
using heed::test::GgufWriter;
using heed::test::pieces_and;
using heed::test::utf8;
using Ids = std::vector<Token>;

namespace {

std::string complaint(const Vocabulary& v) {
  return heed::test::complaint([&] { Tokenizer::make(v); });
}
std::string complaint(const GgufWriter& w) {
  const std::string file = w.file();
  return heed::test::complaint(
      [&] { Vocabulary::from(Gguf::parse({reinterpret_cast<const std::byte*>(file.data()), file.size()}, "x")); });
}

}  // namespace

TEST_CASE("tokens that reach over a space are found") {
  const std::string mark = utf8(0x2581);
  Vocabulary v = pieces_and({{"a", 0},
                             {"b", 0},
                             {mark, 0},
                             {mark + "b", -2},
                             {std::string("a").append(mark), -1},
                             {std::string("a").append(mark).append("b"), -3}});
  const auto t = Tokenizer::make(v);
  CHECK(t->encode("a b", false) == Ids{262});
  CHECK(t->encode("b b", false) == Ids{258, 260});
  CHECK(t->encode("a a b", false) == Ids{261, 262});
}

TEST_CASE("a space prefix is put before every stretch of text and taken away again") {
  const std::string mark = utf8(0x2581);
  Vocabulary v = pieces_and({{"a", 0}, {mark, 0}, {mark + "a", -1}, {"[x]", 0}, {"</s>", 0}});
  v.kinds[260] = TokenKind::user_defined;
  v.kinds[261] = TokenKind::control;
  v.add_space_prefix = true;
  const auto t = Tokenizer::make(v);
  CHECK(t->encode("a", false) == Ids{259});
  CHECK(t->encode("aa", false) == Ids{259, 257});
  CHECK(t->encode("a[x]a", false) == Ids{259, 260, 259});
  CHECK(t->decode(259) == " a");
  for (const std::string text : {"a", " a", "  ", "a[x]a", "[x] a", "a [x]", ""})
    CHECK(t->decode(t->encode(text, false)) == text);
  CHECK(t->decode(t->encode("a</s>a", true), true) == "a</s>a");
}

TEST_CASE("user-defined tokens: leftmost, then longest, in raw text") {
  Vocabulary v = bytes_and({"xy", "xyz", "zq", "he llo"}, {});
  for (size_t i = 256; i < 260; ++i) v.kinds[i] = TokenKind::user_defined;
  const auto t = Tokenizer::make(v);
  CHECK(t->encode("xyzq", false) == Ids{257, 'q'});
  CHECK(t->encode("xyxyz", false) == Ids{256, 257});
  CHECK(t->encode("he llo", false) == Ids{259});
  CHECK(t->decode(259) == "he llo");
}

TEST_CASE("pre-tokenizers cut where their patterns say") {
  // One token a letter pair, so that what is joined shows the pieces.
  const auto cuts = [](const std::string& pre, const std::string& text) {
    Vocabulary v = bytes_and({}, {});
    v.pre = pre;
    std::set<std::string> tokens;
    const auto alphabet = byte_alphabet();
    // A merge for every pair of neighbours, longest first joins: prefixes of the text from every place.
    std::vector<std::string> symbols;
    for (const char c : text) symbols.push_back(alphabet[static_cast<unsigned char>(c)]);
    for (size_t i = 0; i < symbols.size(); ++i)
      for (std::string run = symbols[i], k; i < symbols.size() && run.size() < 40;) {
        const size_t next = i + 1 + k.size();
        if (next >= symbols.size()) break;
        if (tokens.insert(run + symbols[next]).second) {
          v.merges.push_back(run + " " + symbols[next]);
          v.tokens.push_back(run + symbols[next]);
        }
        run += symbols[next];
        k += '.';
      }
    v.kinds.assign(v.tokens.size(), TokenKind::normal);
    const auto t = Tokenizer::make(v);
    std::string shown;
    for (const Token id : t->encode(text, false)) shown.append(shown.empty() ? "" : "|").append(t->decode(id));
    return shown;
  };
  CHECK(cuts("gpt-2", "ab 123 x") == "ab| 123| x");
  CHECK(cuts("smollm", "ab 12 x") == "ab| |1|2| x");
  CHECK(cuts("qwen2", "ab 12 x") == "ab| |1|2| x");
  CHECK(cuts("llama-bpe", "ab 1234 x") == "ab| |123|4| x");
  CHECK(cuts("llama3", "ab'LL") == "ab|'LL");
  CHECK(cuts("gpt-2", "ab'LL") == "ab|'|LL");
  CHECK(cuts("qwen2", "a.\n\nb") == "a|.\n\n|b");
  CHECK(cuts("gpt-2", "a.\n\nb") == "a|.|\n|\n|b");
  CHECK(cuts("default", "a 1234, b") == "a| |123|4|,| b");
}

TEST_CASE("vocabularies that lie") {
  const auto broken = [](auto change) {
    Vocabulary v = bytes_and({"ab"}, {"a b"});
    change(v);
    return complaint(v);
  };
  CHECK(broken([](Vocabulary&) {}) == "");
  CHECK(broken([](Vocabulary& v) { v.model = "bert"; }) == "tokenizer.ggml.model = \"bert\", supported: gpt2, llama");
  CHECK(broken([](Vocabulary& v) { v.pre = "tekken\n"; }) ==
        "tokenizer.ggml.pre = \"tekken\\x0a\", supported: smollm, gpt-2, default, llama-bpe, qwen2");
  CHECK(broken([](Vocabulary& v) { v.tokens.clear(); }) == "tokenizer.ggml.tokens: no tokens, expected at least one");
  CHECK(broken([](Vocabulary& v) { v.kinds.pop_back(); }) == "tokenizer.ggml.token_type: 256 entries, expected 257");
  CHECK(broken([](Vocabulary& v) { v.eos = 257; }) == "tokenizer.ggml.eos_token_id = 257, expected 0 … 256");
  CHECK(broken([](Vocabulary& v) { v.bos = -1; }) == "tokenizer.ggml.bos_token_id = -1, expected 0 … 256");
  CHECK(broken([](Vocabulary& v) { v.tokens[256] = "a\xff"; }) ==
        "tokenizer.ggml.tokens[256]: byte offset 1 is not valid UTF-8");
  CHECK(broken([](Vocabulary& v) { v.tokens['A'] = "AA"; }) == "tokenizer.ggml.tokens: no token for byte 0x41");
  CHECK(broken([](Vocabulary& v) { v.merges[0] = "ab"; }) == "tokenizer.ggml.merges[0] = \"ab\", expected two tokens");
  CHECK(broken([](Vocabulary& v) { v.merges[0] = "a "; }) == "tokenizer.ggml.merges[0] = \"a \", expected two tokens");
  CHECK(broken([](Vocabulary& v) { v.merges.push_back("a c"); }) ==
        "tokenizer.ggml.merges[1] = \"a c\": \"ac\" is not a normal token");
  CHECK(broken([](Vocabulary& v) { v.kinds[256] = TokenKind::control; }) ==
        "tokenizer.ggml.merges[0] = \"a b\": \"ab\" is not a normal token");

  Vocabulary p = pieces_and({{"a", 0}});
  CHECK(complaint(p) == "");
  p.scores[257] = NAN;
  CHECK(complaint(p) == "tokenizer.ggml.scores[257] = nan, expected a finite number");
  p.scores.pop_back();
  CHECK(complaint(p) == "tokenizer.ggml.scores: 257 entries, expected 258");
  p = pieces_and({{"a", 0}});
  p.tokens[1 + 0x4f] = "<0x4f>";
  CHECK(complaint(p) == "tokenizer.ggml.tokens: no byte token <0x4F>");
}

TEST_CASE("metadata: defaults and what is wrong") {
  const std::string model = "tokenizer.ggml.model", tokens = "tokenizer.ggml.tokens",
                    types = "tokenizer.ggml.token_type", scores = "tokenizer.ggml.scores";
  const auto read = [](const GgufWriter& w) {
    const std::string file = w.file();
    return Vocabulary::from(Gguf::parse({reinterpret_cast<const std::byte*>(file.data()), file.size()}, "x"));
  };
  const auto llama = [&] {
    GgufWriter w;
    w.text(model, "llama").texts(tokens, {"<unk>", "<s>", "</s>"}).i32s(types, {2, 3, 3}).f32s(scores, {0, 0, 0});
    return w;
  };
  Vocabulary v = read(llama());
  CHECK(v.add_bos);
  CHECK(v.add_space_prefix);
  CHECK(v.bos == 1);
  CHECK(v.eos == 2);
  CHECK(v.unknown == 0);
  v = read(llama().boolean("tokenizer.ggml.add_bos_token", false).boolean("tokenizer.ggml.add_space_prefix", false));
  CHECK_FALSE(v.add_bos);
  CHECK_FALSE(v.add_space_prefix);
  v = read(GgufWriter().text(model, "gpt2").texts(tokens, {"a", "b"}).u32("tokenizer.ggml.bos_token_id", 1));
  CHECK(v.pre == "default");
  CHECK(v.kinds == std::vector<TokenKind>(2, TokenKind::normal));
  CHECK_FALSE(v.add_bos);
  CHECK_FALSE(v.add_space_prefix);
  CHECK_FALSE(v.eos);
  v = read(GgufWriter()
               .text(model, "gpt2")
               .text("tokenizer.ggml.pre", "llama-bpe")
               .texts(tokens, {"a"})
               .u32("tokenizer.ggml.bos_token_id", 0));
  CHECK(v.add_bos);

  CHECK(complaint(GgufWriter()) == "x: tokenizer.ggml.model is missing");
  CHECK(complaint(GgufWriter().text(model, "gpt2")) == "x: tokenizer.ggml.tokens is missing");
  CHECK(complaint(GgufWriter().text(model, "llama").texts(tokens, {"a"})) == "x: tokenizer.ggml.scores is missing");
  CHECK(complaint(GgufWriter().text(model, "gpt2").texts(tokens, {"a"}).i32s(types, {1, 1})) ==
        "x: tokenizer.ggml.token_type has 2 entries, expected 1 as tokenizer.ggml.tokens has");
  CHECK(complaint(GgufWriter().text(model, "gpt2").texts(tokens, {"a"}).i32s(types, {7})) ==
        "x: tokenizer.ggml.token_type[0] = 7, expected 1 … 6");
  CHECK(complaint(llama().u32("tokenizer.ggml.eos_token_id", 3)) ==
        "x: tokenizer.ggml.eos_token_id = 3, expected 0 … 2");
}
