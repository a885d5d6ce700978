// Sessions of small made-up models.
#pragma once

#include <doctest/doctest.h>

#include <cmath>
#include <memory>
#include <span>

#include "heed/base/random.h"
#include "heed/model/model.h"
#include "support/tiny_model.h"

namespace heed::test {

inline std::unique_ptr<model::Model> load(const std::string& file, DType arithmetic = DType::f32) {
  const std::string copy = file;  // gone when the model is used
  return model::Model::load(model::Gguf::parse(std::as_bytes(std::span(copy)), "tiny.gguf"), arithmetic);
}

inline std::vector<model::Token> random_tokens(Index n, std::uint64_t seed = 5) {
  Random random(seed);
  std::vector<model::Token> ids;
  for (Index i = 0; i < n; ++i) ids.push_back(static_cast<model::Token>(random.below(TinyModel::vocabulary)));
  return ids;
}

inline model::SessionOptions options(Index context, Index chunk = 512, const std::string& call = "dense",
                                     DType kv = DType::f32) {
  model::SessionOptions o;
  o.use.call = MechanismCall::parse(call);
  o.context = context, o.chunk = chunk, o.kv = kv;
  return o;
}

// Largest difference in units of the largest reference logit.
inline double difference(const std::vector<float>& got, const std::vector<double>& want) {
  REQUIRE(got.size() == want.size());
  double most = 0, largest = 0;
  for (size_t i = 0; i < got.size(); ++i) {
    const double e = std::abs(static_cast<double>(got[i]) - want[i]);
    most = std::isnan(e) ? 1e300 : std::max(most, e);
    largest = std::max(largest, std::abs(want[i]));
  }
  return most / largest;
}

inline TinySizes tiny_gemma() {
  TinySizes s;
  s.architecture = "gemma3";
  s.layers = 7, s.width = 40, s.heads = 2, s.kv_heads = 1, s.head_size = 24;
  s.window = 9, s.key_length = true, s.rope_base = 1e6;
  return s;
}

}  // namespace heed::test
