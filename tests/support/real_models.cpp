#include "support/real_models.h"

#include <algorithm>
#include <fstream>
#include <numeric>
#include <stdexcept>

#include "support/cache.h"

namespace heed::test {
std::string bible(Index bytes) {
  std::string text(static_cast<size_t>(bytes), 0);
  std::ifstream file(cached("bible-kjv.txt"), std::ios::binary);
  if (!file.read(text.data(), bytes)) throw std::runtime_error("bible-kjv.txt is too short");
  return text;
}

const model::Model& real_model(const std::string& file, DType arithmetic) {
  static std::unique_ptr<model::Model> loaded;
  static std::string held;
  const std::string wanted = file + " " + std::string(name_of(arithmetic));
  if (held != wanted) {
    loaded.reset();
    held.clear();
    loaded = model::Model::load(cached(file), arithmetic);
    held = wanted;
  }
  return *loaded;
}

std::vector<model::Token> bible_tokens(const model::Model& model, Index count) {
  std::vector<model::Token> ids;
  if (const auto bos = model.tokenizer().bos()) ids.push_back(*bos);
  // No token of these models is worth more than six bytes of this text on average.
  const std::string text = bible(std::min<Index>(300725, 6 * count + 100));
  const std::vector<model::Token> rest = model.tokenizer().encode(text, false);
  ids.insert(ids.end(), rest.begin(), rest.end());
  if (static_cast<Index>(ids.size()) < count) throw std::runtime_error("the bible is too short");
  ids.resize(static_cast<size_t>(count));
  return ids;
}

double bible_nll(const model::Model& model, Index tokens, const std::string& call, DType kv) {
  model::SessionOptions options;
  options.use.call = MechanismCall::parse(call);
  options.context = tokens, options.kv = kv;
  model::Session session(model, options);
  session.prefill_keeping_hidden(bible_tokens(model, tokens));
  const std::vector<double> nll = session.score_hidden();
  return std::accumulate(nll.begin(), nll.end(), 0.0) / static_cast<double>(nll.size());
}

}  // namespace heed::test
