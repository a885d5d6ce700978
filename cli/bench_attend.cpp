// heed bench attend: mechanisms on tensors: time, share of the peak, error against f64.

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <memory>
#include <optional>

#include "cli/attend_reference.h"
#include "cli/bench.h"
#include "cli/bench_options.h"
#include "cli/torch_attend.h"
#include "heed/base/threads.h"
#include "heed/exec/cost.h"
#include "heed/kernel/kernels.h"
#include "heed/mechanism/attend.h"

namespace heed::cli {
namespace {

// One mechanism timed: planning and attending. Checks and packing, which every mechanism pays alike, stand apart.
struct Timing {
  Runs runs;
  double plan_s = 0, pack_s = 0, density = 0, flops = 0;
  double whole_s = 0;      // of the fastest run from tensors to output, packing included
  Cost cost;               // of attending, as predicted
  AttendStats stats;
  std::optional<double> error;
  bool torch = false;  // torch has run the same
};

Timing time_of(const MechanismCall& call, const AttendInput& in, int repeat, const Machine& machine,
               TorchAttend* torch) {
  Timing t;
  Tensor o;
  for (int i = 0; i <= repeat; ++i) {
    double start = seconds_now();
    const CheckedCall checked = check(call, in);
    const double pack_s = seconds_now() - start;
    start = seconds_now();
    const Plan plan = checked.plan();
    double seconds = seconds_now() - start;
    const double planned_s = seconds;
    const Problem& p = plan.problem;
    const Index r = plan.rows_per_head();
    if (o.size() != p.B * p.Hq * r * p.Dv) o = Tensor(DType::f32, {p.B, p.Hq, r, p.Dv});
    const AttendStats stats = attend(plan, {o.as<float>(), p.Hq * r * p.Dv, r * p.Dv, p.Dv, nullptr});
    if (i == 0) {  // warm-up
      const std::optional<ReferenceRows> reference = ReferenceRows::of(checked, in, plan);
      if (reference)
        t.error = reference->error([&](Index head, size_t rank, Index e) {
          return static_cast<double>(o.as<float>()[(head * p.N + reference->tokens()[rank]) * p.Dv + e]);
        });
      t.cost = predict(plan, machine);
      t.torch = torch != nullptr && torch->take_up(call, in, plan, stats, reference);
      continue;
    }
    seconds += stats.plan_s + stats.attend_s;
    t.whole_s = t.runs.empty() ? pack_s + seconds : std::min(t.whole_s, pack_s + seconds);
    t.runs.add(seconds);
    if (t.torch) torch->run();
    if (seconds > t.runs.best()) continue;
    t.stats = stats, t.plan_s = planned_s + stats.plan_s, t.pack_s = pack_s;
    t.flops = 2.0 * static_cast<double>(stats.pairs) * static_cast<double>(p.D + p.Dv);
    t.density = static_cast<double>(stats.pairs) / static_cast<double>(dense_pairs(p));
  }
  return t;
}

class Bench {
 public:
  Bench(const BenchOptions& o, const AttendInput& input) : o_(o), input_(input) {
    const Shape &q = input_.q.shape, &k = input_.k.shape;
    if (q.size() != 4 || k.size() != 4) check({"dense", {}}, input_);  // says what is wrong with them
    if (!o.against.empty()) torch_.emplace(input_);
    peaks_ = peaks();
    machine_ = {.isa = "", .f32_flops = peaks_.f32, .bf16_flops = peaks_.bf16, .read_bytes = bandwidth(threads())};
    json_ = {{"machine", machine_name()}, {"isa", kernels().name},
             {"threads", threads()},      {"length", q.at(2)},
             {"heads", q.at(1)},          {"kv_heads", k.at(1)},
             {"head_size", q.at(3)},      {"f32_peak", peaks_.f32},
             {"bf16_peak", peaks_.bf16},  {"read_bytes_per_s", machine_.read_bytes}};
    if (quiet()) return;
    fmt::print("{}, {} threads, q {}, k {}; peaks: f32 {:.0f} GF/s, bf16 {:.0f} GF/s\n\n"
               "{:<44}{:>6}{:>10}{:>10}{:>9}{:>8}{:>9}{:>9}{:>10}{:>10}{:>11}\n",
               kernels().name, threads(), to_string(q), to_string(k), peaks_.f32 * 1e-9, peaks_.bf16 * 1e-9, "", "",
               "best s", "median s", "GF/s", "% peak", "plan %", "density", "t/dense·ρ", "error", "predicted");
  }

  void run(DType dtype) {
    dense_s_.clear();
    for (const std::string& text : o_.mechanisms) {
      const MechanismCall call = MechanismCall::parse(text);
      const Mechanism& m = find_mechanism(call.name);
      const bool causal = m.causality == Causality::implied || (m.causality == Causality::either && !o_.full);
      // A ratio needs dense attention with the same causality.
      if (dense_s_.empty() ? call.name == "dense" : dense_s_.count(causal) == 0)
        time("dense", {"dense", {}}, causal, dtype);
      if (call.name != "dense") time(text, call, causal, dtype);
    }
  }

