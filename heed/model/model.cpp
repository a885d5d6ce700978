#include "heed/model/model.h"

#include <set>

#include "heed/model/weights.h"

namespace heed::model {
namespace {

std::vector<float> read_vector(const Gguf& file, const std::string& name, Index size) {
  std::vector<float> values(static_cast<size_t>(size));
  file.tensor(name, {size}).read_row(0, values.data());
  return values;
}

LayerWeights read_layer(const Gguf& file, const ModelInfo& info, Index layer, DType arithmetic, bool keep_file) {
  const auto name = [&](const char* part) { return fmt::format("blk.{}.{}.weight", layer, part); };
  const auto linear = [&](const char* part) { return Linear(*file.find(name(part)), arithmetic, keep_file); };
  const auto norm = [&](const char* part, Index size) { return read_vector(file, name(part), size); };
  LayerWeights w;
  w.attn_norm = norm("attn_norm", info.width);
  w.ffn_norm = norm("ffn_norm", info.width);
  if (info.architecture == "gemma3") {
    w.q_norm = norm("attn_q_norm", info.head_size);
    w.k_norm = norm("attn_k_norm", info.head_size);
    w.post_attn_norm = norm("post_attention_norm", info.width);
    w.post_ffn_norm = norm("post_ffw_norm", info.width);
  }
  w.q = linear("attn_q"), w.k = linear("attn_k"), w.v = linear("attn_v"), w.o = linear("attn_output");
  w.gate = linear("ffn_gate"), w.up = linear("ffn_up"), w.down = linear("ffn_down");
  return w;
}

}  // namespace

void check_tensors(const Gguf& file, const ModelInfo& info) {
  std::set<std::string, std::less<>> known;
  for (const TensorSpec& spec : expected_tensors(info)) {
    file.tensor(spec.name, spec.shape);
    known.insert(spec.name);
  }
  for (const GgufTensor& t : file.tensors())
    if (known.find(t.name) == known.end())
      fail("{}: tensor {} is not supported in {} models", file.name(), t.name, info.architecture);
}

Model::Model() : weights_(std::make_unique<Weights>()) {}
Model::~Model() = default;

const ModelInfo& Model::info() const { return weights_->info; }
const Tokenizer& Model::tokenizer() const { return *weights_->tokenizer; }
DType Model::arithmetic() const { return weights_->arithmetic; }
const std::string& Model::chat_template() const { return weights_->chat_template; }

std::unique_ptr<Model> Model::load(const std::string& path, DType arithmetic) {
  auto file = std::make_unique<Gguf>(Gguf::open(path));
  std::unique_ptr<Model> model = build(*file, arithmetic, true);
  model->weights_->file = std::move(file);
  return model;
}

std::unique_ptr<Model> Model::load(const Gguf& file, DType arithmetic) { return build(file, arithmetic, false); }

std::unique_ptr<Model> Model::build(const Gguf& file, DType arithmetic, bool file_stays) {
  if (arithmetic != DType::f32 && arithmetic != DType::bf16)
    fail_usage("arithmetic = {}, expected f32 or bf16", name_of(arithmetic));
  const ModelInfo info = read_info(file);
  check_tensors(file, info);
  const Index needed = estimate_weight_bytes(file, arithmetic), available = available_memory();
  constexpr Index mib = 1 << 20;
  if (needed > available)
    fail("{}: weights take {} MiB of memory in {}, expected at most the {} MiB that are available", file.name(),
         ceil_div(needed, mib), name_of(arithmetic), available / mib);

  std::unique_ptr<Model> model(new Model);
  Weights& w = *model->weights_;
  w.info = info;
  w.arithmetic = arithmetic;
  w.tokenizer = Tokenizer::make(Vocabulary::from(file));
  w.chat_template = file.text_or("tokenizer.chat_template", "");
  w.gelu = info.architecture == "gemma3";
  w.rope_pairs = info.architecture == "llama" ? RopePairs::adjacent : RopePairs::halves;

  w.embedding = *file.find("token_embd.weight");
  if (!file_stays) {
    w.embedding_bytes.assign(w.embedding.bytes.begin(), w.embedding.bytes.end());
    w.embedding.bytes = w.embedding_bytes;
  }
  w.output_norm = read_vector(file, "output_norm.weight", info.width);
  w.output = Linear(info.tied_output ? w.embedding : *file.find("output.weight"), arithmetic, file_stays);
  for (Index i = 0; i < info.layers; ++i) w.layers.push_back(read_layer(file, info, i, arithmetic, file_stays));
  w.info.weight_bytes = needed;
  return model;
}

}  // namespace heed::model
