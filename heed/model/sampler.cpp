#include "heed/model/sampler.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "heed/base/error.h"

namespace heed::model {
namespace {

// Largest first, ties to the lower id. A NaN ranks below every number.
bool before(const std::vector<float>& logits, Token a, Token b) {
  const float x = logits[static_cast<size_t>(a)], y = logits[static_cast<size_t>(b)];
  if (std::isnan(x) || std::isnan(y)) return std::isnan(x) == std::isnan(y) ? a < b : std::isnan(y);
  return x != y ? x > y : a < b;
}

std::vector<Token> ranked(const std::vector<float>& logits, Index k) {
  std::vector<Token> ids(logits.size());
  std::iota(ids.begin(), ids.end(), 0);
  const auto order = [&](Token a, Token b) { return before(logits, a, b); };
  if (k < static_cast<Index>(ids.size())) {
    std::partial_sort(ids.begin(), ids.begin() + k, ids.end(), order);
    ids.resize(static_cast<size_t>(k));
  } else {
    std::sort(ids.begin(), ids.end(), order);
  }
  return ids;
}

}  // namespace

std::vector<std::pair<Token, float>> top_logits(const std::vector<float>& logits, Index k) {
  std::vector<std::pair<Token, float>> top;
  for (Token id : ranked(logits, std::max<Index>(k, 0))) top.emplace_back(id, logits[static_cast<size_t>(id)]);
  return top;
}

Sampler::Sampler(const SamplerOptions& options) : options_(options), random_(options.seed) {
  const SamplerOptions& o = options_;
  if (!(o.temperature >= 0) || !std::isfinite(o.temperature))
    fail_usage("temperature = {}, expected a number >= 0", o.temperature);
  if (o.top_k < 0) fail_usage("top_k = {}, expected >= 0", o.top_k);
  if (!(o.top_p > 0 && o.top_p <= 1)) fail_usage("top_p = {}, expected above 0, at most 1", o.top_p);
  if (!(o.min_p >= 0 && o.min_p <= 1)) fail_usage("min_p = {}, expected 0 … 1", o.min_p);
}

Token Sampler::next(const std::vector<float>& logits) {
  if (logits.empty()) fail("logits: none, expected at least one");
  const Index all = static_cast<Index>(logits.size());
  if (options_.temperature == 0 || options_.top_k == 1) return ranked(logits, 1).front();

  const std::vector<Token> ids = ranked(logits, options_.top_k == 0 ? all : options_.top_k);
  const double most = logits[static_cast<size_t>(ids.front())];
  // Shares of the most likely token, largest first; the rest follows from their sum.
  std::vector<double> share(ids.size());
  double sum = 0;
  for (size_t i = 0; i < ids.size(); ++i) {
    const double x = logits[static_cast<size_t>(ids[i])];
    share[i] = std::isnan(x) ? 0 : x == most ? 1 : std::exp((x - most) / options_.temperature);
    sum += share[i];
  }
  size_t kept = 0;
  double mass = 0;
  while (kept < ids.size()) {
    mass += share[kept++];
    if (mass >= options_.top_p * sum && options_.top_p < 1) break;
  }
  while (kept > 1 && share[kept - 1] < options_.min_p) mass -= share[--kept];

  double left = random_.uniform() * mass;
  for (size_t i = 0; i < kept; ++i) {
    left -= share[i];
    if (left < 0) return ids[i];
  }
  return ids[kept - 1];
}

}  // namespace heed::model
