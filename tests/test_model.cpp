// Two real models against the figures of an independent forward pass, up to 2048 tokens.

#include <doctest/doctest.h>

#include <cmath>

#include "heed/model/sampler.h"
#include "support/cache.h"
#include "support/cases.h"
#include "support/real_models.h"

using namespace heed;
using namespace heed::model;
using test::bible_nll;
using test::bible_tokens;
using test::real_model;

namespace {

void check_logits(const Model& model, const std::vector<std::pair<Token, double>>& want) {
  SessionOptions options;
  options.context = 512;
  Session session(model, options);
  const auto top = top_logits(session.prefill(bible_tokens(model, 512)), static_cast<Index>(want.size()));
  for (size_t i = 0; i < want.size(); ++i) {
    CHECK(top[i].first == want[i].first);
    CHECK(std::abs(static_cast<double>(top[i].second) - want[i].second) < 2e-3);
  }
}

}  // namespace

TEST_CASE("SmolLM2 in f32") {
  const Model& model = real_model(test::smollm2, DType::f32);
  const ModelInfo& info = model.info();
  CHECK(info.architecture == "llama");
  CHECK(info.layers == 30);
  CHECK(info.head_size == 64);
  CHECK(info.vocabulary == 49152);
  CHECK(info.context == 8192);
  CHECK(info.tied_output);
  CHECK(!model.chat_template().empty());
  CHECK(bible_tokens(model, 12) == std::vector<Token>{788, 260, 3616, 1839, 2312, 260, 10419, 284, 260, 3103, 30, 198});
  check_logits(model, {{6734, 12.460}, {12251, 11.772}, {12687, 10.340}});
  CHECK(std::abs(bible_nll(model, 2048, "dense") - 1.548372) < 2e-4);
}

TEST_CASE("SmolLM2 in bf16 is close") {
  const Model& model = real_model(test::smollm2, DType::bf16);
  CHECK(std::abs(bible_nll(model, 2048, "dense") - 1.548372) < 5e-3);
  CHECK(std::abs(bible_nll(model, 2048, "dense", DType::i8) - 1.548372) < 5e-3);  // keys and values in bytes
}

// Decoding reads the weights as the file has them: in f32 the sums only run in another order; in bf16 they are no
// longer rounded, which brings the logits nearer to those of f32 than reading them would have.
TEST_CASE("SmolLM2 decodes what it would read") {
  const auto distance = [](const std::vector<float>& a, const std::vector<float>& b) {
    double sum = 0;
    for (size_t i = 0; i < a.size(); ++i) sum += std::pow(static_cast<double>(a[i]) - static_cast<double>(b[i]), 2);
    return std::sqrt(sum / static_cast<double>(a.size()));
  };
  std::vector<float> exact;
  for (const DType arithmetic : {DType::f32, DType::bf16}) {
    const Model& model = real_model(test::smollm2, arithmetic);
    const std::vector<Token> tokens = bible_tokens(model, 300);
    SessionOptions options;
    options.context = 300;
    Session whole(model, options), parts(model, options);
    const std::vector<float> read = whole.prefill(tokens);
    parts.prefill({tokens.begin(), tokens.begin() + 200});
    for (size_t i = 200; i < 299; ++i) parts.decode(tokens[i]);
    const std::vector<float>& decoded = parts.decode(tokens[299]);
    if (arithmetic == DType::f32) exact = read;
    const double off = distance(decoded, exact), read_off = distance(read, exact);
    CAPTURE(off);
    CAPTURE(read_off);
    CHECK(off < (arithmetic == DType::f32 ? 2e-4 : read_off));
    CHECK(top_logits(decoded, 1).front().first == top_logits(exact, 1).front().first);
  }
}

TEST_CASE("Gemma 3 in f32") {
  const Model& model = real_model(test::gemma3, DType::f32);
  const ModelInfo& info = model.info();
  CHECK(info.architecture == "gemma3");
  CHECK(info.head_size == 256);
  CHECK(info.vocabulary == 262144);
  CHECK(info.window == 512);
  for (Index i = 0; i < 18; ++i) CHECK(info.local[static_cast<size_t>(i)] == (i != 5 && i != 11 && i != 17));
  CHECK(bible_tokens(model, 8) == std::vector<Token>{2, 902, 506, 6534, 3803, 4464, 506, 20808});
  check_logits(model, {{6049, 36.355}, {2148, 35.111}, {4882, 34.977}});
  CHECK(std::abs(bible_nll(model, 2048, "dense") - 0.900587) < 2e-4);
}
