// One document under several mechanisms: time, work, perplexity, and whether anything was forgotten.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "heed/model/model.h"

namespace heed::model {

struct PasskeyResult {
  Index length = 0;   // tokens of the whole prompt
  double depth = 0;   // 0 … 1
  std::uint64_t seed = 0;
  std::string key, answer;  // five digits; what the model said
  bool found = false;       // the next five greedy tokens are the five digits, in order
};

struct CopyResult {
  Index gap = 0;
  std::uint64_t seed = 0;
  double nll_first = 0, nll_second = 0;  // nats a token over tokens 1 … 199 of each copy
};

/// One mechanism's row of the comparison.
struct CompareRow {
  MechanismCall call;
  Index tokens = 0;
  double nll = 0, ppl = 0;              // nll: mean over positions 1 … tokens-1
  double prefill_s = 0, score_s = 0, tokens_per_s = 0;
  double attention_s = 0, linear_s = 0, plan_s = 0;
  double density = 1;
  Index peak_bytes = 0;                 // KV, scratch and plans; weights apart
  std::vector<double> nll_by_position;  // [tokens-1]; what the report's curve is drawn from
  std::vector<PasskeyResult> passkey;
  std::vector<CopyResult> copy;
};

struct CompareOptions {
  std::vector<MechanismUse> uses;  // in the order of the table
  bool perplexity = true, passkey = false, copy = false;
  Index chunk = 512;
  DType kv = DType::bf16;
  std::vector<Index> passkey_lengths;   // tokens; default {min(4000, tokens)}
  std::vector<double> passkey_depths{0.1, 0.5, 0.9};
  std::vector<Index> copy_gaps{1000};
  std::vector<std::uint64_t> seeds{0};
  /// What is being done, for a progress line: ("moba:…", "reading", done, total). False stops.
  std::function<bool(const std::string& mechanism, const std::string& step, Index done, Index total)> progress;
  /// Sees the plans while the document is read.
  std::function<void(size_t use, Index first_token, Index layer, const Plan&)> observe;
};

/// Reads the first tokens under each mechanism in turn. `document` is the text the tasks cut their
/// filler from; tokens are its ids, BOS included where the model adds one.
std::vector<CompareRow> compare(const Model& model, const std::vector<Token>& tokens, const std::string& document,
                                const CompareOptions& options);

/// The pass key prompt as ids, about `length` tokens long, with `key` hidden at `depth` of the filler.
std::vector<Token> passkey_prompt(const Model& model, const std::string& document, Index length, double depth,
                                  const std::string& key);

}  // namespace heed::model
