// Whole models, small and made up: the forward pass against one in f64, and files that must be refused.

#include <doctest/doctest.h>

#include <cmath>
#include <functional>

#include "heed/base/random.h"
#include "heed/kernel/kernels.h"
#include "heed/model/model.h"
#include "support/cases.h"
#include "support/tiny_session.h"

using namespace heed;
using namespace heed::model;
using test::difference;
using test::load;
using test::options;
using test::random_tokens;
using test::tiny_gemma;
using test::TinyModel;
using test::TinySizes;

namespace {

// Prefill of all but the last 3 tokens in chunks of 16, then decode; every set of logits on the way is checked.
void check_against_reference(const TinyModel& tiny, DType arithmetic, double tolerance) {
  const std::unique_ptr<Model> model = load(tiny.file(), arithmetic);
  const std::vector<Token> tokens = random_tokens(45);
  const auto want = tiny.logits(tokens);
  Session session(*model, options(64, 16, "dense", arithmetic));
  CHECK(difference(session.prefill({tokens.begin(), tokens.begin() + 42}), want[41]) < tolerance);
  for (size_t i = 42; i < 45; ++i) CHECK(difference(session.decode(tokens[i]), want[i]) < tolerance);
  CHECK(session.size() == 45);
}

std::string refusal(const std::string& file) {
  try {
    load(file);
  } catch (const Error& e) {
    return e.what();
  }
  return "accepted";
}

// The refusal of a model with one key that is not as it should be.
std::string refusal_with(const TinySizes& sizes, const std::string& key,
                         const std::function<void(test::GgufWriter&)>& write) {
  const TinyModel tiny(sizes);
  test::GgufWriter writer = tiny.metadata({key});
  write(writer);
  tiny.write_tensors(writer);
  return refusal(writer.file());
}

}  // namespace

TEST_CASE("llama: logits equal those of the equations") {
  for (bool tied : {true, false})
    for (bool key_length : {true, false}) {
      TinySizes s;
      s.tied = tied, s.key_length = key_length;
      if (key_length) s.head_size = 16;  // heads · head size need not be the width
      check_against_reference(TinyModel(s), DType::f32, 2e-5);
      check_against_reference(TinyModel(s), DType::bf16, 6e-2);
    }
}

TEST_CASE("gemma3: logits equal those of the equations") {
  for (bool tied : {true, false}) {
    TinySizes s = tiny_gemma();
    s.tied = tied;
    check_against_reference(TinyModel(s), DType::f32, 5e-5);
    check_against_reference(TinyModel(s), DType::bf16, 1e-1);
  }
}

TEST_CASE("weights may have any format") {
  using enum WeightFormat;
  for (WeightFormat format : {f16, q4_0, q4_1, q5_0, q5_1, q8_0, q4_k, q5_k, q6_k, bf16}) {
    TinySizes s;
    s.width = 256, s.ffn = 256, s.heads = 4, s.kv_heads = 4, s.head_size = 64, s.layers = 1;
    s.weights = format;
    CAPTURE(name_of(format));
    check_against_reference(TinyModel(s), DType::f32, 5e-5);
  }
}

TEST_CASE("every instruction set computes the same model") {
  const TinyModel llama{TinySizes{}}, gemma(tiny_gemma());
  for (const std::string& isa : available_isas()) {
    const test::UseIsa use(isa);
    CAPTURE(isa);
    check_against_reference(llama, DType::f32, 2e-5);
    check_against_reference(llama, DType::bf16, 6e-2);
    check_against_reference(gemma, DType::f32, 5e-5);
  }
}

