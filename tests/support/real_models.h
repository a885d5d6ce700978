// The real models and the text that some tests read, loaded.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "heed/model/model.h"

namespace heed::test {

inline constexpr const char* smollm2 = "smollm2-135m-instruct-q4_1.gguf";
inline constexpr const char* gemma3 = "gemma-3-270m-q4_k_m.gguf";

/// The first `bytes` bytes of the King James Bible, one verse a line.
std::string bible(Index bytes);
/// Loads a model, or gives the one loaded last when it is the same.
const model::Model& real_model(const std::string& file, DType arithmetic);
/// BOS where the model adds one, then the first tokens of the bible: `count` in all.
std::vector<model::Token> bible_tokens(const model::Model& model, Index count);
/// Mean negative log-likelihood of positions 1 … tokens - 1 under a mechanism ("moba:block=64").
double bible_nll(const model::Model& model, Index tokens, const std::string& call, DType kv = DType::bf16);

}  // namespace heed::test
