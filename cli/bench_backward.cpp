// heed bench backward: attending and its gradient, as a training step does them.

#include <fmt/format.h>

#include <algorithm>
#include <map>
#include <memory>
#include <optional>

#include "cli/bench.h"
#include "cli/bench_options.h"
#include "cli/torch_attend.h"
#include "heed/base/threads.h"
#include "heed/kernel/kernels.h"
#include "heed/mechanism/attend.h"

namespace heed::cli {
namespace {

// Forward and forward + backward, each from tensors to tensors: checks, packing and planning are in both, twice in the
// second, as whoever calls attend() and attend_backward() one after the other pays them.
struct Timing {
  Runs forward, both;
  double flops = 0;  // of both: two products of the visible pairs forward, five backward
  double density = 0;
};

Timing time_of(const MechanismCall& call, const AttendInput& in, const TensorView& dout, int repeat,
               TorchAttend* torch) {
  Timing t;
  const double dense = static_cast<double>(dense_pairs(check(call, in).inputs.problem));
  for (int i = 0; i <= repeat; ++i) {
    const double start = seconds_now();
    const AttendOutput out = attend(call, in);
    const double forward = seconds_now() - start;
    const AttendGradients gradients = attend_backward(call, in, dout, out.o.view(), out.lse.view());
    const double both = seconds_now() - start;
    const double pairs = static_cast<double>(out.stats.pairs);
    const Index d = in.q.shape[3], dv = in.v.shape[3];
    t.flops = 2 * pairs * static_cast<double>(d + dv + 3 * d + 2 * dv);
    t.density = pairs / dense;
    if (torch != nullptr) torch->run();
    if (i == 0) continue;  // warm-up
    t.forward.add(forward), t.both.add(both);
  }
  return t;
}

void bench_backward(BenchOptions& o) {
  if (o.mechanisms.empty()) o.mechanisms = {"dense", "streaming:sink=64,window=512", "moba:block=128,top_k=8"};
  AttendInput in = o.fill();
  const Shape q = in.q.shape, k = in.k.shape;
  if (q.size() != 4 || k.size() != 4) check({"dense", {}}, in);  // says what is wrong with them
  const Shape shape{q[0], q[1], q[2], in.v.shape[3]};
  const std::vector<float> values = o.more(elements(shape));
  const TensorView dout{values.data(), DType::f32, shape};
  std::optional<TorchAttend> torch;
  if (!o.against.empty()) torch.emplace(in);
  const Peaks peak = peaks();
  Json json{{"machine", machine_name()},
            {"isa", kernels().name},
            {"threads", threads()},
            {"length", q[2]},
            {"heads", q[1]},
            {"kv_heads", k[1]},
            {"head_size", q[3]},
            {"f32_peak", peak.f32},
            {"bf16_peak", peak.bf16}};
  const bool quiet = o.json == "-";
  if (!quiet)
    fmt::print("{}, {} threads, q {}, k {}; peaks: f32 {:.0f} GF/s, bf16 {:.0f} GF/s; backward computes in f32\n\n"
               "{:<44}{:>6}{:>12}{:>14}{:>8}{:>10}{:>9}{:>12}\n",
               kernels().name, threads(), to_string(q), to_string(k), peak.f32 * 1e-9, peak.bf16 * 1e-9, "", "",
               "forward s", "+ backward s", "ratio", "% of f32", "density", "vs dense");
  for (const DType dtype : {DType::f32, DType::bf16}) {
    if (!o.wants(dtype)) continue;
    std::optional<double> dense_s, torch_dense_s;
    for (const std::string& text : o.mechanisms) {
      const MechanismCall call = MechanismCall::parse(text);
      const Mechanism& m = find_mechanism(call.name);
      in.causal = m.causality == Causality::implied || (m.causality == Causality::either && !o.full);
      in.arithmetic = dtype;
      const bool by_torch = torch && call.name == "dense";
      if (by_torch) torch->take_up_backward(in);
      const Timing t = time_of(call, in, dout, o.repeat, by_torch ? &*torch : nullptr);
      const double best = t.both.best();
      if (call.name == "dense") dense_s = best;
      if (by_torch) torch_dense_s = torch->runs().best();
      Json result{{"mechanism", text},
                  {"causal", in.causal},
                  {"dtype", name_of(dtype)},
                  {"forward_s", t.forward.best()},
                  {"both_s", best},
                  {"both_median_s", t.both.median()},
                  {"flops_per_s", t.flops / best},
                  {"share_of_f32_peak", t.flops / best / peak.f32},
                  {"density", t.density}};
      if (torch_dense_s)
        result["against"]["torch"] = {{"version", torch->peer().version()},
                                      {"function", "scaled_dot_product_attention, dense"},
                                      {"both_s", *torch_dense_s},
                                      {"ratio", *torch_dense_s / best}};
      json["results"].push_back(result);
      if (quiet) continue;
      fmt::print("{:<44}{:>6}{:>12.4f}{:>14.4f}{:>8.2f}{:>10.1f}{:>9.4f}{:>12}\n", text, name_of(dtype),
                 t.forward.best(), best, best / t.forward.best(), 100 * t.flops / best / peak.f32, t.density,
                 dense_s ? fmt::format("{:.2f} x", *dense_s / best) : "-");
      if (torch_dense_s)
        fmt::print("  {} dense, forward + backward: {:.4f} s, {:.2f} times as long\n", torch->peer().title(),
                   *torch_dense_s, *torch_dense_s / best);
    }
  }
  write_json(o.json, json);
}

}  // namespace

void add_bench_backward(CLI::App& bench, Job& job) {
  CLI::App* command = bench.add_subcommand("backward", "Attention and its gradient on tensors, as a training step");
  const auto o = std::make_shared<BenchOptions>();
  o->add(*command, "f32", 3);
  command->callback([&job, o] { job = [o] { bench_backward(*o); }; });
}

}  // namespace heed::cli
