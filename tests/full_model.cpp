// Two real models on long texts: every figure of the independent forward pass, the mechanisms put
// into trained models, and whether keys and passages are found again.

#include <doctest/doctest.h>

#include <cmath>

#include "heed/model/compare.h"
#include "support/cache.h"
#include "support/real_models.h"

using namespace heed;
using namespace heed::model;
using test::bible_nll;
using test::real_model;

namespace {

struct Figure {
  Index tokens;
  const char* call;
  double nll;
};

void check_figures(const char* file, DType arithmetic, const std::vector<Figure>& figures, double dense,
                   double chosen) {
  const Model& model = real_model(file, arithmetic);
  for (const Figure& f : figures) {
    const double nll = bible_nll(model, f.tokens, f.call);
    const bool selects = std::string(f.call).rfind("moba", 0) == 0;
    CHECK_MESSAGE(std::abs(nll - f.nll) < (selects ? chosen : dense), file, " ", name_of(arithmetic), " ", f.call, " ",
                  f.tokens, " tokens: ", nll, ", expected ", f.nll);
  }
}

const std::vector<Figure> smollm2_dense{
    {2048, "dense", 1.548372}, {4096, "dense", 1.715510}, {8192, "dense", 1.909715}};
const std::vector<Figure> gemma3_dense{{2048, "dense", 0.900587}, {4096, "dense", 1.326678}, {8192, "dense", 1.752824}};
const std::vector<Figure> smollm2_plugged{{4096, "streaming:sink=4,window=512", 1.766},
                                          {4096, "moba:block=64,top_k=8", 2.471},
                                          {4096, "moba:block=128,top_k=4", 2.542},
                                          {4096, "moba:block=64,top_k=8,sink=4", 1.770},
                                          {4096, "moba:block=64,top_k=8,sink=64", 1.749}};
const std::vector<Figure> gemma3_plugged{{4096, "streaming:sink=4,window=512", 1.3227},
                                         {4096, "moba:block=64,top_k=8", 1.554}};

}  // namespace

TEST_CASE("SmolLM2, dense") {
  check_figures(test::smollm2, DType::f32, smollm2_dense, 2e-4, 2e-4);
  check_figures(test::smollm2, DType::bf16, smollm2_dense, 5e-3, 5e-3);
}

TEST_CASE("SmolLM2 with other mechanisms in every layer") {
  check_figures(test::smollm2, DType::f32, smollm2_plugged, 1e-3, 1e-3);
  check_figures(test::smollm2, DType::bf16, smollm2_plugged, 5e-3, 2e-2);
}

TEST_CASE("Gemma 3, dense") {
  check_figures(test::gemma3, DType::f32, gemma3_dense, 2e-4, 2e-4);
  check_figures(test::gemma3, DType::f32, {{16384, "dense", 2.063451}}, 2e-4, 2e-4);
  check_figures(test::gemma3, DType::bf16, gemma3_dense, 5e-3, 5e-3);
}

TEST_CASE("Gemma 3 with other mechanisms in its global layers") {
  check_figures(test::gemma3, DType::f32, gemma3_plugged, 1e-3, 1e-3);
  check_figures(test::gemma3, DType::bf16, gemma3_plugged, 5e-3, 2e-2);
}

TEST_CASE("dense attention finds the key and copies the passage, a window does not reach them") {
  for (const char* file : {test::smollm2, test::gemma3}) {
    const Model& model = real_model(file, DType::bf16);
    CompareOptions options;
    options.uses.resize(2);
    options.uses[1].call = MechanismCall::parse("streaming:sink=4,window=512");
    options.perplexity = false, options.passkey = true, options.copy = true;
    options.passkey_lengths = {2000};
    options.copy_gaps = {2000};
    const std::vector<CompareRow> rows = compare(model, test::bible_tokens(model, 600), test::bible(300725), options);
    Index dense = 0, window = 0;
    for (const PasskeyResult& r : rows[0].passkey) dense += r.found;
    for (const PasskeyResult& r : rows[1].passkey) window += r.found && r.depth < 0.8;
    CHECK(dense == 3);
    CHECK(window == 0);
    CHECK(rows[0].copy[0].nll_second < rows[0].copy[0].nll_first - 1);
    CHECK(rows[1].copy[0].nll_second > rows[0].copy[0].nll_second + 1);
  }
}
