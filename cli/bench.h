// Measurements: what the machine can do, and what heed makes of it.
#pragma once

#include <functional>
#include <string>

#include "cli/commands.h"
#include "cli/options.h"
#include "heed/base/clock.h"

namespace heed::cli {

/// Adds `heed bench peak|attend|backward|linear|prefill|decode`. The chosen one is put into `job`, to be run after
/// parsing.
void add_bench(CLI::App& app, Job& job);
void add_bench_attend(CLI::App& bench, Job& job);
void add_bench_backward(CLI::App& bench, Job& job);
void add_bench_linear(CLI::App& bench, Job& job);
void add_bench_model(CLI::App& bench, Job& job);

struct Peaks {
  double f32 = 0, bf16 = 0;  // flops a second, all threads; 0: the kernels have no such product
};
/// Flops a second of a kernel's own yardstick on `n` threads, the best of several bursts; 0 for null.
double peak_of(double (*loop)(Index steps), int n);
Peaks peaks();
/// Bytes a second read by `n` threads from memory that no cache holds.
double bandwidth(int n);

/// To a file, or to standard output for "-"; nowhere for "".
void write_json(const std::string& path, const Json& json);

}  // namespace heed::cli
