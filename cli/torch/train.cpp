// heed train: a small language model learns from a text.

#include <ATen/Parallel.h>
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <cmath>
#include <filesystem>
#include <map>
#include <memory>

#include "cli/interrupt.h"
#include "cli/options.h"
#include "cli/terminal.h"
#include "cli/torch/commands.h"
#include "heed/base/clock.h"
#include "heed/base/file.h"
#include "heed/base/threads.h"
#include "heed/nn/trainer.h"

namespace heed::cli {
namespace {

struct Options {
  std::string config, resume, out, file, from;
  std::vector<std::string> mechanisms;
  std::map<std::string, std::string> settings;  // by name, those that were given
  bool json = false;

  // What the command line says over what a file says.
  void change(nn::TrainConfig& c) const {
    if (!file.empty()) c.file = file;
    if (!from.empty()) c.from = from;
    if (!mechanisms.empty()) c.mechanisms = mechanisms;
    for (const auto& [name, value] : settings) nn::set(c.settings, name, value);
  }
};

std::string checkpoint_in(const std::string& folder) { return folder + "/checkpoint.safetensors"; }

std::unique_ptr<nn::Trainer> open(const Options& options) {
  if (!options.resume.empty()) {
    if (!options.config.empty()) fail_usage("train: --config, expected only without --resume");
    if (!options.out.empty()) fail_usage("train: --out, expected only without --resume");
    return nn::Trainer::resume(checkpoint_in(options.resume), [&](nn::TrainConfig& c) { options.change(c); });
  }
  if (options.out.empty()) fail_usage("train: --out is missing, expected a folder for checkpoints and the model");
  nn::TrainConfig config;
  if (!options.config.empty()) config = nn::parse_config(read_file(options.config), options.config);
  options.change(config);
  if (std::filesystem::exists(checkpoint_in(options.out)))
    fail("{} is there already, expected --resume {} or another folder", checkpoint_in(options.out), options.out);
  auto trainer = std::make_unique<nn::Trainer>(config);
  std::error_code error;
  std::filesystem::create_directories(options.out, error);
  if (error) fail("{}: cannot be made: {}", options.out, error.message());
  return trainer;
}

// What has happened since the last report.
struct Lately {
  double loss = 0, seconds = 0;
  Index steps = 0;
  double mean() const { return loss / static_cast<double>(steps); }
  Index rate(Index tokens) const { return std::llround(static_cast<double>(steps * tokens) / seconds); }
};

void report(const Options& options, const nn::Trainer& trainer, const Lately& lately, double held_out) {
  const Index step = trainer.steps_done(), rate = lately.rate(trainer.tokens_per_step());
  if (options.json) {
    Json line{{"step", step}, {"loss", lately.mean()}, {"held_out", nullptr}, {"tokens_per_s", rate}};
    if (std::isfinite(held_out)) line["held_out"] = held_out;
    print(line.dump() + "\n");
  } else {
    const std::string held = std::isfinite(held_out) ? fmt::format("   held out {:.4f}", held_out) : "";
    print(fmt::format("step {:>6}   loss {:.4f}{}   {:>7} tokens/s\n", count_text(step), lately.mean(), held,
                      count_text(rate)));
  }
  flush_output();
}

// Trains to the end, or to a signal; the checkpoint holds where that was.
void train(const Options& options, nn::Trainer& trainer, const std::string& folder) {
  const Index steps = trainer.steps(), eval_every = trainer.settings().integer("eval_every"),
              save_every = trainer.settings().integer("save_every");
  const std::string checkpoint = checkpoint_in(folder);
  const HoldInterrupts hold;
  ProgressLine progress;
  Lately lately;
  while (trainer.steps_done() < steps && interrupted() == 0) {
    const double start = seconds_now();
    const double loss = trainer.step();
    lately.loss += loss, lately.seconds += seconds_now() - start, ++lately.steps;
    const Index done = trainer.steps_done();
    progress.show(fmt::format("loss {:.3f}  {} tokens/s", loss, count_text(lately.rate(trainer.tokens_per_step()))),
                  done, steps);
    if (done % eval_every == 0 || done == steps) {
      const double held_out = trainer.held_out();
      progress.clear();
      report(options, trainer, lately, held_out);
      lately = {};
    }
    if (done % save_every == 0 && done < steps) trainer.save(checkpoint);
  }
  progress.clear();
  trainer.save(checkpoint);
  if (trainer.steps_done() == steps) return;
  if (!options.json)
    print(fmt::format("stopped after step {}: heed train --resume {} goes on\n", trainer.steps_done(), folder));
  flush_output();
  stop_if_interrupted();
}

void train_model(const Options& options) {
  at::set_num_threads(threads());
  const std::unique_ptr<nn::Trainer> trainer = open(options);
  const std::string& folder = options.resume.empty() ? options.out : options.resume;
  Index parameters = 0;
  for (const auto& [name, parameter] : nn::parameters_of(trainer->model())) parameters += parameter.numel();
  if (!options.json)
    print(fmt::format("{} parameters, {} tokens a step\n", count_text(parameters),
                      count_text(trainer->tokens_per_step())));
  train(options, *trainer, folder);
  const std::string why_not = nn::why_not_exported(trainer->model().mixers());
  if (!why_not.empty() && !options.json) print(fmt::format("no model.gguf: {}\n", why_not));
  const std::vector<std::string> files =
      why_not.empty() ? trainer->export_model(folder + "/model.gguf") : std::vector<std::string>{checkpoint_in(folder)};
  if (options.json) print(Json{{"files", files}}.dump() + "\n");
  else print(fmt::format("{}\n", fmt::join(files, ", ")));
}

}  // namespace

void add_train(CLI::App& app, Job& job) {
  CLI::App* command = app.add_subcommand("train", "Train a small language model with any mechanism on a text");
  const auto options = std::make_shared<Options>();
  command->add_option("--config", options->config, "A JSON file with settings; options here override it")
      ->type_name("F");
  command->add_option("--out", options->out, "The folder for checkpoint.safetensors and model.gguf")->type_name("DIR");
  command
      ->add_option("--resume", options->resume,
                   "Go on with the run whose checkpoint is in this folder; the same settings give the same bits as "
                   "without a stop")
      ->type_name("DIR");
  command->add_option("--file", options->file, "The text, read byte for byte")->type_name("F");
  command->add_option("--from", options->from, "Go on training this GGUF model, with its tokenizer")
      ->type_name("MODEL");
  command
      ->add_option("--mechanism", options->mechanisms,
                   "The attention of every layer, or of some: M or LAYERS=M as in 0-2=moba:block=64; may be repeated, "
                   "later ones win [dense]")
      ->type_name("M")
      ->allow_extra_args(false)
      ->take_all();
  for (const ParamSpec& spec : nn::train_settings()) {
    std::string flag = "--" + spec.name;
    std::replace(flag.begin() + 2, flag.end(), '_', '-');
    std::string help = spec.help;
    help[0] = static_cast<char>(std::toupper(static_cast<unsigned char>(help[0])));
    const char* kind = spec.kind == ParamKind::integer ? "N" : spec.kind == ParamKind::number ? "X" : "W";
    command
        ->add_option_function<std::string>(
            flag, [options, name = spec.name](const std::string& text) { options->settings[name] = text; }, help)
        ->type_name(kind)
        ->default_str(spec.fallback);
  }
  command->add_flag("--json", options->json, "Print every report as one object a line");
  command->callback([&job, options] { job = [options] { train_model(*options); }; });
  command->footer(
      "Examples:\n"
      "  heed train --file book.txt --out small --steps 500\n"
      "  heed train --file book.txt --out sparse --length 2048 --mechanism moba:block=64,top_k=4 --mechanism 5=dense\n"
      "  heed train --resume sparse\n"
      "  heed run sparse/model.gguf --prompt 'In the beginning' --mechanism moba:block=64,top_k=4\n"
      "A configuration is an object with the same names: {\"file\": \"book.txt\", \"steps\": 500, \"mechanism\": "
      "[\"dense\"], \"kv_heads\": 2}.");
}

}  // namespace heed::cli
