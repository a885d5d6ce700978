#include "cli/command_line.h"

#include <fmt/format.h>

#include <memory>
#include <new>

#include "cli/help.h"
#include "cli/interrupt.h"
#include "cli/options.h"
#include "cli/terminal.h"
#include "heed/base/error.h"
#include "heed/base/threads.h"
#include "heed/kernel/kernels.h"
#include "heed/model/model.h"

namespace heed::cli {
namespace {

constexpr int exit_failure = 1, exit_usage = 2;

struct Shared {
  int threads = 0;
  bool verbose = false;
  std::string color = "auto";
};

// One line, whatever the message holds.
int complain(int code, const std::string& message) {
  std::string line;
  for (char c : message) {
    const auto byte = static_cast<unsigned char>(c);
    if (byte < 0x20 || byte == 0x7f) line += fmt::format("\\x{:02x}", byte);
    else line += c;
  }
  fmt::print(stderr, "heed: {}\n", line);
  return code;
}

void add_shared(CLI::App& app, Shared& shared) {
  app.set_help_flag("-h,--help", "This text");
  app.set_version_flag("--version", "heed " HEED_VERSION, "The version");
  app.add_option("--threads", shared.threads,
                 "Threads to use (default: HEED_THREADS, else every processor this process may use)")
      ->check(whole_number(1, 4096))
      ->type_name("N");
  app.add_flag("-v,--verbose", shared.verbose, "Say which instruction set, threads and memory are used");
  app.add_option("--color", shared.color, "auto, always or never; NO_COLOR is respected")
      ->check(one_of({"auto", "always", "never"}))
      ->type_name("WHEN")
      ->capture_default_str();
}

// The command that a failed parse had reached, as it is typed.
std::string command_path(const CLI::App& app) {
  const auto parsed = app.get_subcommands();
  return parsed.empty() ? app.get_name() : app.get_name() + " " + command_path(*parsed.front());
}

std::string parse_message(const CLI::App& app, const CLI::ParseError& error) {
  const std::string path = command_path(app);
  if (dynamic_cast<const CLI::ExtrasError*>(&error) != nullptr) {
    const std::vector<std::string> extra = app.remaining(true);
    const std::string what = extra.empty() ? std::string("an argument") : extra.front();
    if (app.get_subcommands().empty())
      return fmt::format("{}: no such command or option; heed --help lists them", what);
    return fmt::format("{}: not an option or argument of {}; {} --help lists them", what, path, path);
  }
  return fmt::format("{}; see {} --help", error.what(), path);
}

void say_machine() {
  fmt::print(stderr, "heed: {}; instruction set {} (of {}); {} threads; {} of memory available\n", machine_name(),
             kernels().name, fmt::join(available_isas(), ", "), threads(), bytes_text(model::available_memory()));
}

int run_job(const Program& program, int argc, char** argv) {
  CLI::App app{program.about, "heed"};
  Shared shared;
  add_shared(app, shared);
  app.formatter(std::make_shared<Help>());
  app.option_defaults()->multi_option_policy(CLI::MultiOptionPolicy::Throw);
  app.fallthrough();
  app.require_subcommand(0, 1);
  app.footer(program.examples);
  Job job;
  program.add(app, job);

  try {
    app.parse(argc, argv);
  } catch (const CLI::Success& asked) {
    return app.exit(asked);  // help, version
  } catch (const CLI::ParseError& error) {
    return complain(exit_usage, parse_message(app, error));
  }
  set_color(shared.color);
  if (shared.threads > 0) set_threads(shared.threads);
  if (shared.verbose) say_machine();
  kernels();  // a HEED_ISA that cannot be had is an error of every command
  if (job) job();
  else print(app.help());
  return 0;
}

}  // namespace

int run(const Program& program, int argc, char** argv) {
  install_signal_handlers();
  try {
    const int code = run_job(program, argc, argv);
    flush_output();
    return code != 0 || interrupted() == 0 ? code : 128 + interrupted();
  } catch (const model::Interrupted&) {
    complain(0, "interrupted");
    return 128 + interrupted();
  } catch (const UsageError& error) {
    return complain(exit_usage, error.what());
  } catch (const std::bad_alloc&) {
    return complain(exit_failure, "out of memory");
  } catch (const std::exception& error) {
    return complain(exit_failure, error.what());
  }
}

}  // namespace heed::cli
