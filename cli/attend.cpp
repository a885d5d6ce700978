// heed attend: one mechanism on tensors of a file.

#include <fmt/format.h>

#include <cmath>
#include <memory>

#include "cli/commands.h"
#include "cli/interrupt.h"
#include "cli/tensors.h"
#include "cli/terminal.h"
#include "heed/base/threads.h"
#include "heed/kernel/kernels.h"

namespace heed::cli {
namespace {

struct Options {
  TensorOptions tensors;
  std::string out;
  bool grad = false, json = false;
};

Json report(const MechanismCall& call, const AttendInput& in, const AttendOutput& out) {
  const AttendStats& s = out.stats;
  const Index per_pair = 2 * (in.q.shape[3] + in.v.shape[3]);
  return {{"mechanism", call.name},
          {"params", params_json(call)},
          {"isa", kernels().name},
          {"threads", threads()},
          {"dtype", name_of(in.arithmetic)},
          {"causal", resolve_causality(find_mechanism(call.name), in.causal)},
          {"scale", in.scale.value_or(1 / std::sqrt(static_cast<float>(in.q.shape[3])))},
          {"shapes", {{"q", in.q.shape}, {"k", in.k.shape}, {"v", in.v.shape}, {"o", out.o.shape()}}},
          {"density", out.density},
          {"pairs", s.pairs},
          {"pairs_computed", s.pairs_computed},
          {"tiles_planned", s.tiles_planned},
          {"tiles_visited", s.tiles_visited},
          {"panels_visited", s.panels_visited},
          {"flops", per_pair * s.pairs},
          {"flops_computed", per_pair * s.pairs_computed},
          {"plan_s", s.plan_s},
          {"attend_s", s.attend_s},
          {"scratch_bytes", s.scratch_bytes}};
}

void attend_file(const Options& options) {
  const MechanismCall call = options.tensors.call();
  OpenedTensors opened = options.tensors.open();
  AttendInput& in = opened.input;
  AttendOutput out;
  AttendGradients gradients;
  if (options.grad) {
    const TensorView dout = opened.file.tensor("do");
    in.extra.erase("do");
    gradients = heed::attend_backward(call, in, dout, &out);
  } else {
    out = heed::attend(call, in);
  }

  std::vector<std::pair<std::string, TensorView>> tensors{{"o", out.o.view()}};
  if (out.lse.size() > 0) tensors.emplace_back("lse", out.lse.view());
  for (const auto& [name, tensor] : out.extra) tensors.emplace_back(name, tensor.view());
  if (options.grad) {
    tensors.emplace_back("dq", gradients.dq.view());
    tensors.emplace_back("dk", gradients.dk.view());
    tensors.emplace_back("dv", gradients.dv.view());
    for (const auto& [name, tensor] : gradients.extra) tensors.emplace_back("d" + name, tensor.view());
  }
  {
    const HoldInterrupts hold;
    model::write_safetensors(options.out, tensors);
  }
  stop_if_interrupted();

  Json json = report(call, in, out);
  if (options.grad) json["backward_s"] = gradients.stats.plan_s + gradients.stats.attend_s;
  if (options.json) {
    print(json_text(json));
    return;
  }
  const AttendStats& s = out.stats;
  const double flops = json["flops"].get<double>();
  print(fmt::format("{}: q {}, k {}, {}, {} threads\n", call.text(), to_string(in.q.shape), to_string(in.k.shape),
                    kernels().name, threads()));
  print(fmt::format("  {:.4g} % of the pairs of dense attention in {} tiles ({} visited)\n", 100 * out.density,
                    count_text(s.tiles_planned), count_text(s.tiles_visited)));
  print(fmt::format("  {} to plan, {} to attend: {:.4g} Gflop, {:.4g} Gflop/s\n", seconds_text(s.plan_s),
                    seconds_text(s.attend_s), flops / 1e9, s.attend_s > 0 ? flops / s.attend_s / 1e9 : 0.0));
  if (options.grad) print(fmt::format("  {} for the gradients\n", seconds_text(json["backward_s"].get<double>())));
}

}  // namespace

void add_attend(CLI::App& app, Job& job) {
  CLI::App* command = app.add_subcommand("attend", "One mechanism on tensors of a safetensors file");
  const auto options = std::make_shared<Options>();
  options->tensors.add(*command);
  command->add_option("OUT", options->out, "Where to write o [B,Hq,N,Dv] and lse [B,Hq,N], f32")->required();
  command->add_flag("--grad", options->grad,
                    "Read do, shaped as o, and write dq, dk, dv and those of extra tensors, f32, too");
  command->add_flag("--json", options->json, "Print density, tiles, operations and seconds as one object");
  command->callback([&job, options] { job = [options] { attend_file(*options); }; });
  command->footer("Examples:\n"
                  "  heed attend in.safetensors out.safetensors --mechanism dense --causal\n"
                  "  heed attend in.safetensors out.safetensors --mechanism moba:block=64,top_k=8 --json\n"
                  "  heed attend in.safetensors out.safetensors --mechanism dense --causal --grad");
}

}  // namespace heed::cli
