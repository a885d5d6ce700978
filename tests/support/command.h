// The built command as a user runs it: a process with its own output, exit code and limits.
#pragma once

#include <nlohmann/json.hpp>

#include <functional>
#include <string>
#include <vector>

namespace heed::test {

struct Finished {
  int code = -1;    // exit code, or -1 when a signal ended it
  int signal = 0;   // that signal
  std::string out, err;
  nlohmann::ordered_json json() const { return nlohmann::ordered_json::parse(out); }
};

struct CommandOptions {
  std::string in = {};                          // standard input
  std::vector<std::string> environment = {};    // "NAME=value", on top of the test's own
  long file_limit = -1;                    // RLIMIT_FSIZE, bytes
  bool closed_output = false;              // standard output is a pipe that nobody reads
  int interrupt_with = 0;                  // this signal is sent ...
  std::function<bool(const std::string& out)> interrupt_when = {};  // ... as soon as this holds, asked again and again
};

/// Runs `heed` with these arguments and waits for it.
Finished heed_command(const std::vector<std::string>& arguments, const CommandOptions& options = {});

}  // namespace heed::test

/// It failed with this exit code and exactly this one line.
#define CHECK_REFUSED(finished, exit_code, line)          \
  do {                                                    \
    const heed::test::Finished& f_ = (finished);          \
    CHECK(f_.code == (exit_code));                        \
    CHECK(f_.err == "heed: " + std::string(line) + "\n"); \
    CHECK(f_.out.empty());                                \
  } while (false)
