// Mechanisms in whole models, small and made up: chunks of a prompt, and steps of decoding.

#include <doctest/doctest.h>

#include "support/cases.h"
#include "support/sparse_calls.h"
#include "support/tiny_session.h"

using namespace heed;
using namespace heed::model;
using namespace heed::test;

namespace {

bool runs_on_models(const Mechanism& m) { return m.not_on_models.empty() && m.causality != Causality::refused; }

}  // namespace

TEST_CASE("mechanisms that need the whole prompt see it whatever the chunk") {
  const std::unique_ptr<Model> model = load(TinyModel(TinySizes{}).file());
  const std::vector<Token> tokens = random_tokens(300);
  const std::vector<float> dense = Session(*model, options(310, 300)).prefill(tokens);
  for (const Mechanism* m : mechanisms()) {
    if (!runs_on_models(*m) || !m->square) continue;
    CAPTURE(m->name);
    REQUIRE(sparse_calls().count(m->name) == 1);
    const std::string& call = sparse_calls().at(m->name);
    Session whole(*model, options(310, 300, call)), parts(*model, options(310, 32, call));
    Index rows = 0;
    parts.observe_plans([&](Index layer, const Plan& plan) {
      if (layer == 1) rows = plan.problem.N;
    });
    const std::vector<float> want = whole.prefill(tokens);
    CHECK(!test::same_bits(want, dense));
    CHECK(test::same_bits(parts.prefill(tokens), want));
    CHECK(rows == 300);
    CHECK_THROWS_WITH_AS(
        parts.prefill({1, 2}),
        (m->name + ": 300 tokens are held already, expected none: it needs the whole prompt at once").c_str(), Error);
    CHECK(test::same_bits(std::vector<float>(whole.decode(1)), parts.decode(1)));
  }
}

TEST_CASE("other mechanisms give the same in chunks and in one piece") {
  const std::unique_ptr<Model> model = load(TinyModel(TinySizes{}).file());
  const std::vector<Token> tokens = random_tokens(300);
  const std::vector<float> dense = Session(*model, options(310, 300)).prefill(tokens);
  for (const Mechanism* m : mechanisms()) {
    if (!runs_on_models(*m) || m->square) continue;
    CAPTURE(m->name);
    REQUIRE(sparse_calls().count(m->name) == 1);
    const std::string& call = sparse_calls().at(m->name);
    Session whole(*model, options(310, 300, call));
    const std::vector<float> want = whole.prefill(tokens);
    if (m->name != "dense") CHECK(!test::same_bits(want, dense));
    for (const Index chunk : {16, 48, 112}) {  // hip's blocks of queries are 16 and must not be cut
      Session parts(*model, options(310, chunk, call));
      const std::vector<float> got = parts.prefill(tokens);
      CHECK(difference(got, {want.begin(), want.end()}) < 2e-5);
    }
  }
}

TEST_CASE("a step of decoding follows the mechanism's own rule") {
  const std::unique_ptr<Model> model = load(TinyModel(TinySizes{}).file());
  const std::vector<Token> tokens = random_tokens(300);
  const auto decoded = [&](const std::string& call, Phase phase) {
    SessionOptions o = options(310, 300, call);
    o.use.phase = phase;
    Session session(*model, o);
    session.prefill(tokens);
    std::vector<float> last;
    for (Token t : {1, 2, 3, 4, 5}) last = session.decode(t);
    return last;
  };
  const std::vector<float> dense = decoded("dense", Phase::both);
  // A budget of everything is dense; a small one is not; without one decoding is dense.
  const std::string seer = "seer-attention:block=16,decode_budget=";
  CHECK(difference(decoded(seer + "400", Phase::decode), {dense.begin(), dense.end()}) < 2e-5);
  CHECK(!test::same_bits(decoded(seer + "32", Phase::decode), dense));
  CHECK(test::same_bits(decoded(seer + "0", Phase::decode), dense));
  CHECK(test::same_bits(decoded("psa:query_block=32,block=16,fold=8", Phase::decode), dense));
  // hip reuses its lists for `refresh` steps.
  const std::string hip = "hip:budget=32,query_block=16,window=32,sink=4,refresh=";
  CHECK(!test::same_bits(decoded(hip + "1", Phase::decode), dense));
  CHECK(!test::same_bits(decoded(hip + "1", Phase::decode), decoded(hip + "5", Phase::decode)));
}
