// Small models and their tokens, as heed/nn takes them.
#pragma once

#include <ATen/ops/tensor.h>

#include <span>
#include <string>
#include <vector>

#include "heed/model/gguf.h"
#include "heed/model/tokenizer.h"

namespace heed::test {

inline model::Gguf parsed(const std::string& file) {
  return model::Gguf::parse(std::as_bytes(std::span(file)), "tiny.gguf");
}

/// [1, N] i64.
inline at::Tensor tensor_of(const std::vector<model::Token>& tokens) {
  const std::vector<std::int64_t> wide(tokens.begin(), tokens.end());
  return at::tensor(wide, at::kLong).unsqueeze(0);
}

}  // namespace heed::test