TEST_CASE("chunks, decoding and threads leave every bit as it is") {
  const std::vector<Token> tokens = random_tokens(150);
  for (const TinySizes& sizes : {TinySizes{}, tiny_gemma()})
    for (DType arithmetic : {DType::f32, DType::bf16})
      for (const char* call : {"dense", "streaming:sink=2,window=20"}) {
        const std::unique_ptr<Model> model = load(TinyModel(sizes).file(), arithmetic);
        const std::vector<float> whole = Session(*model, options(150, 512, call, arithmetic)).prefill(tokens);
        for (Index chunk : {9, 64, 149}) {
          const test::UseThreads use(chunk == 64 ? 3 : 1);
          Session session(*model, options(150, chunk, call, arithmetic));
          session.prefill({tokens.begin(), tokens.begin() + 140});
          for (size_t i = 140; i < 149; ++i) session.decode(tokens[i]);
          CHECK_MESSAGE(test::same_bits(session.decode(tokens[149]), whole), sizes.architecture, " ", call, " chunk ",
                        chunk);
        }
      }
}

TEST_CASE("scoring gives -ln p of every token but the first") {
  TinySizes s = tiny_gemma();
  const TinyModel tiny(s);
  const std::unique_ptr<Model> model = load(tiny.file());
  const std::vector<Token> tokens = random_tokens(300);
  const auto logits = tiny.logits(tokens);
  Session session(*model, options(300, 100));
  const std::vector<float> last = session.prefill_keeping_hidden(tokens);
  CHECK(difference(last, logits.back()) < 5e-5);
  const std::vector<double> nll = session.score_hidden();
  REQUIRE(nll.size() == 299);
  for (size_t i = 0; i < nll.size(); ++i) {
    double sum = 0;
    for (double x : logits[i]) sum += std::exp(x);
    CHECK(nll[i] == doctest::Approx(std::log(sum) - logits[i][static_cast<size_t>(tokens[i + 1])]).epsilon(1e-4));
  }
  const test::UseThreads use(5);
  CHECK(session.score_hidden() == nll);
  Session empty(*model, options(300));
  CHECK_THROWS_WITH_AS(empty.score_hidden(), "score: no hidden states, expected a prefill that keeps them before",
                       Error);
}

TEST_CASE("a mechanism acts in its layers and its phase alone") {
  const std::unique_ptr<Model> model = load(TinyModel(TinySizes{}).file());
  const std::vector<Token> tokens = random_tokens(80);
  const auto run = [&](const char* call, std::vector<Index> layers, Phase phase) {
    SessionOptions o = options(90, 40, call);
    o.use.layers = std::move(layers), o.use.phase = phase;
    Session session(*model, o);
    std::vector<float> logits = session.prefill(tokens);
    const std::vector<float>& decoded = session.decode(7);
    logits.insert(logits.end(), decoded.begin(), decoded.end());
    return logits;
  };
  const size_t half = TinyModel::vocabulary;
  const auto first = [&](const std::vector<float>& x) { return std::vector<float>(x.begin(), x.begin() + half); };
  const auto second = [&](const std::vector<float>& x) { return std::vector<float>(x.begin() + half, x.end()); };
  const char* window = "streaming:sink=0,window=3";
  const auto dense = run("dense", {}, Phase::both), all = run(window, {}, Phase::both);
  CHECK(!test::same_bits(first(all), first(dense)));
  CHECK(test::same_bits(run(window, {0, 1}, Phase::both), all));
  const auto one = run(window, {1}, Phase::both);
  CHECK(!test::same_bits(first(one), first(dense)));
  CHECK(!test::same_bits(first(one), first(all)));
  const auto prefill = run(window, {}, Phase::prefill), decode = run(window, {}, Phase::decode);
  CHECK(test::same_bits(first(prefill), first(all)));
  CHECK(!test::same_bits(second(prefill), second(all)));
  CHECK(test::same_bits(first(decode), first(dense)));
  CHECK(!test::same_bits(second(decode), second(dense)));
}

