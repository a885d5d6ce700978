// The commands: each adds itself to the command line; the one that was asked for puts its work into
// `job`, which runs after parsing.
#pragma once

#include "cli/command_line.h"

namespace heed::cli {

void add_run(CLI::App& app, Job& job);
void add_compare(CLI::App& app, Job& job);
void add_list(CLI::App& app, Job& job);
void add_explain(CLI::App& app, Job& job);
void add_attend(CLI::App& app, Job& job);
void add_plan(CLI::App& app, Job& job);
void add_tokenize(CLI::App& app, Job& job);
void add_inspect(CLI::App& app, Job& job);
/// Becomes heed-torch for a mechanism that is fitted to a model.
void add_calibrate(CLI::App& app, Job& job, char** argv);
/// Commands of the program heed-torch beside this one, which takes its place, with the same arguments.
void add_train(CLI::App& app, Job& job, char** argv);
void add_lab(CLI::App& app, Job& job, char** argv);

}  // namespace heed::cli
