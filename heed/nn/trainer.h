// A training run: text, model, optimizer, and the step it is at; all of it can be written down and taken up again.
#pragma once

#include <functional>
#include <memory>
#include <string>

#include "heed/nn/config.h"
#include "heed/nn/language_model.h"
#include "heed/nn/optimizer.h"
#include "heed/nn/text.h"

namespace heed::nn {

class Trainer {
 public:
  /// Reads the text and makes (or reads) the model. Throws UsageError for settings, Error for files.
  explicit Trainer(const TrainConfig& config);
  /// Takes a run up where save() left it: with the same text, settings and threads its next steps are the same bit for
  /// bit as if it had never stopped. `change` may alter the settings that the file holds, except the model's own.
  /// Throws Error for a file that is no checkpoint or does not fit.
  static std::unique_ptr<Trainer> resume(const std::string& checkpoint,
                                         const std::function<void(TrainConfig&)>& change = {});

  /// One step; returns the batch's mean loss before it, nats a token. Throws Error, the weights unchanged, when the
  /// loss is not finite.
  double step();
  /// Mean loss over the held-out text, nats a token; NaN when nothing is held out.
  double held_out() const;
  /// What that is taken over. Empty when nothing is held out.
  std::vector<Windows> held_out_windows() const;
  /// The mean loss for every position of a window: [length]. Empty when nothing is held out.
  std::vector<double> held_out_by_position() const;

  /// Steps taken, and the whole run's.
  Index steps_done() const { return step_; }
  Index steps() const { return steps_; }
  Index tokens_per_step() const { return batch_ * length_; }

  /// Weights, momenta, step and settings as one safetensors file, which appears only when it is complete.
  void save(const std::string& path) const;
  /// The model as a GGUF file, and beside it NAME.calibration.safetensors when its mechanisms learned something of
  /// their own (see write_model, which refuses some mechanisms). Returns the files written.
  std::vector<std::string> export_model(const std::string& path) const;

  LanguageModel& model() { return *model_; }
  const Params& settings() const { return settings_; }
  const TrainConfig& config() const { return config_; }

 private:
  TrainConfig config_;
  Params settings_;
  Index steps_, batch_, length_, step_ = 0;
  model::Vocabulary vocabulary_;
  std::string chat_template_;
  std::shared_ptr<LanguageModel> model_;
  std::unique_ptr<TrainingText> text_;
  std::unique_ptr<Optimizer> optimizer_;
};

}  // namespace heed::nn
