#include "cli/bench.h"

#include <fmt/format.h>

#include <algorithm>
#include <memory>
#include <vector>

#include "heed/base/file.h"
#include "heed/base/threads.h"
#include "heed/kernel/kernels.h"

namespace heed::cli {

namespace {

// Best rate of several bursts on `n` threads: a shared machine only ever slows one down.
template <class Burst>
double best_rate(int n, Burst burst) {
  const int before = threads();
  set_threads(n);
  double best = 0;
  for (int trial = 0; trial < 7; ++trial) {
    std::vector<double> work(static_cast<size_t>(n));
    const double start = seconds_now();
    parallel_for(n, [&](Index unit, int) { work[static_cast<size_t>(unit)] = burst(unit); });
    double sum = 0;
    for (double w : work) sum += w;
    best = std::max(best, sum / (seconds_now() - start));
  }
  set_threads(before);
  return best;
}

}  // namespace

double peak_of(double (*loop)(Index), int n) {
  if (loop == nullptr) return 0;
  const double start = seconds_now();
  const double flops = loop(1 << 14);
  const auto steps = static_cast<Index>(0.05 / (seconds_now() - start) * (1 << 14)) + 1;  // bursts of 50 ms
  return flops > 0 ? best_rate(n, [&](Index) { return loop(steps); }) : 0;
}

Peaks peaks() { return {peak_of(kernels().peak_f32, threads()), peak_of(kernels().peak_bf16, threads())}; }

double bandwidth(int n) {
  const Index floats = Index{1} << 26;  // 256 MiB a thread
  std::vector<std::unique_ptr<float[]>> buffers;
  for (int i = 0; i < n; ++i) {
    buffers.push_back(std::make_unique_for_overwrite<float[]>(static_cast<size_t>(floats)));
    std::fill_n(buffers.back().get(), floats, 1.0f);
  }
  return best_rate(n, [&](Index unit) {
    volatile float sink = kernels().read_all(buffers[static_cast<size_t>(unit)].get(), floats);
    (void)sink;
    return static_cast<double>(floats * 4);
  });
}

void write_json(const std::string& path, const Json& json) {
  if (path.empty()) return;
  const std::string text = json.dump(2) + "\n";
  if (path == "-") fmt::print("{}", text);
  else write_file(path, text);
}

namespace {

void bench_peak(const std::string& json_path) {
  Json json{{"machine", machine_name()}, {"isa", kernels().name}, {"threads", threads()}};
  std::vector<int> counts{1};
  if (threads() > 1) counts.push_back(threads());
  if (json_path != "-")
    fmt::print("{:<22}{:>12}{:>12}{:>12}{:>14}\n", "", "f32 GF/s", "bf16 GF/s", "int8 GO/s", "read GB/s");
  for (int n : counts) {
    const double f32 = peak_of(kernels().peak_f32, n), bf16 = peak_of(kernels().peak_bf16, n),
                 int8 = peak_of(kernels().peak_int8, n), read = bandwidth(n);
    const auto some = [](double x) { return x > 0 ? fmt::format("{:.0f}", x * 1e-9) : "-"; };
    if (json_path != "-")
      fmt::print("{:<22}{:>12.0f}{:>12}{:>12}{:>14.1f}\n", fmt::format("{} × {}", n, kernels().name), f32 * 1e-9,
                 some(bf16), some(int8), read * 1e-9);
    json["peaks"].push_back(
        {{"threads", n}, {"f32_flops", f32}, {"bf16_flops", bf16}, {"int8_ops", int8}, {"read_bytes_per_s", read}});
  }
  write_json(json_path, json);
}

}  // namespace

void add_bench(CLI::App& app, Job& job) {
  CLI::App* bench = app.add_subcommand("bench", "Measure this machine's peaks and heed's kernels");
  bench->require_subcommand(1);
  CLI::App* peak = bench->add_subcommand("peak", "Multiply-adds and bytes a second at most");
  const auto json = std::make_shared<std::string>();
  peak->add_option("--json", *json, "Write the figures as JSON to this file (- for standard output)")->type_name("F");
  peak->callback([&job, json] { job = [json] { bench_peak(*json); }; });
  add_bench_attend(*bench, job);
  add_bench_backward(*bench, job);
  add_bench_linear(*bench, job);
  add_bench_model(*bench, job);
}

}  // namespace heed::cli