TEST_CASE("stats count the work of the replaced layers") {
  const std::unique_ptr<Model> model = load(TinyModel(tiny_gemma()).file());
  Session session(*model, options(100, 30, "streaming:sink=0,window=10"));
  session.prefill(random_tokens(100));
  // One global layer, two heads: 10 keys a query, fewer for the first nine.
  CHECK(session.stats().attend.pairs == 2 * (100 * 10 - 45));
  CHECK(session.stats().dense_pairs == 2 * (100 * 101 / 2));
  CHECK(session.stats().peak_bytes >= session.stats().kv_bytes + session.stats().scratch_bytes);
  CHECK(session.stats().kv_bytes >= 100 * kv_bytes_per_token(model->info(), DType::f32));
  CHECK(session.stats().attention_s > 0);
  CHECK(session.stats().linear_s > 0);
  session.reset_stats();
  CHECK(session.stats().attend.pairs == 0);
  CHECK(session.stats().linear_s == 0);
}

TEST_CASE("tokens are forgotten by truncating, by errors and by stopping") {
  const std::unique_ptr<Model> model = load(TinyModel(TinySizes{}).file());
  const std::vector<Token> tokens = random_tokens(60);
  Session session(*model, options(60, 20));
  const std::vector<float> want = session.prefill(tokens);
  session.truncate(33);
  CHECK(session.size() == 33);
  CHECK(test::same_bits(session.prefill({tokens.begin() + 33, tokens.end()}), want));
  CHECK_THROWS_WITH_AS(session.truncate(61), "size = 61, expected 0 … 60", Error);

  session.truncate(10);
  Index done = 0;
  CHECK_THROWS_AS(session.prefill({tokens.begin() + 10, tokens.end()},
                                  [&](Index n, Index total) {
                                    CHECK(total == 50);
                                    done = n;
                                    return n < 40;
                                  }),
                  Interrupted);
  CHECK(done == 40);
  CHECK(session.size() == 10);
  CHECK_THROWS_WITH_AS(session.prefill({1, 2, 258}), "token 2 = 258, expected 0 … 257", Error);
  CHECK_THROWS_WITH_AS(session.prefill({-1}), "token 0 = -1, expected 0 … 257", Error);
  CHECK_THROWS_WITH_AS(session.prefill({}), "tokens: none, expected at least one", Error);
  CHECK_THROWS_WITH_AS(session.prefill(random_tokens(51)),
                       "tokens = 51, expected at most 50: the context holds 60 tokens, 10 are taken", Error);
  CHECK(test::same_bits(session.prefill({tokens.begin() + 10, tokens.end()}), want));
  CHECK_THROWS_AS(session.decode(1), Error);
}

TEST_CASE("sessions refuse what they cannot do") {
  const std::unique_ptr<Model> model = load(TinyModel(tiny_gemma()).file());
  const auto refuse = [&](const std::function<void(SessionOptions&)>& change) -> std::string {
    SessionOptions o = options(20);
    change(o);
    try {
      Session session(*model, o);
    } catch (const Error& e) {
      return e.what();
    }
    return "accepted";
  };
  CHECK(refuse([](SessionOptions&) {}) == "accepted");
  CHECK(refuse([](SessionOptions& o) { o.context = 513; }) == "context = 513 tokens, expected 1 … 512, the model's");
  CHECK(refuse([](SessionOptions& o) { o.context = -1; }) == "context = -1 tokens, expected 1 … 512, the model's");
  CHECK(refuse([](SessionOptions& o) { o.chunk = 0; }) == "chunk = 0, expected >= 1");
  CHECK(refuse([](SessionOptions& o) { o.kv = DType::i32; }) == "kv = i32, expected f32, bf16 or i8");
  CHECK(refuse([](SessionOptions& o) { o.use.layers = {7}; }) == "layer = 7, expected 0 … 6");
  CHECK(refuse([](SessionOptions& o) { o.use.layers = {4}; }) ==
        "layer = 4 has the model's own sliding window, expected a layer with global attention");
  CHECK(refuse([](SessionOptions& o) { o.use.call.name = "nonesuch"; }).find("nonesuch") != std::string::npos);
  CHECK(refuse([](SessionOptions& o) { o.use.call = MechanismCall::parse("streaming:window=0"); }).find("window = 0") !=
        std::string::npos);
  for (const Mechanism* m : mechanisms())
    if (!m->not_on_models.empty())
      CHECK(refuse([&](SessionOptions& o) { o.use.call = {m->name, {}}; }).find(m->not_on_models) != std::string::npos);
}

