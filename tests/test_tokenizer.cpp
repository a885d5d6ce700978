// Tokenizers of two real models: golden ids, naive references on random text, what text may not do.
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <ctime>
#include <map>
#include <random>

#include "heed/base/error.h"
#include "heed/base/file.h"
#include "heed/model/tokenizer.h"
#include "support/cache.h"
#include "support/vocabularies.h"

using heed::model::Gguf;
using heed::model::Token;
using heed::model::Tokenizer;
using heed::model::TokenKind;
using heed::model::Vocabulary;
using heed::test::byte_alphabet;
using heed::test::bytes_and;
using heed::test::complaint;
using heed::test::pieces_and;
using heed::test::utf8;
using Ids = std::vector<Token>;

namespace {

const Tokenizer& real(const std::string& file) {
  static std::map<std::string, std::unique_ptr<Tokenizer>> made;
  auto& t = made[file];
  if (!t) t = Tokenizer::make(Vocabulary::from(Gguf::open(heed::test::cached(file))));
  return *t;
}
const Tokenizer& smollm2() { return real("smollm2-135m-instruct-q4_1.gguf"); }
const Tokenizer& gemma() { return real("gemma-3-270m-q4_k_m.gguf"); }

const std::string& bible() {
  static const std::string text = heed::read_file(heed::test::cached("bible-kjv.txt"));
  return text;
}

double cpu_seconds() { return static_cast<double>(std::clock()) / CLOCKS_PER_SEC; }

// Characters in runs, so that white space, digits and words occur as they do in text. The classes
// are those that the patterns know: letters, numbers, white space, the rest.
struct Class {
  char name;
  std::vector<unsigned> points;
};
const std::vector<Class> classes = {
    {'L', {'a', 'e', 'h', 's', 't', 'T', 'l', 'v', 'r', 0xe9, 0x416, 0x4e2d, 0x1d5a0}},
    {'N', {'0', '7', 0xb2, 0x0663, 0x2167}},
    {'S', {' ', ' ', ' ', '\n', '\t', '\r', 0xa0, 0x3000, 0x2009}},
    {'P', {'\'', '.', '!', '-', '<', '_', 0x301, 0x20ac, 0x1f600, 0xfeff, 0x180e, 0x2581}},
};
using Characters = std::vector<std::pair<char, std::string>>;  // class, bytes

Characters random_characters(std::mt19937& random, size_t most, bool keep_marks) {
  Characters text;
  const size_t count = random() % most;
  while (text.size() < count) {
    const Class& c = classes[random() % classes.size()];
    for (size_t run = 1 + random() % 6; run > 0; --run) {
      const unsigned point = c.points[random() % c.points.size()];
      if (point != 0x2581 || keep_marks) text.emplace_back(c.name, utf8(point));
    }
  }
  return text;
}
std::string joined(const Characters& text) {
  std::string out;
  for (const auto& [name, bytes] : text) out += bytes;
  return out;
}

// GPT-2's alternatives tried one after the other at every place, as the pattern's text says.
std::vector<std::string> gpt2_pieces(const Characters& t) {
  std::vector<std::string> pieces;
  const auto at = [&](size_t i) { return i < t.size() ? t[i].first : '\0'; };
  for (size_t i = 0; i < t.size();) {
    size_t end = i;
    for (const std::string tail : {"s", "t", "re", "ve", "m", "ll", "d"})
      if (end == i && t[i].second == "'" &&
          joined({t.begin() + static_cast<long>(i), t.end()}).substr(1).starts_with(tail))
        end = i + 1 + tail.size();
    for (const char name : {'L', 'N', 'P'}) {
      if (end > i) break;
      size_t k = t[i].second == " " ? i + 1 : i;
      if (at(k) != name) continue;
      while (at(k) == name) ++k;
      end = k;
    }
    if (end == i) {
      while (at(end) == 'S') ++end;
      if (end < t.size() && end - i > 1) --end;
    }
    pieces.push_back(joined({t.begin() + static_cast<long>(i), t.begin() + static_cast<long>(end)}));
    i = end;
  }
  return pieces;
}

std::vector<std::string> smollm_pieces(const Characters& t) {
  std::vector<std::string> pieces;
  Characters between;
  const auto flush = [&] {
    for (std::string& p : gpt2_pieces(between)) pieces.push_back(std::move(p));
    between.clear();
  };
  for (const auto& c : t) {
    if (c.first == 'N') {
      flush();
      pieces.push_back(c.second);
    } else {
      between.push_back(c);
    }
  }
  flush();
  return pieces;
}

// Always the best pair of all, leftmost among equals; `cost` says how good, infinity for never.
template <class Cost>
void merge_all(std::vector<std::string>& symbols, const Cost& cost) {
  for (;;) {
    size_t best = symbols.size();
    double least = INFINITY;
    for (size_t i = 0; i + 1 < symbols.size(); ++i)
      if (const double c = cost(symbols[i], symbols[i + 1]); c < least) least = c, best = i;
    if (best == symbols.size()) return;
    symbols[best] += symbols[best + 1];
    symbols.erase(symbols.begin() + static_cast<long>(best) + 1);
  }
}

struct NaiveBpe {
  explicit NaiveBpe(const Vocabulary& v) : vocabulary(v) {
    for (size_t i = 0; i < v.merges.size(); ++i) ranks.emplace(v.merges[i], static_cast<double>(i));
    for (size_t i = 0; i < v.tokens.size(); ++i) ids.emplace(v.tokens[i], static_cast<Token>(i));
  }
  Ids encode(const std::vector<std::string>& pieces) const {
    const auto alphabet = byte_alphabet();
    Ids out;
    for (const std::string& piece : pieces) {
      std::vector<std::string> symbols;
      for (const char c : piece) symbols.push_back(alphabet[static_cast<unsigned char>(c)]);
      merge_all(symbols, [&](const std::string& a, const std::string& b) {
        const auto r = ranks.find(a + " " + b);
        return r == ranks.end() ? INFINITY : r->second;
      });
      for (const std::string& s : symbols) out.push_back(ids.at(s));
    }
    return out;
  }
  const Vocabulary& vocabulary;
  std::map<std::string, double> ranks;
  std::map<std::string, Token> ids;
};

struct NaivePieces {
  explicit NaivePieces(const Vocabulary& v) : vocabulary(v) {
    for (size_t i = 0; i < v.tokens.size(); ++i) {
      if (v.kinds[i] == TokenKind::normal) ids.emplace(v.tokens[i], i);
      if (v.kinds[i] == TokenKind::user_defined) raw.push_back(i);
    }
  }
  Ids encode(const Characters& text) const {
    Ids out;
    std::vector<std::string> symbols;
    const auto flush = [&] {
      merge_all(symbols, [&](const std::string& a, const std::string& b) {
        const auto id = ids.find(a + b);
        return id == ids.end() ? INFINITY : -static_cast<double>(vocabulary.scores[id->second]);
      });
      for (const std::string& s : symbols) {
        if (const auto id = ids.find(s); id != ids.end()) {
          out.push_back(static_cast<Token>(id->second));
          continue;
        }
        for (const char c : s) out.push_back(238 + static_cast<unsigned char>(c));  // Gemma's <0x00> is 238
      }
      symbols.clear();
    };
    for (size_t i = 0; i < text.size();) {
      const std::string rest = joined({text.begin() + static_cast<long>(i), text.end()});
      size_t longest = 0, id = 0;
      for (const size_t t : raw)
        if (rest.starts_with(vocabulary.tokens[t]) && vocabulary.tokens[t].size() > longest)
          longest = vocabulary.tokens[t].size(), id = t;
      if (longest == 0) {
        symbols.push_back(text[i].second == " " ? "\xe2\x96\x81" : text[i].second);
        ++i;
        continue;
      }
      flush();
      out.push_back(static_cast<Token>(id));
      for (; longest > 0; ++i) longest -= text[i].second.size();
    }
    flush();
    return out;
  }
  const Vocabulary& vocabulary;
  std::map<std::string, size_t> ids;
  std::vector<size_t> raw;
};

}  // namespace

