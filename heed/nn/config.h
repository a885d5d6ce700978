// What a training run is made of: a small JSON file, whose every setting may be said on the command line instead.
#pragma once

#include <string>
#include <vector>

#include "heed/mechanism/mechanism.h"
#include "heed/model/model.h"

namespace heed::nn {

/// As written, not checked yet.
struct TrainConfig {
  std::string file;                 // the text
  std::string from;                 // a GGUF model to go on training, or "": a new one
  std::vector<std::string> mechanisms;  // "[LAYERS=]MECHANISM", a later one wins; layers that none names are dense
  ParamTexts settings;              // by the names of train_settings()
};

/// Every setting, with its default, range and meaning.
const std::vector<ParamSpec>& train_settings();
/// Checked, defaults filled in. Throws UsageError such as "train: steps = 0, expected >= 1".
Params settings_of(const TrainConfig& config);

/// {"file": …, "from": …, "mechanism": "M" or ["M", …], and settings as numbers, booleans or texts}. `name` stands for
/// the file in messages. Throws UsageError for text that is no such object; what settings say is checked by
/// settings_of().
TrainConfig parse_config(const std::string& json, const std::string& name);
/// The text that parse_config() reads back as `config`.
std::string json_of(const TrainConfig& config);
/// Sets `name`, whatever stood there before.
void set(ParamTexts& settings, const std::string& name, const std::string& value);

/// The mechanism of every layer. A layer with the model's own sliding window has that as a `streaming` without sinks.
/// Throws UsageError for layers that parse_layers() refuses and for what check_trains() refuses.
std::vector<MechanismCall> mixers_of(const std::vector<std::string>& texts, const model::ModelInfo& info);
/// Throws UsageError for a mechanism that a causal language model (or, not causal, a model of images) cannot be trained
/// with, saying why, and for unknown or misspelt parameters.
void check_trains(const MechanismCall& call, bool causal = true);

/// Why `heed run` could not compute what a model with these layers computes, or "": a GGUF file has no place for what
/// makes them.
std::string why_not_exported(const std::vector<MechanismCall>& mixers);

/// The sizes of a new model: architecture llama, byte-level vocabulary. Throws UsageError for sizes that do not fit
/// each other.
model::ModelInfo info_of(const Params& settings);

}  // namespace heed::nn
