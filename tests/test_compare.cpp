// What the comparison of mechanisms asks of a model, and what it reports.

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <set>

#include "heed/model/compare.h"
#include "heed/model/tasks.h"
#include "support/tiny_model.h"

using namespace heed;
using namespace heed::model;
using test::TinyModel;
using test::TinySizes;

namespace {

// Every byte of ASCII is a token of its own ("ab" aside), so prompts can be read back and counted.
std::unique_ptr<Model> tiny_model(Index context = 4096) {
  TinySizes s;
  s.context = static_cast<int>(context);
  const std::string file = TinyModel(s).file();
  return Model::load(Gguf::parse(std::as_bytes(std::span(file)), "tiny.gguf"), DType::f32);
}

// Lines that differ, of 40 to 60 bytes, with an empty one now and then.
std::string document(int lines) {
  std::string text;
  for (int i = 0; i < lines; ++i) {
    text += "Line " + std::to_string(i) + " tells of nothing in particular" +
            std::string(static_cast<size_t>(i % 20), '.') + "\n";
    if (i % 7 == 6) text += "\n";
  }
  return text;
}

size_t count(const std::string& text, const std::string& part) {
  size_t n = 0;
  for (size_t at = text.find(part); at != text.npos; at = text.find(part, at + 1)) ++n;
  return n;
}

}  // namespace

TEST_CASE("a pass key is a paragraph of its own at its depth") {
  const auto model = tiny_model();
  const std::string text = document(200), key = "The pass key is 12345. Remember it.";
  for (Index length : {300, 1000, 3000, 20000})
    for (double depth : {0.0, 0.1, 0.5, 0.9, 1.0}) {
      CAPTURE(length);
      CAPTURE(depth);
      const std::vector<Token> ids = passkey_prompt(*model, text, length, depth, "12345");
      CHECK(ids == passkey_prompt(*model, text, length, depth, "12345"));
      CHECK(static_cast<Index>(ids.size()) <= length);
      CHECK(static_cast<Index>(ids.size()) > length - 80);
      const std::string prompt = model->tokenizer().decode(ids);
      const std::string begin = "There is a pass key hidden in the text below. Find it and remember it.\n\n";
      const std::string end = "\n\nWhat is the pass key? The pass key is";
      REQUIRE(prompt.substr(0, begin.size()) == begin);
      REQUIRE(prompt.substr(prompt.size() - end.size()) == end);
      CHECK(count(prompt, "12345") == 1);
      const std::string filler = prompt.substr(begin.size(), prompt.size() - begin.size() - end.size());
      CHECK(count("\n" + filler + "\n", "\n" + key + "\n") == 1);
      CHECK(filler.find("\n\n") == filler.npos);
      const double at = static_cast<double>(filler.find(key)), most = static_cast<double>(filler.size() - key.size());
      CHECK(std::abs(at - depth * most) <= 70);
      // The rest are lines of the document, in order, going round.
      size_t known = 0, lines = 0;
      for (size_t i = 0; i < filler.size();
           i = filler.find('\n', i) == filler.npos ? filler.size() : filler.find('\n', i) + 1) {
        const std::string line = filler.substr(i, filler.find('\n', i) - i);
        ++lines;
        known += ("\n" + text).find("\n" + line + "\n") != std::string::npos;
      }
      CHECK(known == lines - 1);
    }
  CHECK(passkey_prompt(*model, text, 1000, 0.5, "12345") != passkey_prompt(*model, text, 1000, 0.5, "54321"));
  CHECK_THROWS_AS(passkey_prompt(*model, text, 100, 0.5, "12345"), UsageError);
  CHECK_THROWS_WITH_AS(passkey_prompt(*model, text, 1000, 1.5, "12345"), "passkey: depth = 1.5, expected 0 … 1",
                       UsageError);
  CHECK_THROWS_WITH_AS(passkey_prompt(*model, "\n \n", 1000, 0, "12345"),
                       "passkey: the document holds no text, expected at least one line of filler", Error);
}

TEST_CASE("very long lines are cut into filler") {
  const auto model = tiny_model();
  std::string words, solid(5000, 'x');
  for (int i = 0; i < 2000; ++i) words += "word ";
  for (const std::string& text : {words, solid}) {
    const std::vector<Token> ids = passkey_prompt(*model, text, 4000, 0.5, "12345");
    CHECK(static_cast<Index>(ids.size()) <= 4000);
    CHECK(static_cast<Index>(ids.size()) > 2800);
  }
}

TEST_CASE("keys come from the seed and have five digits") {
  const auto model = tiny_model();
  std::set<std::string> keys;
  for (std::uint64_t seed = 0; seed < 20; ++seed) {
    const PasskeyTask task = make_passkey(*model, document(20), 600, 0.5, seed);
    CHECK(task.key.size() == 5);
    CHECK(std::all_of(task.key.begin(), task.key.end(), [](char c) { return c >= '0' && c <= '9'; }));
    CHECK(task.length == static_cast<Index>(task.prompt.size()) + 1);
    CHECK(task.length <= 600);
    keys.insert(task.key);
  }
  CHECK(keys.size() > 15);
}

