// Measurements: what the machine can do, and what the kernels make of it.
#pragma once

#include <CLI/CLI.hpp>

#include <functional>

namespace heed::cli {

/// Adds `heed bench peak|attend`. The chosen one is put into `job`, to be run after parsing.
void add_bench(CLI::App& app, std::function<void()>& job);

}  // namespace heed::cli
