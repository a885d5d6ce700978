// The commands of heed-torch.
#pragma once

#include "cli/command_line.h"

namespace heed::cli {

void add_calibrate(CLI::App& app, Job& job);
void add_train(CLI::App& app, Job& job);
void add_lab(CLI::App& app, Job& job);

}  // namespace heed::cli
