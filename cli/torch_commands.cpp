// Commands of the program heed-torch: this one becomes it.

#include "cli/become.h"
#include "cli/commands.h"

namespace heed::cli {
namespace {

void add(CLI::App& app, Job& job, char** argv, const char* name, const char* help) {
  CLI::App* command = app.add_subcommand(name, help);
  // Its options, help among them, are the other program's.
  command->set_help_flag();
  command->fallthrough(false);
  command->prefix_command();
  command->callback([&job, argv, name] { job = [argv, name] { become_torch(name, argv); }; });
}

}  // namespace

void add_train(CLI::App& app, Job& job, char** argv) {
  add(app, job, argv, "train", "Train a small language model with any mechanism on a text");
}

void add_lab(CLI::App& app, Job& job, char** argv) {
  add(app, job, argv, "lab", "Measure a paper's claim again: a table, a verdict, a picture");
}

}  // namespace heed::cli
