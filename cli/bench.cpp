#include "cli/bench.h"

#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "heed/base/file.h"
#include "heed/base/random.h"
#include "heed/base/threads.h"
#include "heed/kernel/kernels.h"
#include "heed/mechanism/attend.h"

namespace heed::cli {
namespace {

using Json = nlohmann::ordered_json;

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

// Best rate of several bursts on `n` threads: a shared machine only ever slows one down.
template <class Burst>
double best_rate(int n, Burst burst) {
  const int before = threads();
  set_threads(n);
  double best = 0;
  for (int trial = 0; trial < 7; ++trial) {
    std::vector<double> work(static_cast<size_t>(n));
    const double start = now();
    parallel_for(n, [&](Index unit, int) { work[static_cast<size_t>(unit)] = burst(unit); });
    double sum = 0;
    for (double w : work) sum += w;
    best = std::max(best, sum / (now() - start));
  }
  set_threads(before);
  return best;
}

struct Peaks {
  double f32 = 0, bf16 = 0;  // flops a second, all threads
};

double peak_of(double (*loop)(Index), int n) {
  if (loop == nullptr) return 0;
  const double start = now();
  const double flops = loop(1 << 14);
  const auto steps = static_cast<Index>(0.05 / (now() - start) * (1 << 14)) + 1;  // bursts of 50 ms
  return flops > 0 ? best_rate(n, [&](Index) { return loop(steps); }) : 0;
}

// Bytes a second read from memory that no cache holds.
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

void bench_peak(const std::string& json_path) {
  Json json{{"isa", kernels().name}, {"threads", threads()}};
  std::vector<int> counts{1};
  if (threads() > 1) counts.push_back(threads());
  if (json_path != "-") fmt::print("{:<22}{:>12}{:>12}{:>14}\n", "", "f32 GF/s", "bf16 GF/s", "read GB/s");
  for (int n : counts) {
    const double f32 = peak_of(kernels().peak_f32, n), bf16 = peak_of(kernels().peak_bf16, n), read = bandwidth(n);
    if (json_path != "-")
      fmt::print("{:<22}{:>12.0f}{:>12}{:>14.1f}\n", fmt::format("{} × {}", n, kernels().name), f32 * 1e-9,
                 bf16 > 0 ? fmt::format("{:.0f}", bf16 * 1e-9) : "-", read * 1e-9);
    json["peaks"].push_back({{"threads", n}, {"f32_flops", f32}, {"bf16_flops", bf16}, {"read_bytes_per_s", read}});
  }
  write_json(json_path, json);
}

struct AttendCase {
  std::vector<std::string> mechanisms;
  Index length = 8192, heads = 2, kv_heads = 0, head_size = 64;
  int repeat = 5;
  bool full = false;
  std::string dtype = "both", json;
  std::uint64_t seed = 0;
};

std::vector<float> random_values(Index n, Random& random) {
  std::vector<float> x(static_cast<size_t>(n));
  for (float& e : x) e = static_cast<float>(2 * random.uniform() - 1);
  return x;
}

// Largest error of a few rows against f64, relative to the largest value: a wrong answer is no speed.
double error_of(const Plan& plan, const AttendInput& in, const float* o) {
  const Problem& p = plan.problem;
  const std::vector<Index> rows{0, p.N / 3, p.N / 2, p.N - 1};
  const auto rounded = [&](float x) { return in.arithmetic == DType::bf16 ? round_to_bf16(x) : x; };
  std::map<std::pair<Index, Index>, std::pair<double, std::vector<double>>> sums;
  const auto value = [&](const TensorView& x, Index head, Index row, Index e) {
    return static_cast<double>(rounded(static_cast<const float*>(x.data)[(head * x.shape[2] + row) * x.shape[3] + e]));
  };
  walk(plan, [&](const RowBlock& block, const std::vector<Tile>& tiles) {
    for (const Tile& tile : tiles)
      for (Index i = 0; i < tile.rows.count; ++i) {
        const Index token = block.token(tile.rows[i]);
        if (std::find(rows.begin(), rows.end(), token) == rows.end()) continue;
        for (Index c = 0; c < tile.columns.count; ++c) {
          if (!sees(plan, block, tile, i, c)) continue;
          double s = 0;
          for (Index f = 0; f < p.D; ++f)
            s += value(in.q, block.head, token, f) * value(in.k, block.kv_head, tile.columns[c], f);
          const double w = std::exp(s * static_cast<double>(plan.rule.scale));
          auto& [weight, sum] = sums[{block.head, token}];
          sum.resize(static_cast<size_t>(p.Dv));
          weight += w;
          for (Index e = 0; e < p.Dv; ++e)
            sum[static_cast<size_t>(e)] += w * value(in.v, block.kv_head, tile.columns[c], e);
        }
      }
  });
  double worst = 0, most = 0;
  for (const auto& [key, sum] : sums)
    for (Index e = 0; e < p.Dv; ++e) {
      const double want = sum.second[static_cast<size_t>(e)] / sum.first;
      most = std::max(most, std::abs(want));
      worst = std::max(worst, std::abs(want - static_cast<double>(o[(key.first * p.N + key.second) * p.Dv + e])));
    }
  return worst / most;
}

void bench_attend(AttendCase c) {
  if (c.kv_heads == 0) c.kv_heads = c.heads;
  if (c.mechanisms.empty())
    c.mechanisms = {"dense", "streaming:sink=64,window=512", "moba:block=128,top_k=8", "power:block=128"};
  Random random(c.seed);
  const auto q = random_values(c.heads * c.length * c.head_size, random);
  const auto k = random_values(c.kv_heads * c.length * c.head_size, random);
  const auto v = random_values(c.kv_heads * c.length * c.head_size, random);
  Peaks peaks{peak_of(kernels().peak_f32, threads()), peak_of(kernels().peak_bf16, threads())};
  const bool quiet = c.json == "-";
  Json json{{"isa", kernels().name}, {"threads", threads()},   {"length", c.length},
            {"heads", c.heads},      {"kv_heads", c.kv_heads}, {"head_size", c.head_size},
            {"causal", !c.full},     {"f32_peak", peaks.f32},  {"bf16_peak", peaks.bf16}};
  if (!quiet)
    fmt::print("{}, {} threads, N = {}, {} heads on {}, D = {}, {}; peaks: f32 {:.0f} GF/s, bf16 {:.0f} GF/s\n\n"
               "{:<34}{:>6}{:>10}{:>10}{:>9}{:>8}{:>9}{:>9}{:>10}{:>10}\n",
               kernels().name, threads(), c.length, c.heads, c.kv_heads, c.head_size, c.full ? "full" : "causal",
               peaks.f32 * 1e-9, peaks.bf16 * 1e-9, "", "", "best s", "median s", "GF/s", "% peak", "plan %", "density",
               "t/dense·ρ", "error");

  for (DType dtype : {DType::f32, DType::bf16}) {
    if (c.dtype != "both" && c.dtype != name_of(dtype)) continue;
    double dense_s = 0;
    for (const std::string& text : c.mechanisms) {
      AttendInput in;
      in.q = {q.data(), DType::f32, {1, c.heads, c.length, c.head_size}};
      in.k = {k.data(), DType::f32, {1, c.kv_heads, c.length, c.head_size}};
      in.v = {v.data(), DType::f32, {1, c.kv_heads, c.length, c.head_size}};
      in.causal = !c.full;
      in.arithmetic = dtype;
      const MechanismCall call = MechanismCall::parse(text);
      Tensor o(DType::f32, {1, c.heads, c.length, c.head_size});
      const AttendTarget target{o.as<float>(), o.size(), c.length * c.head_size, c.head_size, nullptr};
      const double start = now();
      const Plan plan = plan_of(call, in);
      const double pack_s = now() - start;  // checks and packing; reported, not part of the figure
      std::vector<double> seconds;
      AttendStats best;
      for (int i = 0; i <= c.repeat; ++i) {
        const AttendStats stats = attend(plan, target);
        if (i == 0) continue;  // warm-up
        seconds.push_back(stats.plan_s + stats.attend_s);
        if (seconds.back() <= *std::min_element(seconds.begin(), seconds.end())) best = stats;
      }
      std::sort(seconds.begin(), seconds.end());
      const double flops = 4.0 * static_cast<double>(best.pairs * c.head_size), rate = flops / seconds[0];
      const double density = static_cast<double>(best.pairs) / static_cast<double>(dense_pairs(plan.problem));
      const double peak = dtype == DType::bf16 && peaks.bf16 > 0 ? peaks.bf16 : peaks.f32;
      const double error = error_of(plan, in, o.as<float>());
      if (call.name == "dense") dense_s = seconds[0];
      const double excess = dense_s > 0 ? seconds[0] / (dense_s * density) : 0;
      if (!quiet)
        fmt::print("{:<34}{:>6}{:>10.4f}{:>10.4f}{:>9.0f}{:>8.1f}{:>9.1f}{:>9.4f}{:>10}{:>10.1e}\n", text,
                   name_of(dtype), seconds[0], seconds[seconds.size() / 2], rate * 1e-9, 100 * rate / peak,
                   100 * best.plan_s / seconds[0], density, excess > 0 ? fmt::format("{:.2f}", excess) : "-", error);
      json["results"].push_back({{"mechanism", text},
                                 {"dtype", name_of(dtype)},
                                 {"best_s", seconds[0]},
                                 {"median_s", seconds[seconds.size() / 2]},
                                 {"plan_s", best.plan_s},
                                 {"pack_s", pack_s},
                                 {"flops_per_s", rate},
                                 {"share_of_peak", rate / peak},
                                 {"density", density},
                                 {"time_over_dense_times_density", excess},
                                 {"max_relative_error", error},
                                 {"pairs", best.pairs},
                                 {"pairs_computed", best.pairs_computed},
                                 {"tiles_visited", best.tiles_visited}});
    }
  }
  write_json(c.json, json);
}

}  // namespace

void add_bench(CLI::App& app, std::function<void()>& job) {
  CLI::App* bench = app.add_subcommand("bench", "Measure this machine's peaks and heed's kernels");
  bench->require_subcommand(1);

  CLI::App* peak = bench->add_subcommand("peak", "Multiply-adds and bytes a second at most");
  const auto peak_json = std::make_shared<std::string>();
  peak->add_option("--json", *peak_json, "Write the figures as JSON to this file (- for standard output)");
  peak->callback([&job, peak_json] { job = [peak_json] { bench_peak(*peak_json); }; });

  CLI::App* attend =
      bench->add_subcommand("attend", "Attention on random tensors: time, share of the peak, error against f64");
  const auto c = std::make_shared<AttendCase>();
  attend->add_option("--mechanism", c->mechanisms, "NAME[:p=v,…], may be given several times; dense first gives ratios")
      ->take_all();
  attend->add_option("--length", c->length, "Tokens N = M")
      ->check(CLI::Range(Index{1}, Index{1} << 24))
      ->capture_default_str();
  attend->add_option("--heads", c->heads, "Query heads")->check(CLI::Range(1, 1024))->capture_default_str();
  attend->add_option("--kv-heads", c->kv_heads, "Key heads (default: as many as query heads)")
      ->check(CLI::Range(1, 1024));
  attend->add_option("--head-size", c->head_size, "D")->check(CLI::Range(1, 512))->capture_default_str();
  attend->add_option("--dtype", c->dtype, "f32, bf16 or both")
      ->check(CLI::IsMember({"f32", "bf16", "both"}))
      ->capture_default_str();
  attend->add_option("--repeat", c->repeat, "Timed runs")->check(CLI::Range(1, 1000))->capture_default_str();
  attend->add_option("--seed", c->seed, "Seed of the tensors")->capture_default_str();
  attend->add_flag("--full", c->full, "Not causal");
  attend->add_option("--json", c->json, "Write the figures as JSON to this file (- for standard output)");
  attend->callback([&job, c] { job = [c] { bench_attend(*c); }; });
}

}  // namespace heed::cli
