// heed run: a model reads a prompt and goes on.

#include <fmt/format.h>

#include <limits>
#include <memory>

#include "cli/commands.h"
#include "cli/interrupt.h"
#include "cli/models.h"
#include "cli/terminal.h"
#include "cli/utf8.h"
#include "heed/base/clock.h"
#include "heed/base/file.h"
#include "heed/model/chat.h"
#include "heed/model/sampler.h"

namespace heed::cli {
namespace {

using model::Token;

struct Options {
  ModelOptions model;
  std::string prompt, chat = "auto";
  bool has_prompt = false, json = false;
  Index count = 64, logits = 0;
  model::SamplerOptions sampling;
};

// Document, empty line, prompt.
std::string joined(std::string document, const std::string& prompt) {
  if (document.empty()) return prompt;
  if (document.back() != '\n') document += '\n';
  return document + '\n' + prompt;
}

// What the model is fed: one turn of its chat template, or the text itself after BOS.
std::vector<Token> prompt_ids(const Options& options, const OpenedModel& opened) {
  const model::Tokenizer& tokenizer = opened.tokenizer();
  const auto bos = tokenizer.bos();
  std::string text = options.model.file.empty() ? "" : read_file(options.model.file);
  if (options.model.tokens > 0) {
    const std::vector<Token> ids = opened.read(text);
    if (!options.has_prompt && options.chat == "off") return ids;
    // The same document, cut as text: a turn is tokenized as a whole.
    Utf8Stream whole;
    text = whole.take(tokenizer.decode(std::vector<Token>(ids.begin() + (bos ? 1 : 0), ids.end())));
  }
  if (options.has_prompt) text = joined(std::move(text), options.prompt);

  std::vector<Token> ids;
  const model::ChatTemplate chat = model::ChatTemplate::from(opened.file());
  if (options.chat == "auto" && chat.available()) ids = chat.encode(tokenizer, {{"user", text}}, true);
  else ids = tokenizer.encode(text, false);
  if (bos) ids.insert(ids.begin(), *bos);
  if (ids.empty()) fail("run: the prompt is empty, expected at least one token");
  return ids;
}

void print_logits(const Options& options, const OpenedModel& opened, const std::vector<Token>& ids,
                  const std::vector<float>& logits) {
  const auto top = model::top_logits(logits, options.logits);
  if (options.json) {
    Json list = Json::array();
    for (const auto& [id, logit] : top) list.push_back({id, logit});
    print(Json{{"ids", ids}, {"logits", list}}.dump() + "\n");
    return;
  }
  std::vector<std::vector<Cell>> rows{{{"id"}, {"logit"}, {"token"}}};
  for (const auto& [id, logit] : top)
    rows.push_back({{fmt::format("{}", id)},
                    {fmt::format("{:.4f}", logit)},
                    {Json(valid_utf8(opened.tokenizer().decode(id, true))).dump()}});
  print(table(rows, 0));
}

// Streams at most `most` tokens; returns how many there were.
Index generate(const OpenedModel& opened, model::Session& session, model::Sampler& sampler,
               const std::vector<float>* logits, Index most) {
  Utf8Stream text;
  Index count = 0;
  while (count < most && interrupted() == 0) {
    const Token next = sampler.next(*logits);
    if (opened.tokenizer().ends_text(next)) break;
    ++count;
    print(text.take(opened.tokenizer().decode(next)));
    flush_output();
    if (count < most) logits = &session.decode(next);
  }
  print(text.rest() + "\n");
  flush_output();
  return count;
}

void say_rates(Index read, double read_s, Index written, double written_s) {
  const auto rate = [](Index tokens, double s) {
    return s > 0 ? fmt::format("{:.1f} tokens/s", static_cast<double>(tokens) / s) : "-";
  };
  fmt::print(stderr, "prefill: {} tokens in {}, {}\n", count_text(read), seconds_text(read_s), rate(read, read_s));
  if (written > 0)
    fmt::print(stderr, "decode: {} tokens in {}, {}\n", count_text(written), seconds_text(written_s),
               rate(written, written_s));
}

void say_memory(const ModelOptions& options, const model::SessionStats& stats) {
  const bool wide = options.dtype == "f32" && options.kv == "bf16";
  fmt::print(stderr, "memory: {} of keys and values in {}; at most {}, weights apart\n", bytes_text(stats.kv_bytes),
             wide ? "f32" : options.kv, bytes_text(stats.peak_bytes));
}

void run_model(const Options& options) {
  if (options.model.file.empty() && !options.has_prompt)
    fail_usage("run: nothing to read, expected --prompt or --file");
  if (options.model.file.empty() && options.model.tokens > 0)
    fail_usage("run: --tokens = {}, expected only with --file", options.model.tokens);
  if (options.json && options.logits == 0) fail_usage("run: --json, expected only with --logits");
  const MechanismCall call = options.model.mechanism.calls({"dense"}).front();
  model::Sampler sampler(options.sampling);

  const OpenedModel opened(options.model);
  const std::vector<Token> ids = prompt_ids(options, opened);
  const Index length = static_cast<Index>(ids.size());
  if (length > opened.context())
    fail("run: the prompt holds {} tokens, expected at most the context, {}", length, opened.context());
  const Index context =
      options.model.context > 0 ? options.model.context : std::min(opened.context(), length + options.count);
  const model::MechanismUse use = options.model.uses({call}, opened.info()).front();
  const auto loaded = opened.load(context, 0);
  model::Session session(
      *loaded, {.use = use, .context = context, .chunk = options.model.chunk, .kv = dtype_named(options.model.kv)});

  const HoldInterrupts hold;
  ProgressLine progress;
  const double start = seconds_now();
  const std::vector<float>& logits = session.prefill(ids, [&](Index done, Index total) {
    progress.show("reading", done, total);
    return interrupted() == 0;
  });
  const double prefill_s = seconds_now() - start;
  progress.clear();
  if (options.logits > 0) {
    print_logits(options, opened, ids, logits);
    return;
  }
  // The token that the last prompt position gives needs no room of its own.
  const double decode_start = seconds_now();
  const Index written = generate(opened, session, sampler, &logits, std::min(options.count, context - length + 1));
  say_rates(length, prefill_s, written, seconds_now() - decode_start);
  say_memory(options.model, session.stats());
}

}  // namespace

void add_run(CLI::App& app, Job& job) {
  CLI::App* command = app.add_subcommand("run", "Let a model answer a prompt, or go on with a document");
  const auto options = std::make_shared<Options>();
  options->model.add(*command, false, "The attention mechanism: NAME or NAME:parameter=value,… [dense]");
  const double huge = std::numeric_limits<double>::max();
  CLI::Option* prompt = command
                            ->add_option("--prompt", options->prompt,
                                         "The prompt; with --file it follows the document after an empty line")
                            ->type_name("T");
  command->add_option("-n", options->count, "Most tokens to write")
      ->check(whole_number(0, 1 << 30))
      ->type_name("N")
      ->capture_default_str();
  command->add_option("--chat", options->chat, "auto: in the model's chat template, if it has one; off: the bare text")
      ->check(one_of({"auto", "off"}))
      ->type_name("WHEN")
      ->capture_default_str();
  command->add_option("--temp", options->sampling.temperature, "Temperature; 0 takes the likeliest token")
      ->check(real_number(0, huge))
      ->type_name("X")
      ->capture_default_str();
  command->add_option("--top-k", options->sampling.top_k, "Draw among the k likeliest tokens; 0: among all")
      ->check(whole_number(0))
      ->type_name("K")
      ->capture_default_str();
  command
      ->add_option("--top-p", options->sampling.top_p,
                   "Draw among the likeliest tokens that together have this probability")
      ->check(real_number(0, 1))
      ->type_name("X")
      ->capture_default_str();
  command
      ->add_option("--min-p", options->sampling.min_p,
                   "Draw among tokens at least this share as likely as the likeliest")
      ->check(real_number(0, 1))
      ->type_name("X")
      ->capture_default_str();
  command->add_option("--seed", options->sampling.seed, "Seed of the draws")
      ->check(whole_number(0))
      ->type_name("N")
      ->capture_default_str();
  command->add_option("--logits", options->logits, "Print the k largest logits after the prompt instead of writing")
      ->check(whole_number(1))
      ->type_name("K");
  command->add_flag("--json", options->json,
                    "With --logits: {\"ids\":[…],\"logits\":[[id,logit],…]}, ids as they were fed, BOS included");
  command->callback([&job, options, prompt] {
    options->has_prompt = prompt->count() > 0;
    job = [options] { run_model(*options); };
  });
  command->footer(
      "Examples:\n"
      "  heed run model.gguf --prompt 'Why is the sky blue?'\n"
      "  heed run model.gguf --file book.txt --tokens 4000 --prompt 'Who is this about?' -n 100\n"
      "  heed run model.gguf --file book.txt --chat off --mechanism moba:block=64,top_k=8,sink=64 --temp 0.7");
}

}  // namespace heed::cli