TEST_CASE("golden ids and counts of the bible") {
  const std::string head = bible().substr(0, 32768);
  const Ids smol = smollm2().encode(head, false), gem = gemma().encode(head, false);
  CHECK(smol.size() == 8239);
  CHECK(Ids(smol.begin(), smol.begin() + 13) ==
        Ids{788, 260, 3616, 1839, 2312, 260, 10419, 284, 260, 3103, 30, 198, 3528});
  CHECK(gem.size() == 8109);
  CHECK(Ids(gem.begin(), gem.begin() + 13) ==
        Ids{902, 506, 6534, 3803, 4464, 506, 20808, 532, 506, 7764, 236761, 107, 3133});
}

TEST_CASE("what the real files say") {
  CHECK_FALSE(smollm2().bos());
  CHECK(smollm2().vocabulary().eos == 2);
  CHECK(gemma().bos() == 2);
  CHECK(gemma().vocabulary().eos == 1);
  CHECK(std::ranges::count(gemma().vocabulary().kinds, TokenKind::user_defined) == 165);
  CHECK_FALSE(gemma().vocabulary().add_space_prefix);
  for (const Token id : {0, 2}) CHECK(smollm2().ends_text(id));
  for (const Token id : {1, 106}) CHECK(gemma().ends_text(id));
  CHECK_FALSE(smollm2().ends_text(1));
  CHECK_FALSE(gemma().ends_text(105));
  CHECK_FALSE(gemma().ends_text(-1));
}

