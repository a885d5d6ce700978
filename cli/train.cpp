// heed train is a program of its own, as every command would have to wait until libtorch is loaded: this one becomes
// it.

#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <filesystem>

#include "cli/commands.h"
#include "heed/base/error.h"

namespace heed::cli {
namespace {

[[noreturn]] void become(const char* program, char** argv) {
  const std::filesystem::path path = std::filesystem::read_symlink("/proc/self/exe").replace_filename(program);
  // torch's OpenMP threads would spin between its loops on the cores that heed's own threads need.
  ::setenv("OMP_WAIT_POLICY", "passive", 0);
  ::execv(path.c_str(), argv);
  if (errno == ENOENT)
    fail("train: this heed was built without libtorch, expected one built with it, as make python does");
  fail("{}: cannot be run: {}", path.string(), std::strerror(errno));
}

}  // namespace

void add_train(CLI::App& app, Job& job, char** argv) {
  CLI::App* command = app.add_subcommand("train", "Train a small language model with any mechanism on a text");
  // Its options, help among them, are the other program's.
  command->set_help_flag();
  command->fallthrough(false);
  command->prefix_command();
  command->callback([&job, argv] { job = [argv] { become("heed-torch", argv); }; });
}

}  // namespace heed::cli
