// Sessions drop what no later query can see: the same bits, less memory.

#include <doctest/doctest.h>

#include <functional>

#include "heed/kernel/kernels.h"
#include "support/cases.h"
#include "support/tiny_session.h"

using namespace heed;
using namespace heed::model;
using namespace heed::test;

namespace {

struct Setting {
  std::string call;
  bool gemma;
  // Whether KV head h of layer l may see token j from position p on: from the definitions.
  std::function<bool(Index l, Index h, Index p, Index j)> sees;
};

std::vector<Setting> settings() {
  return {
      {"streaming:sink=2,window=20", false, [](Index, Index, Index p, Index j) { return j < 2 || j > p - 20; }},
      // A span of 0.2 · 400 tokens, whole blocks of 16, 16 of them sinks.
      {"moa:block=16,sink=16,min_span=32,alpha=0,beta=0.2", false,
       [](Index, Index, Index p, Index j) { return j < 16 || j > p - 64; }},
      {"s2:block=64,local_blocks=2,stride_blocks=3,allow_partial=true", false,
       [](Index, Index h, Index p, Index j) { return p / 64 - j / 64 < 2 || (j / 64 + h) % 3 == 0; }},
      // Six layers have a window of 9, the last one sees all.
      {"dense", true, [](Index l, Index, Index p, Index j) { return l == 5 || j > p - 9; }},
  };
}

SessionOptions kept(SessionOptions o) {
  o.drop = false;
  return o;
}

}  // namespace

TEST_CASE("what is dropped changes no bit, and is what the definitions allow") {
  const std::vector<Token> tokens = random_tokens(480);
  for (const Setting& s : settings())
    for (const DType kv : {DType::f32, DType::i8}) {
      CAPTURE(s.call);
      const std::unique_ptr<Model> model = load(TinyModel(s.gemma ? tiny_gemma() : TinySizes{}).file());
      Session some(*model, options(480, 48, s.call, kv)), all(*model, kept(options(480, 48, s.call, kv)));
      const std::vector<Token> prompt(tokens.begin(), tokens.begin() + 400);
      CHECK(same_bits(some.prefill(prompt), all.prefill(prompt)));
      for (size_t i = 400; i < 480; ++i) CHECK(same_bits(some.decode(tokens[i]), all.decode(tokens[i])));

      // 480 tokens are 7 whole panels and a half; they were last looked through at 448 tokens, rewind is 64.
      const ModelInfo& info = model->info();
      Index dropped = 0;
      for (Index l = 0; l < info.layers; ++l)
        for (Index h = 0; h < info.kv_heads; ++h)
          for (Index panel = 0; panel < 7; ++panel) {
            bool seen = false;
            for (Index j = panel * 64; j < (panel + 1) * 64; ++j) seen = seen || s.sees(l, h, 448 - 64, j);
            dropped += seen ? 0 : 1;
          }
      CHECK(dropped > 0);
      const Index panel_bytes = panel_layout(kv, info.head_size, info.head_size).panel_bytes();
      CHECK(some.stats().kv_bytes == all.stats().kv_bytes - dropped * panel_bytes);
      CHECK(some.stats().peak_bytes < all.stats().peak_bytes);
    }
}

TEST_CASE("a mechanism in one phase alone leaves everything to the other") {
  const std::unique_ptr<Model> model = load(TinyModel(TinySizes{}).file());
  for (const Phase phase : {Phase::prefill, Phase::decode}) {
    SessionOptions o = options(400, 100, "streaming:sink=2,window=20");
    o.use.phase = phase;
    Session some(*model, o), all(*model, kept(o));
    CHECK(same_bits(some.prefill(random_tokens(390)), all.prefill(random_tokens(390))));
    CHECK(same_bits(some.decode(5), all.decode(5)));
    CHECK(some.stats().kv_bytes == all.stats().kv_bytes);
  }
}

