// Models on libtorch against f64 equations that share nothing with them: logits, gradients, files.
#include "support/doctest_with_torch.h"

#include <ATen/ops/tensor.h>
#include <c10/core/GradMode.h>

#include <cmath>

#include "heed/nn/gguf.h"
#include "support/cache.h"
#include "support/folder.h"
#include "support/real_models.h"
#include "support/tiny_session.h"
#include "support/torch_models.h"

using namespace heed;
using namespace heed::test;

namespace {

std::vector<float> last_row(const at::Tensor& logits) {
  const at::Tensor row = logits[0][-1].contiguous();
  return {row.const_data_ptr<float>(), row.const_data_ptr<float>() + row.numel()};
}

// Mean loss of tokens[1 …], in f64.
double naive_loss(const TinyModel& tiny, const std::vector<model::Token>& tokens) {
  const auto logits = tiny.logits({tokens.begin(), tokens.end() - 1});
  double loss = 0;
  for (size_t t = 0; t < logits.size(); ++t) {
    double sum = 0;
    for (const double x : logits[t]) sum += std::exp(x);
    loss += std::log(sum) - logits[t][static_cast<size_t>(tokens[t + 1])];
  }
  return loss / static_cast<double>(logits.size());
}

}  // namespace

TEST_CASE("logits are those of the equations, for both architectures") {
  const std::vector<model::Token> tokens = random_tokens(37);
  TinySizes untied;
  untied.tied = false, untied.heads = 4, untied.kv_heads = 1;
  for (const TinySizes& sizes : {TinySizes{}, tiny_gemma(), untied}) {
    const TinyModel tiny(sizes);
    const std::string file = tiny.file();
    const auto model = nn::read_model(parsed(file), {});
    const auto want = tiny.logits({tokens.begin(), tokens.end()});
    const at::Tensor got = model->logits(tensor_of(tokens));
    for (size_t t = 0; t < tokens.size(); ++t) {
      const at::Tensor row = got[0][static_cast<Index>(t)].contiguous();
      CHECK(difference({row.const_data_ptr<float>(), row.const_data_ptr<float>() + row.numel()}, want[t]) < 5e-5);
    }
    model->set_arithmetic(at::kBFloat16);
    CHECK(difference(last_row(model->logits(tensor_of(tokens))), want.back()) < 6e-2);
  }
}

TEST_CASE("gradients are central differences of the equations' loss, for every kind of parameter") {
  const std::vector<model::Token> tokens = random_tokens(15);
  TinySizes gemma = tiny_gemma();
  gemma.layers = 6;  // five local layers and a global one
  for (const TinySizes& sizes : {TinySizes{}, gemma}) {
    TinyModel tiny(sizes);
    const std::string file = tiny.file();
    const auto model = nn::read_model(parsed(file), {});
    const at::Tensor all = tensor_of(tokens);
    const Index n = all.size(1) - 1;
    const at::Tensor loss = model->losses(all.narrow(1, 0, n), all.narrow(1, 1, n)).mean();
    CHECK(loss.item<double>() == doctest::Approx(naive_loss(tiny, tokens)).epsilon(1e-5));
    loss.backward();
    Random random(3);
    Index checked = 0;
    for (const auto& [name, parameter] : nn::parameters_of(*model)) {
      if (name.starts_with("blk.") && !name.starts_with("blk.0.") && !name.starts_with("blk.5.")) continue;
      CAPTURE(name);
      REQUIRE(parameter.grad().defined());
      const double largest = parameter.grad().abs().max().item<double>();
      std::vector<double>& values = tiny.tensors.at(nn::gguf_name(name)).values;
      for (int i = 0; i < 3; ++i) {
        // The second and third: the largest, and of a token that the text holds.
        Index at = random.below(parameter.numel());
        if (i == 1) at = parameter.grad().abs().argmax().item<Index>();
        if (i == 2 && name == "token_embd") at = tokens[3] * sizes.width + 7;
        double& x = values[static_cast<size_t>(at)];
        const double kept = x, step = 1e-4;
        x = kept + step;
        const double up = naive_loss(tiny, tokens);
        x = kept - step;
        const double down = naive_loss(tiny, tokens);
        x = kept;
        const double got = parameter.grad().flatten()[at].item<double>();
        CHECK(std::abs(got - (up - down) / (2 * step)) < 1e-3 * largest);
        ++checked;
      }
    }
    CHECK(checked >= 30);
  }
}

