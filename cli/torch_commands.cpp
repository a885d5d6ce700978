// The commands that train are a program of their own, as every command would have to wait until libtorch is loaded:
// this one becomes it.

#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <filesystem>

#include "cli/commands.h"
#include "heed/base/error.h"

namespace heed::cli {
namespace {

constexpr const char* program = "heed-torch";

[[noreturn]] void become_torch(const char* command, char** argv) {
  const std::filesystem::path path = std::filesystem::read_symlink("/proc/self/exe").replace_filename(program);
  // torch's OpenMP threads would spin between its loops on the cores that heed's own threads need.
  ::setenv("OMP_WAIT_POLICY", "passive", 0);
  ::execv(path.c_str(), argv);
  if (errno == ENOENT)
    fail("{}: this heed was built without libtorch, expected one built with it, as make python does", command);
  fail("{}: cannot be run: {}", path.string(), std::strerror(errno));
}

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