TEST_CASE("layers are named by numbers and ranges") {
  ModelInfo info;
  info.layers = 8;
  info.local.assign(8, false);
  CHECK(parse_layers("0,3,5-6", info) == std::vector<Index>{0, 3, 5, 6});
  CHECK(parse_layers("6-", info) == std::vector<Index>{6, 7});
  CHECK(parse_layers("4,2,2-3", info) == std::vector<Index>{2, 3, 4});
  for (const char* text : {"", ",", "1,", "a", "1-x", "-3", "3-2", "1--2", " 1", "+1", "99999999999999999999", "1-2-3"})
    CHECK_THROWS_AS(parse_layers(text, info), UsageError);
  CHECK_THROWS_WITH_AS(parse_layers("3,8", info), "layers = \"3,8\": no layer 8, expected 0 … 7", UsageError);
  CHECK_THROWS_WITH_AS(parse_layers("9-", info), "layers = \"9-\": no layer 9, expected 0 … 7", UsageError);
  info.local[2] = true;
  CHECK_THROWS_WITH_AS(
      parse_layers("1-3", info),
      "layers = \"1-3\": layer 2 has the model's own sliding window, expected layers with global attention",
      UsageError);
}

TEST_CASE("sizes and memory are known before a model is loaded") {
  TinySizes s;
  s.tied = false;
  const std::string file = TinyModel(s).file();
  const Gguf gguf = Gguf::parse(std::as_bytes(std::span(file)), "tiny.gguf");
  // f32: panels of 64 outputs, the embedding as it is.
  const Index q = 64 * 48, kv = 64 * 48, o = 64 * 48, ffn = 128 * 48, down = 64 * 80;
  const Index layer = q + 2 * kv + o + 2 * ffn + down + 2 * 48;
  CHECK(estimate_weight_bytes(gguf, DType::f32) == 4 * (2 * layer + 320 * 48 + 48 + 258 * 48));
  CHECK(estimate_weight_bytes(gguf, DType::bf16) <= estimate_weight_bytes(gguf, DType::f32));
  const std::unique_ptr<Model> model = load(file);
  CHECK(model->info().weight_bytes == estimate_weight_bytes(gguf, DType::f32));
  CHECK(model->info().head_size == 12);
  CHECK(!model->info().tied_output);
  CHECK(kv_bytes_per_token(model->info(), DType::f32) == 2 * 2 * (12 + 16) * 4);
  CHECK(available_memory() > (Index{1} << 24));
  CHECK_THROWS_AS(load(file, DType::f16), UsageError);
}