TEST_CASE("a mechanism replaces attention in the layers that name it") {
  const std::vector<model::Token> tokens = random_tokens(50);
  const std::string file = TinyModel(TinySizes{}).file();
  const auto loaded = load(file);
  const auto check = [&](const std::vector<std::string>& mechanisms, const char* call, std::vector<Index> layers) {
    model::SessionOptions o = options(50, 50, call);
    o.use.layers = std::move(layers);
    const std::vector<float> want = model::Session(*loaded, o).prefill(tokens);
    const auto model = nn::read_model(parsed(file), mechanisms);
    CHECK(difference(last_row(model->logits(tensor_of(tokens))), {want.begin(), want.end()}) < 2e-5);
  };
  check({"streaming:sink=1,window=7"}, "streaming:sink=1,window=7", {});
  check({"1=moba:block=8,top_k=2"}, "moba:block=8,top_k=2", {1});
  check({"moba:block=8,top_k=2", "0=dense"}, "moba:block=8,top_k=2", {1});
}

TEST_CASE("written and read again: the same model, in heed's own engine too") {
  const std::vector<model::Token> tokens = random_tokens(60);
  const Folder folder;
  for (const TinySizes& sizes : {TinySizes{}, tiny_gemma()}) {
    const std::string file = TinyModel(sizes).file();
    const model::Gguf source = parsed(file);
    const auto model = nn::read_model(source, {"streaming:sink=1,window=20"});
    nn::write_model(folder / "again.gguf", *model, model::Vocabulary::from(source));
    const model::Gguf again = model::Gguf::open(folder / "again.gguf");
    CHECK(again.tensors().size() == source.tensors().size());
    for (const model::GgufTensor& t : source.tensors())
      CHECK(std::ranges::equal(again.tensor(t.name, t.shape).bytes, t.bytes));
    const std::vector<std::string>& mechanisms = again.texts("heed.mechanisms");
    CHECK(static_cast<int>(mechanisms.size()) == sizes.layers);
    for (size_t i = 0; i < mechanisms.size(); ++i)  // gemma3's own windows stay: all layers but the sixth
      CHECK(mechanisms[i] == (sizes.window > 0 && i != 5 ? "streaming:sink=0,window=9" : "streaming:sink=1,window=20"));
    const auto loaded = model::Model::load(folder / "again.gguf", DType::f32);
    const std::vector<float> want =
        model::Session(*loaded, options(60, 60, "streaming:sink=1,window=20")).prefill(tokens);
    CHECK(difference(last_row(model->logits(tensor_of(tokens))), {want.begin(), want.end()}) < 2e-5);
  }
}

TEST_CASE("what flash-moba's layers learn goes into a calibration, and runs from there") {
  const std::vector<model::Token> tokens = random_tokens(60);
  const Folder folder;
  const std::string file = TinyModel(TinySizes{}).file(), call = "flash-moba:block=8,top_k=3";
  const auto model = nn::read_model(parsed(file), {call}, {.key_conv = 3});
  {
    const c10::NoGradGuard frozen;
    Random random(9);
    for (const auto& [name, parameter] : nn::parameters_of(*model))
      if (name.ends_with("kconv_w"))
        for (Index i = 0; i < parameter.numel(); ++i)
          parameter.data_ptr<float>()[i] = static_cast<float>(random.normal());
  }
  const auto calibration = nn::calibration_of(*model);
  REQUIRE(calibration);
  CHECK(calibration->layers.size() == 2);
  model::write_calibration(folder / "c.safetensors", *calibration);
  nn::write_model(folder / "m.gguf", *model, model::Vocabulary::from(parsed(file)));
  const auto loaded = model::Model::load(folder / "m.gguf", DType::f32);
  model::SessionOptions o = options(60, 60, call);
  o.use.calibration = std::make_shared<model::Calibration>(model::read_calibration(folder / "c.safetensors"));
  const std::vector<float> want = model::Session(*loaded, o).prefill(tokens);
  CHECK(difference(last_row(model->logits(tensor_of(tokens))), {want.begin(), want.end()}) < 2e-5);
  CHECK(!nn::calibration_of(*nn::read_model(parsed(file), {call})));
}

TEST_CASE("files that the engine refuses are refused here") {
  TinyModel tiny(TinySizes{});
  tiny.tensors.erase("blk.1.attn_k.weight");
  CHECK_THROWS_WITH_AS(nn::read_model(parsed(tiny.file()), {}),
                       "tiny.gguf: tensor blk.1.attn_k.weight is missing, expected shape [24, 48]", Error);
}

TEST_CASE("the real models give the engine's logits") {
  for (const char* file : {smollm2, gemma3}) {
    CAPTURE(file);
    const c10::NoGradGuard frozen;
    const model::Model& real = real_model(file, DType::f32);
    const std::vector<model::Token> tokens = bible_tokens(real, 96);
    const std::vector<float> want = model::Session(real, options(96)).prefill(tokens);
    const auto model = nn::read_model(model::Gguf::open(cached(file)), {});
    CHECK(difference(last_row(model->logits(tensor_of(tokens))), {want.begin(), want.end()}) < 2e-4);
  }
}