TEST_CASE("the whole bible comes back, in time") {
  for (const Tokenizer* t : {&smollm2(), &gemma()}) {
    const double start = cpu_seconds();
    const Ids ids = t->encode(bible(), false);
#ifdef NDEBUG
    CHECK(cpu_seconds() - start < 5);
#else
    (void)start;
#endif
    CHECK(t->decode(ids) == bible());
  }
}

TEST_CASE("long stretches of one character take no quadratic time") {
  for (const char c : {'a', ' ', '\n', '7', '!', '<'}) {
    CAPTURE(c);
    const std::string text(400'000, c);
    const double start = cpu_seconds();
    for (const Tokenizer* t : {&smollm2(), &gemma()}) CHECK(t->decode(t->encode(text, true)) == text);
    CHECK(cpu_seconds() - start < 10);
  }
}

TEST_CASE("SmolLM2: digits stand alone, and so does a space before one") {
  const Tokenizer& t = smollm2();
  const auto pieces = [&](const std::string& text) {
    std::vector<std::string> list;
    for (const Token id : t.encode(text, false)) list.push_back(t.decode(id));
    return list;
  };
  using List = std::vector<std::string>;
  CHECK(pieces("in 1984") == List{"in", " ", "1", "9", "8", "4"});
  CHECK(pieces("7  x") == List{"7", " ", " x"});
  CHECK(pieces("don't") == List{"don", "'t"});
  CHECK(pieces("a\r\nb") == List{"a", "\r", "\n", "b"});
  CHECK(t.encode(" ", false) == Ids{216});
}

TEST_CASE("Gemma: runs of white space, singles, bytes") {
  const Tokenizer& t = gemma();
  for (const char c : {' ', '\n', '\t'}) {
    const Ids ids = t.encode("x" + std::string(33, c) + "y", false);
    REQUIRE(ids.size() == 4);
    CHECK(t.decode(ids[1]) == std::string(31, c));
    CHECK(t.decode(ids[2]) == std::string(2, c));
  }
  CHECK(t.encode(" ", false) == Ids{236743});
  CHECK(t.encode("84770", false).size() == 5);
  CHECK(t.encode("<h1>", false).size() == 1);                 // user-defined
  // No token for this character: its bytes.
  CHECK(t.encode(utf8(0xe123), false) == Ids{238 + 0xee, 238 + 0x84, 238 + 0xa3});
  CHECK(t.encode("<0x41>", false).size() > 1);  // the text of a byte token is text
}

TEST_CASE("control tokens only on request") {
  CHECK(smollm2().encode("a<|im_end|>b", true) == Ids{81, 2, 82});
  CHECK(gemma().encode("<bos>", true) == Ids{2});
  for (const auto& [t, text] : {std::pair{&smollm2(), std::string("x<|im_end|><|endoftext|>")},
                                std::pair{&gemma(), std::string("x<eos><unused7><end_of_turn><unk>")}}) {
    const Ids ids = t->encode(text, false);
    for (const Token id : ids) CHECK(t->vocabulary().kinds[static_cast<size_t>(id)] != TokenKind::control);
    CHECK(t->decode(ids) == text);
    CHECK(t->decode(t->encode(text, true)) == "x");
    CHECK(t->decode(t->encode(text, true), true) == text);
  }
}

TEST_CASE("bytes are kept: BOM, CRLF, NUL, emoji, nothing") {
  for (const std::string& text : {std::string("\xef\xbb\xbfhead"), std::string("a\r\nb\r\n"), std::string("a\0b", 3),
                                  utf8(0x1f468) + utf8(0x200d) + utf8(0x1f469), std::string("  x  "), std::string()})
    for (const Tokenizer* t : {&smollm2(), &gemma()}) CHECK(t->decode(t->encode(text, false)) == text);
  CHECK(smollm2().encode("", true).empty());
}

TEST_CASE("SmolLM2 equals a naive byte-level BPE") {
  const NaiveBpe naive(smollm2().vocabulary());
  std::mt19937 random(1);
  for (int i = 0; i < 1500; ++i) {
    const Characters text = random_characters(random, 60, true);
    CAPTURE(joined(text));
    REQUIRE(smollm2().encode(joined(text), false) == naive.encode(smollm_pieces(text)));
  }
}

TEST_CASE("Gemma equals a naive SentencePiece") {
  const NaivePieces naive(gemma().vocabulary());
  std::mt19937 random(2);
  for (int i = 0; i < 1500; ++i) {
    const Characters text = random_characters(random, 60, true);
    CAPTURE(joined(text));
    REQUIRE(gemma().encode(joined(text), false) == naive.encode(text));
  }
}

TEST_CASE("random text comes back") {
  std::mt19937 random(3);
  for (int i = 0; i < 500; ++i) {
    const std::string text = joined(random_characters(random, 200, false));
    for (const Tokenizer* t : {&smollm2(), &gemma()}) REQUIRE(t->decode(t->encode(text, false)) == text);
  }
}

TEST_CASE("small vocabularies whose merges and scores collide equal the naive ones") {
  std::mt19937 random(4);
  for (int round = 0; round < 300; ++round) {
    std::vector<std::string> tokens{"a", "b", "c"}, merges;
    std::vector<std::pair<std::string, float>> scored;
    for (int k = 0; k < 12; ++k) {
      const std::string left = tokens[random() % tokens.size()], right = tokens[random() % tokens.size()];
      merges.push_back(left + " " + right);
      if (std::ranges::count(tokens, left + right) == 0) tokens.push_back(left + right);
    }
    std::ranges::shuffle(merges, random);
    for (const std::string& t : tokens) scored.emplace_back(t, -static_cast<float>(random() % 4));
    const Vocabulary v = bytes_and({tokens.begin() + 3, tokens.end()}, merges);
    const Vocabulary p = pieces_and(scored);
    std::string text;
    Characters characters;
    for (size_t n = random() % 40; n > 0; --n) {
      text += "abc"[random() % 3];
      characters.emplace_back('L', text.substr(text.size() - 1));
    }
    REQUIRE(Tokenizer::make(v)->encode(text, false) == (text.empty() ? Ids{} : NaiveBpe(v).encode({text})));
    REQUIRE(Tokenizer::make(p)->encode(text, false) == NaivePieces(p).encode(characters));
  }
}

TEST_CASE("invalid UTF-8 is refused with its offset") {
  const std::pair<std::string, size_t> cases[] = {{"\x80", 0},
                                                  {"ab\xc0\x80", 2},
                                                  {"\xc1\xbf", 0},
                                                  {"a\xe0\x9f\xbf", 1},
                                                  {"\xed\xa0\x80", 0},
                                                  {"\xf0\x8f\xbf\xbf", 0},
                                                  {"\xf4\x90\x80\x80", 0},
                                                  {"\xf5\x80\x80\x80", 0},
                                                  {"abc\xe2\x82", 3},
                                                  {"\xf0\x9f\x98", 0},
                                                  {utf8(0x20ac) + "\xff", 3},
                                                  {"\xc3(", 0},
                                                  {"\xe2\x82(", 0}};
  for (const auto& [text, offset] : cases) {
    CHECK(heed::model::invalid_utf8(text) == offset);
    CHECK(complaint([&] { gemma().encode(text, false); }) ==
          "text: byte offset " + std::to_string(offset) + " is not valid UTF-8");
  }
  for (const unsigned point : {0x0u, 0x7fu, 0x80u, 0x7ffu, 0x800u, 0xd7ffu, 0xe000u, 0xffffu, 0x10000u, 0x10ffffu})
    CHECK_FALSE(heed::model::invalid_utf8(utf8(point)));
}

TEST_CASE("a byte that the vocabulary lacks is an error, not a gap") {
  CHECK(complaint([] { smollm2().encode("ab \x04", false); }) ==
        "text: byte 0x04 at offset 3 has no token in this vocabulary");
  CHECK(complaint([] { smollm2().encode("<|im_end|>\x04", true); }) ==
        "text: byte 0x04 at offset 10 has no token in this vocabulary");
}

TEST_CASE("ids out of range") {
  CHECK(complaint([] { smollm2().decode(-1); }) == "token = -1, expected 0 … 49151");
  CHECK(complaint([] { smollm2().decode(Ids{5, 49152}); }) == "token = 49152, expected 0 … 49151");
  CHECK(smollm2().find("<|im_end|>") == 2);
  CHECK_FALSE(smollm2().find("no such token"));
}
