// Pieces that several commands' options share.
#pragma once

#include <CLI/CLI.hpp>

#include <nlohmann/json.hpp>
#include <string>
#include <utility>
#include <vector>

#include "heed/mechanism/mechanism.h"

namespace heed::cli {

using Json = nlohmann::ordered_json;

/// Validators whose refusals read "--threads: 0, expected an integer 1 … 4096".
CLI::Validator whole_number(Index least, Index most);
CLI::Validator whole_number(Index least);
CLI::Validator real_number(double least, double most);
CLI::Validator one_of(std::vector<std::string> names);

/// "4000,7000" as numbers. Throws UsageError naming the option.
std::vector<Index> whole_numbers(const std::string& option, const std::string& text, Index least, Index most);
std::vector<double> real_numbers(const std::string& option, const std::string& text, double least, double most);
/// "a,b" taken apart at the commas.
std::vector<std::string> comma_parts(const std::string& text);

/// "f32", "bf16", or "q8_0": i8 with scales.
DType dtype_named(const std::string& name);

/// "p=v" of --set taken apart. Throws UsageError for text that is not of that form.
std::pair<std::string, std::string> setting_of(const std::string& text);

/// --mechanism M and --set p=v of a command that runs one mechanism, or several.
struct MechanismOptions {
  std::vector<std::string> texts, settings;
  /// several: --mechanism may be repeated.
  void add(CLI::App& command, bool several, const std::string& help);
  /// What was named, checked as far as names and parameters go; `otherwise` where nothing was.
  std::vector<MechanismCall> calls(const std::vector<std::string>& otherwise) const;
};

/// Every parameter with its value, as numbers, booleans and texts.
Json params_json(const MechanismCall& call);
/// Text for a terminal or a file, ending in a newline; what is not UTF-8 is replaced.
std::string json_text(const Json& json);

/// The processor's name.
std::string machine_name();

}  // namespace heed::cli
