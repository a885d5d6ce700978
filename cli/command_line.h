// What heed's programs have in common: options of every command, one line for every failure, exit codes.
#pragma once

#include <CLI/CLI.hpp>

#include <functional>
#include <string>

namespace heed::cli {

using Job = std::function<void()>;

/// A program whose commands `add` puts on the command line; the one that was asked for puts its work into the job,
/// which runs after parsing.
struct Program {
  std::string about, examples;
  std::function<void(CLI::App&, Job&)> add;
};

/// Parses, runs the job and returns the exit code: 0, 1 for an Error, 2 for the command line, 128 + the signal.
int run(const Program& program, int argc, char** argv);

}  // namespace heed::cli
