// What commands that run a model share: its file, where a mechanism applies, what it is given to read.
#pragma once

#include <CLI/CLI.hpp>

#include <memory>
#include <string>
#include <vector>

#include "cli/options.h"
#include "heed/model/model.h"

namespace heed::cli {

struct ModelOptions {
  std::string path, file, layers, phase = "both", kv = "bf16", dtype = "bf16";
  Index tokens = 0, context = 0, chunk = 512;  // 0: not said
  std::vector<std::string> calibrations;
  MechanismOptions mechanism;

  void add(CLI::App& command, bool several_mechanisms, const std::string& mechanism_help);
  /// Where and how each call applies. Throws UsageError for a calibration that was made for none of them.
  std::vector<model::MechanismUse> uses(const std::vector<MechanismCall>& calls, const model::ModelInfo& info) const;
};

/// A model file that was opened but not loaded: enough to tokenize and to tell what it would take.
class OpenedModel {
 public:
  explicit OpenedModel(const ModelOptions& options);

  const model::ModelInfo& info() const { return info_; }
  const model::Tokenizer& tokenizer() const { return *tokenizer_; }
  const model::Gguf& file() const { return file_; }
  /// --ctx, or the model's; at most that.
  Index context() const { return context_; }

  /// BOS where the model adds one, then the text's ids from number `skip` on: the first --tokens of them, or all.
  /// Throws Error when there are fewer, or more than the context.
  std::vector<model::Token> read(const std::string& text, Index skip = 0) const;
  /// `count` pieces of `length` tokens, each beginning with the BOS where the model adds one, spread evenly over the
  /// text's ids from number `skip` on; they share no token. Throws Error when there are too few.
  std::vector<std::vector<model::Token>> pieces(const std::string& text, Index skip, Index count, Index length) const;

  /// Throws Error, before anything large is allocated, when weights, the KV cache of `tokens` tokens
  /// and `more` bytes exceed the memory available.
  std::unique_ptr<model::Model> load(Index tokens, Index more) const;

 private:
  std::vector<model::Token> ids_from(const std::string& text, Index skip) const;
  std::string text_name() const { return options_.file == "-" ? "standard input" : options_.file; }

  const ModelOptions& options_;
  model::Gguf file_;
  model::ModelInfo info_;
  std::unique_ptr<model::Tokenizer> tokenizer_;
  Index context_;
};

}  // namespace heed::cli