TEST_CASE("hostile sizes are refused by name") {
  const auto number = [](const std::string& key, std::uint32_t x) {
    return refusal_with({}, key, [&](test::GgufWriter& w) { w.u32("llama." + key, x); });
  };
  CHECK(number("attention.head_count", 0) == "tiny.gguf: llama.attention.head_count = 0, expected 1 … 16384");
  CHECK(number("attention.head_count", 5) ==
        "tiny.gguf: llama.attention.head_count_kv = 2, expected a divisor of llama.attention.head_count = 5");
  CHECK(number("attention.head_count", 16) == "tiny.gguf: head size = 3, expected an even number up to 1024");
  CHECK(number("attention.head_count_kv", 0) == "tiny.gguf: llama.attention.head_count_kv = 0, expected 1 … 16384");
  CHECK(number("attention.head_count_kv", 3) ==
        "tiny.gguf: llama.attention.head_count_kv = 3, expected a divisor of llama.attention.head_count = 4");
  CHECK(number("block_count", 1000000000) == "tiny.gguf: llama.block_count = 1000000000, expected 1 … 20");
  CHECK(number("block_count", 0) == "tiny.gguf: llama.block_count = 0, expected 1 … 20");
  CHECK(number("embedding_length", 0) == "tiny.gguf: llama.embedding_length = 0, expected 1 … 1048576");
  CHECK(number("embedding_length", 4000000000u) ==
        "tiny.gguf: llama.embedding_length = 4000000000, expected 1 … 1048576");
  CHECK(number("feed_forward_length", 0) == "tiny.gguf: llama.feed_forward_length = 0, expected 1 … 1048576");
  CHECK(number("context_length", 0) == "tiny.gguf: llama.context_length = 0, expected 1 … 1073741824");
  CHECK(number("attention.key_length", 7) == "tiny.gguf: head size = 7, expected an even number up to 1024");
  CHECK(number("attention.value_length", 8) ==
        "tiny.gguf: llama.attention.value_length = 8 is not supported, expected the head size, 12");
  CHECK(number("rope.dimension_count", 6) ==
        "tiny.gguf: llama.rope.dimension_count = 6 is not supported, expected the head size, 12");
  CHECK(number("vocab_size", 300) == "tiny.gguf: llama.vocab_size = 300, expected the number of tokens, 258");
  CHECK(number("feed_forward_length", 81).find("blk.0.ffn_gate.weight") != std::string::npos);
  for (float bad : {0.0f, -1.0f, std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()})
    for (const char* key : {"rope.freq_base", "attention.layer_norm_rms_epsilon"})
      CHECK(refusal_with({}, key, [&](test::GgufWriter& w) {
              w.f32(std::string("llama.") + key, bad);
            }).find(std::string("llama.") + key) != std::string::npos);
}

TEST_CASE("what heed does not do is refused, not passed over") {
  const auto with = [](const std::function<void(test::GgufWriter&)>& write) { return refusal_with({}, "", write); };
  CHECK(refusal_with({}, "architecture", [](test::GgufWriter& w) { w.text("general.architecture", "mamba"); }) ==
        "tiny.gguf: general.architecture = mamba is not supported, expected one of: gemma3, llama");
  CHECK(with([](test::GgufWriter& w) { w.text("llama.rope.scaling.type", "yarn"); }) ==
        "tiny.gguf: llama.rope.scaling.type = yarn is not supported, expected none");
  CHECK(with([](test::GgufWriter& w) { w.text("llama.rope.scaling.type", "none"); }) == "accepted");
  CHECK(with([](test::GgufWriter& w) { w.f32("llama.rope.scaling.factor", 8); }) ==
        "tiny.gguf: llama.rope.scaling.factor = 8 is not supported, expected 1 or no such key");
  CHECK(with([](test::GgufWriter& w) { w.u32("llama.expert_count", 8); }) ==
        "tiny.gguf: llama.expert_count = 8 is not supported, expected 0 or no such key");
  CHECK(with([](test::GgufWriter& w) { w.u32("llama.expert_count", 0); }) == "accepted");
  for (const char* name : {"blk.0.attn_q.bias", "rope_freqs.weight", "blk.1.ffn_gate_exps.weight"})
    CHECK(with([&](test::GgufWriter& w) { w.tensor(name, {48}, WeightFormat::f32, std::vector<double>(48, 1)); }) ==
          std::string("tiny.gguf: tensor ") + name + " is not supported in llama models");
}

TEST_CASE("missing and misshapen tensors are refused by name") {
  for (const TinySizes& sizes : {TinySizes{}, tiny_gemma()}) {
    const TinyModel whole(sizes);
    for (const auto& [name, matrix] : whole.tensors) {
      TinyModel tiny(sizes);
      tiny.tensors.erase(name);
      CHECK(refusal(tiny.file()).find(name) != std::string::npos);
      tiny.tensors[name] = matrix;
      auto& m = tiny.tensors[name];
      const size_t row = static_cast<size_t>(m.shape.back());
      if (m.shape.size() == 1) m.shape[0] += 1, m.written.push_back(0);
      else m.shape[0] += 1, m.written.insert(m.written.end(), row, 0);
      CHECK(refusal(tiny.file()).find(name) != std::string::npos);
    }
  }
}
