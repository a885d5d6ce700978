// A language model whose layers attend with mechanisms of your choice, trained by your own loop on libtorch.
//
//   build/bin/example_train book.txt

#include <cstdio>
#include <exception>

#include "heed/base/file.h"
#include "heed/nn/config.h"
#include "heed/nn/gguf.h"
#include "heed/nn/optimizer.h"
#include "heed/nn/text.h"

namespace {

void train(const char* path) {
  using namespace heed;
  model::ModelInfo info;
  info.architecture = "llama", info.name = "example";
  info.layers = 4, info.width = 128, info.ffn = 352, info.heads = 4, info.kv_heads = 2, info.head_size = 32;
  info.vocabulary = 257, info.context = 1024, info.rms_eps = 1e-5, info.rope_base = 1e4;
  info.tied_output = true, info.local.assign(4, false);

  // Three layers choose blocks of keys, the last sees everything.
  const auto mixers = nn::mixers_of({"moba:block=32,top_k=4", "3=dense"}, info);
  nn::LanguageModel model(info, mixers);
  model.initialise(0);
  nn::Optimizer optimizer(nn::parameters_of(model), {.muon = true});

  std::vector<model::Token> bytes;
  for (const char c : read_file(path)) bytes.push_back(static_cast<unsigned char>(c));
  const nn::TrainingText text(std::move(bytes), 0.05, 256, {}, path);

  constexpr Index steps = 100;
  for (Index step = 0; step < steps; ++step) {
    const nn::Windows w = text.batch(0, step, 8);
    const at::Tensor loss = model.losses(w.tokens, w.targets).mean();
    loss.backward();
    optimizer.clip(1);
    optimizer.step(2e-3 * nn::rate_share(step, steps, 10, 0.1));
    if (step % 10 == 9) std::printf("step %3d   loss %.3f\n", static_cast<int>(step + 1), loss.item<double>());
  }
  nn::write_model("example.gguf", model, model::Vocabulary::bytes());
  std::puts("example.gguf");
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) {
    std::fputs("expected one argument, a text\n", stderr);
    return 2;
  }
  try {
    train(argv[1]);
    return 0;
  } catch (const std::exception& e) {
    std::fprintf(stderr, "%s\n", e.what());
    return 1;
  }
}
