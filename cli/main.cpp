// The heed command.

#include "cli/bench.h"
#include "cli/command_line.h"
#include "cli/commands.h"

int main(int argc, char** argv) {
  using namespace heed::cli;
  return run({.about = "heed: attention as plans of tiles, on the machine you have.\n"
                       "Runs language models (GGUF files) over long documents with any attention mechanism swapped in, "
                       "and\nshows what that saves and what it costs.",
              .examples = "Examples:\n"
                          "  heed run model.gguf --prompt 'Why is the sky blue?'\n"
                          "  heed compare model.gguf --file book.txt --tokens 8000 --html report.html\n"
                          "  heed list\n"
                          "  heed explain moba\n"
                          "A mechanism is written NAME or NAME:parameter=value,… as in moba:block=64,top_k=8.\n"
                          "heed COMMAND --help tells more about each command.",
              .add =
                  [argv](CLI::App& app, Job& job) {
                    add_run(app, job);
                    add_compare(app, job);
                    add_list(app, job);
                    add_explain(app, job);
                    add_attend(app, job);
                    add_plan(app, job);
                    add_calibrate(app, job, argv);
                    add_train(app, job, argv);
                    add_lab(app, job, argv);
                    add_tokenize(app, job);
                    add_inspect(app, job);
                    add_bench(app, job);
                  }},
             argc, argv);
}
