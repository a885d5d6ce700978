// heed tokenize: a text as the model sees it.

#include <fmt/format.h>

#include <memory>

#include "cli/commands.h"
#include "cli/options.h"
#include "cli/terminal.h"
#include "cli/utf8.h"
#include "heed/base/file.h"
#include "heed/model/tokenizer.h"

namespace heed::cli {
namespace {

struct Options {
  std::string model, file;
  bool special = false, json = false;
};

void tokenize(const Options& options) {
  const auto tokenizer = model::Tokenizer::make(model::Vocabulary::from(model::Gguf::open(options.model)));
  const std::vector<model::Token> ids = tokenizer->encode(read_file(options.file), options.special);
  if (options.json) {
    Json json{{"ids", ids}, {"bos", nullptr}};
    if (const auto bos = tokenizer->bos()) json["bos"] = *bos;
    print(json.dump() + "\n");
    return;
  }
  // A piece may hold part of a character; quoted, so that spaces and line ends show.
  std::string out;
  for (model::Token id : ids) out += fmt::format("{}\t{}\n", id, Json(valid_utf8(tokenizer->decode(id, true))).dump());
  print(out);
}

}  // namespace

void add_tokenize(CLI::App& app, Job& job) {
  CLI::App* command = app.add_subcommand("tokenize", "A text as the ids that a model reads");
  const auto options = std::make_shared<Options>();
  command->add_option("MODEL", options->model, "A GGUF file")->required();
  command->add_option("--file", options->file, "The text, UTF-8, taken byte for byte; - is standard input")
      ->required()
      ->type_name("F");
  command->add_flag("--special", options->special,
                    "Control tokens such as <|im_start|> are matched; else they are plain text");
  command->add_flag("--json", options->json,
                    "Print {\"ids\":[…],\"bos\":…}: ids without BOS, and the BOS that the model adds, or null");
  command->callback([&job, options] { job = [options] { tokenize(*options); }; });
  command->footer("Example:\n  echo -n 'In the beginning' | heed tokenize model.gguf --file -");
}

}  // namespace heed::cli