TEST_CASE("tokens can be taken back as far as was promised") {
  const std::unique_ptr<Model> model = load(TinyModel(TinySizes{}).file());
  const std::vector<Token> tokens = random_tokens(450);
  const std::vector<Token> start(tokens.begin(), tokens.begin() + 400), rest(tokens.begin() + 400, tokens.end());
  Session some(*model, options(450, 48, "streaming:sink=2,window=20"));
  Session all(*model, kept(options(450, 48, "streaming:sink=2,window=20")));
  some.prefill(start);
  const std::vector<float> want = all.prefill(tokens);
  all.truncate(400);
  const std::vector<float> other = all.prefill(rest);
  CHECK(same_bits(some.prefill(rest), other));
  some.truncate(386);  // 64 back
  all.truncate(386);
  const std::vector<Token> tail(tokens.begin() + 386, tokens.end());
  CHECK(same_bits(some.prefill(tail), all.prefill(tail)));
  CHECK_THROWS_WITH_AS(some.truncate(100),
                       "tokens 64 … 99 of layer 0 were dropped, expected none that tokens from 100 on can see: at most "
                       "64 may be taken back, or all; a second prompt must not see further than the first",
                       Error);
  CHECK(some.size() == 450);
  some.truncate(0);
  CHECK(same_bits(some.prefill(tokens), want));

  // A prompt that is interrupted leaves the session as it was.
  some.truncate(0), some.prefill({tokens.begin(), tokens.begin() + 300});
  CHECK_THROWS_AS(some.prefill({tokens.begin() + 300, tokens.end()}, [](Index done, Index) { return done < 140; }),
                  Interrupted);
  CHECK(some.size() == 300);
  all.truncate(0), all.prefill({tokens.begin(), tokens.begin() + 300});
  const std::vector<Token> again(tokens.begin() + 300, tokens.end());
  CHECK(same_bits(some.prefill(again), all.prefill(again)));
}

TEST_CASE("a second prompt must not see further than the first") {
  const std::unique_ptr<Model> model = load(TinyModel(TinySizes{}).file());
  const auto with = [](bool drop) {
    SessionOptions o = options(480, 48, "moa:block=16,sink=16,min_span=32,alpha=-31,beta=0.5");
    o.drop = drop, o.rewind = 1;
    return o;
  };
  Session some(*model, with(true)), all(*model, with(false));
  some.prefill(random_tokens(300)), all.prefill(random_tokens(300));
  // Spans of 300 tokens are 128, those of 480 are 224.
  CHECK_NOTHROW(all.prefill(random_tokens(180)));
  CHECK_THROWS_WITH_AS(
      some.prefill(random_tokens(180)),
      "tokens 64 … 127 of layer 0 were dropped, expected none that tokens from 300 on can see: at most "
      "1 may be taken back, or all; a second prompt must not see further than the first",
      Error);
  CHECK(some.size() == 300);
  CHECK_NOTHROW(some.decode(1));
  SessionOptions o = options(480);
  o.rewind = 0;
  CHECK_THROWS_WITH_AS(Session(*model, o), "rewind = 0, expected >= 1", UsageError);
}

TEST_CASE("bytes keep a model's predictions") {
  for (const TinySizes& sizes : {TinySizes{}, tiny_gemma()}) {
    const TinyModel tiny(sizes);
    const std::unique_ptr<Model> model = load(tiny.file());
    const std::vector<Token> tokens = random_tokens(90);
    const auto want = tiny.logits(tokens);
    const std::vector<float> whole = Session(*model, options(90, 90, "dense", DType::i8)).prefill(tokens);
    CHECK(difference(whole, want.back()) < 3e-2);
    CHECK(difference(whole, want.back()) > 1e-5);  // they are bytes
    const UseThreads use(3);
    Session parts(*model, options(90, 16, "dense", DType::i8));
    parts.prefill({tokens.begin(), tokens.begin() + 80});
    for (size_t i = 80; i < 89; ++i) parts.decode(tokens[i]);
    CHECK(same_bits(parts.decode(tokens[89]), whole));
  }
}
