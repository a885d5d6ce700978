// What a loaded model holds; sessions read it, nothing changes it.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "heed/model/linear.h"
#include "heed/model/model.h"
#include "heed/model/rope.h"

namespace heed::model {

/// Norm weights are f32 [width] (q_norm, k_norm: [head_size]); empty where the architecture has none.
struct LayerWeights {
  std::vector<float> attn_norm, ffn_norm, post_attn_norm, post_ffn_norm, q_norm, k_norm;
  Linear q, k, v, o;        // [heads·D, width], [kv_heads·D, width] twice, [width, heads·D]
  Linear gate, up, down;    // [ffn, width] twice, [width, ffn]
};

struct Model::Weights {
  ModelInfo info;
  DType arithmetic = DType::f32;
  RopePairs rope_pairs = RopePairs::halves;
  bool gelu = false;  // the gate's activation: tanh-GELU, else SiLU
  std::unique_ptr<Tokenizer> tokenizer;
  std::string chat_template;

  // Embedding rows are read in the file's own format: out of the mapping, or out of a copy.
  std::unique_ptr<Gguf> file;
  std::vector<std::byte> embedding_bytes;
  GgufTensor embedding;  // [vocabulary, width]

  std::vector<LayerWeights> layers;
  std::vector<float> output_norm;
  Linear output;  // [vocabulary, width], tied or not
};

/// Sizes and constants from the metadata, each checked; throws Error naming the key. Also refuses
/// what a file of these architectures may ask for and heed does not do.
ModelInfo read_info(const Gguf& file);

/// Names and shapes of every tensor that such a model has.
struct TensorSpec {
  std::string name;
  Shape shape;
};
std::vector<TensorSpec> expected_tensors(const ModelInfo& info);
/// Throws Error when one of them is missing or misshapen, and for any other tensor: a bias or a table of rope factors
/// that was passed over would give a model that runs and is wrong.
void check_tensors(const Gguf& file, const ModelInfo& info);

}  // namespace heed::model