  /// The cost model's median error over all that was timed, and what else the table needs said.
  void conclude() {
    if (off_.empty()) return;
    std::sort(off_.begin(), off_.end());
    json_["median_prediction_error"] = off_[off_.size() / 2];
    if (quiet()) return;
    fmt::print("\nerror: largest difference from f64 over the largest value, on four rows a head; in bf16 the rounding "
               "of q, k "
               "and v is part of it\n"
               "predicted: seconds of attending by the cost model beside those measured; median error {:.0f} %\n",
               100 * off_[off_.size() / 2]);
    if (torch_)
      fmt::print("{}: the last column says how many times as long as heed it takes, heed's packing of keys and values "
                 "included\n",
                 torch_->peer().title());
  }

  const Json& json() const { return json_; }

 private:
  bool quiet() const { return o_.json == "-"; }

  void time(const std::string& text, const MechanismCall& call, bool causal, DType dtype) {
    AttendInput in = input_;
    in.causal = causal, in.arithmetic = dtype;
    // A file may hold tensors for several mechanisms.
    const Mechanism& m = find_mechanism(call.name);
    std::erase_if(in.extra, [&](const auto& extra) {
      return std::none_of(m.extras.begin(), m.extras.end(), [&](const ExtraSpec& e) { return e.name == extra.first; });
    });
    const Timing t = time_of(call, in, o_.repeat, machine_, torch_ ? &*torch_ : nullptr);
    const double best = t.runs.best(), rate = t.flops / best;
    const double peak = dtype == DType::bf16 && peaks_.bf16 > 0 ? peaks_.bf16 : peaks_.f32;
    if (call.name == "dense") dense_s_[causal] = best;
    const auto dense = dense_s_.find(causal);
    const double excess = dense == dense_s_.end() ? 0 : best / (dense->second * t.density);
    const double off = t.cost.seconds / (best - t.plan_s) - 1;
    off_.push_back(std::abs(off));
    const std::string name = causal ? text : text + " (full)";
    if (!quiet())
      fmt::print("{:<44}{:>6}{:>10.4f}{:>10.4f}{:>9.0f}{:>8.1f}{:>9.1f}{:>9.4f}{:>10}{:>10}{:>+9.0f} %\n", name,
                 name_of(dtype), best, t.runs.median(), rate * 1e-9, 100 * rate / peak, 100 * t.plan_s / best,
                 t.density, excess > 0 ? fmt::format("{:.2f}", excess) : "-", error_text(t.error), 100 * off);
    json_["results"].push_back({{"mechanism", text},
                                {"causal", causal},
                                {"dtype", name_of(dtype)},
                                {"best_s", best},
                                {"median_s", t.runs.median()},
                                {"plan_s", t.plan_s},
                                {"pack_s", t.pack_s},
                                {"predicted_attend_s", t.cost.seconds},
                                {"flops_per_s", rate},
                                {"share_of_peak", rate / peak},
                                {"bytes", t.cost.bytes},
                                {"density", t.density},
                                {"time_over_dense_times_density", excess},
                                {"max_relative_error", t.error ? Json(*t.error) : Json()},
                                {"pairs", t.stats.pairs},
                                {"pairs_computed", t.stats.pairs_computed},
                                {"tiles_visited", t.stats.tiles_visited}});
    if (torch_) compare(t, dtype, peak);
  }

  // torch's line, and its part of the last result.
  void compare(const Timing& t, DType dtype, double peak) {
    Json& torch = json_["results"].back()["against"]["torch"];
    if (!t.torch) {
      if (!quiet()) fmt::print("  {} has no such mask\n", torch_->peer().title());
      return;
    }
    const Runs& runs = torch_->runs();
    const double rate = t.flops / runs.best(), ratio = runs.best() / t.whole_s;
    torch = {{"version", torch_->peer().version()},
             {"function", torch_->function()},
             {"best_s", runs.best()},
             {"median_s", runs.median()},
             {"ours_s", t.whole_s},
             {"ratio", ratio},
             {"share_of_peak", rate / peak},
             {"max_relative_error", torch_->error() ? Json(*torch_->error()) : Json()}};
    if (!quiet())
      fmt::print("{:<44}{:>6}{:>10.4f}{:>10.4f}{:>9.0f}{:>8.1f}{:>9}{:>9}{:>10}{:>10}{:>9.2f} ×\n",
                 fmt::format("  {} {}", torch_->peer().title(), torch_->function()), name_of(dtype), runs.best(),
                 runs.median(), rate * 1e-9, 100 * rate / peak, "", "", "", error_text(torch_->error()), ratio);
  }

  static std::string error_text(const std::optional<double>& error) {
    return error ? fmt::format("{:.1e}", *error) : "-";
  }

  const BenchOptions& o_;
  const AttendInput& input_;
  Peaks peaks_;
  Machine machine_;
  std::vector<double> off_;
  std::optional<TorchAttend> torch_;
  Json json_;
  std::map<bool, double> dense_s_;  // by causality
};

void bench_attend(BenchOptions& o) {
  if (o.mechanisms.empty())
    o.mechanisms = {"dense", "streaming:sink=64,window=512", "moba:block=128,top_k=8", "power:block=128"};
  Bench bench(o, o.fill());
  for (DType dtype : {DType::f32, DType::bf16})
    if (o.wants(dtype)) bench.run(dtype);
  bench.conclude();
  write_json(o.json, bench.json());
}

}  // namespace

void add_bench_attend(CLI::App& bench, Job& job) {
  CLI::App* command =
      bench.add_subcommand("attend", "Attention on tensors: time, share of the peak, error against f64");
  const auto o = std::make_shared<BenchOptions>();
  o->add(*command, "both", 5);
  command->callback([&job, o] { job = [o] { bench_attend(*o); }; });
}

}  // namespace heed::cli