TEST_CASE("the copied passage stands twice, the rest is the document in order") {
  const auto model = tiny_model();
  std::vector<Token> ids(1000);
  std::iota(ids.begin(), ids.end(), 0);
  for (Index gap : {1, 100, 750})
    for (std::uint64_t seed = 0; seed < 10; ++seed) {
      const CopyTask task = make_copy(*model, ids, gap, seed);
      REQUIRE(static_cast<Index>(task.tokens.size()) == 50 + 200 + gap + 200);
      CHECK(task.first == 50);
      CHECK(task.second == 250 + gap);
      const auto passage = [&](Index at) {
        return std::vector<Token>(task.tokens.begin() + at, task.tokens.begin() + at + 200);
      };
      CHECK(passage(task.first) == passage(task.second));
      std::vector<Token> around(task.tokens.begin(), task.tokens.begin() + 50);
      around.insert(around.end(), task.tokens.begin() + 250, task.tokens.begin() + 250 + gap);
      for (size_t i = 1; i < around.size(); ++i) CHECK(around[i] == around[i - 1] + 1);
      CHECK(passage(50).back() == passage(50).front() + 199);
      CHECK((passage(50).front() > around.back() || passage(50).back() < around.front()));
    }
  CHECK_THROWS_WITH_AS(make_copy(*model, ids, 751, 0), "copy: the document holds 1000 tokens, expected at least 1001",
                       Error);
  CHECK_THROWS_WITH_AS(make_copy(*model, ids, 0, 0), "copy: gap = 0 tokens, expected >= 1", UsageError);
}

TEST_CASE("every mechanism gets the same questions and a row of its own") {
  const auto model = tiny_model();
  const std::string text = document(60);
  std::vector<Token> tokens = model->tokenizer().encode(text, false);
  tokens.resize(700);
  CompareOptions options;
  options.uses.resize(2);
  options.uses[1].call = MechanismCall::parse("streaming:sink=0,window=16");
  options.chunk = 128, options.kv = DType::f32;
  options.passkey = options.copy = true;
  options.passkey_lengths = {400}, options.passkey_depths = {0, 1}, options.copy_gaps = {64}, options.seeds = {3, 4};
  std::set<std::string> steps;
  Index plans = 0;
  options.progress = [&](const std::string& mechanism, const std::string& step, Index done, Index total) {
    steps.insert(mechanism + " " + step);
    CHECK(done >= 1);
    CHECK(done <= total);
    return true;
  };
  options.observe = [&](size_t use, Index first, Index layer, const Plan& plan) {
    CHECK(first % 128 == 0);
    CHECK(plan.problem.M == first + plan.problem.N);
    plans += use == 1 && layer == 1;
  };
  const std::vector<CompareRow> rows = compare(*model, tokens, text, options);
  REQUIRE(rows.size() == 2);
  CHECK(plans == 6);
  CHECK(steps.count("streaming:sink=0,window=16 reading") == 1);
  CHECK(steps.count("dense scoring") == 1);
  for (const CompareRow& row : rows) {
    CHECK(row.tokens == 700);
    REQUIRE(row.nll_by_position.size() == 699);
    CHECK(row.nll ==
          doctest::Approx(std::accumulate(row.nll_by_position.begin(), row.nll_by_position.end(), 0.0) / 699));
    CHECK(row.ppl == doctest::Approx(std::exp(row.nll)));
    CHECK(row.tokens_per_s == doctest::Approx(700 / row.prefill_s));
    CHECK(row.attention_s + row.linear_s <= row.prefill_s);
    CHECK(row.plan_s <= row.attention_s);
    CHECK(row.peak_bytes >= 700 * kv_bytes_per_token(model->info(), DType::f32));
    REQUIRE(row.passkey.size() == 4);
    REQUIRE(row.copy.size() == 2);
    for (const PasskeyResult& r : row.passkey) CHECK(r.found == (r.answer == r.key));
    CHECK(row.passkey[0].key == rows[0].passkey[0].key);
    CHECK(row.passkey[1].seed == 4);
    CHECK(row.passkey[2].depth == 1);
  }
  CHECK(rows[0].density == 1);
  CHECK(rows[1].density == doctest::Approx((700 * 16 - 120) / (700 * 701 / 2.0)));
  CHECK(rows[0].nll_by_position[10] == rows[1].nll_by_position[10]);
  CHECK(rows[0].nll_by_position[300] != rows[1].nll_by_position[300]);
  CHECK(rows[0].copy[0].nll_first != rows[1].copy[0].nll_first);

  options.progress = [](const std::string&, const std::string&, Index, Index) { return false; };
  CHECK_THROWS_AS(compare(*model, tokens, text, options), Interrupted);
  options.uses[1].call.name = "nonesuch";
  CHECK_THROWS_AS(compare(*model, tokens, text, options), UsageError);
}
