// heed bench linear: the matrices of a model, many rows at a time and one.

#include <fmt/format.h>

#include <algorithm>
#include <functional>
#include <memory>
#include <optional>
#include <set>

#include "cli/bench.h"
#include "cli/peer.h"
#include "cli/terminal.h"
#include "heed/base/random.h"
#include "heed/base/threads.h"
#include "heed/kernel/kernels.h"
#include "heed/model/linear.h"

namespace heed::cli {
namespace {

struct Options {
  std::string path, dtype = "bf16", json;
  std::vector<std::string> against;
  Index rows = 512;
  int repeat = 7;
};

// The fastest of several turns. A turn is one run that wakes the threads, as the peer has had its own turn before, and
// then runs for some milliseconds.
double best_seconds(int repeat, const std::function<void()>& work, const std::function<void()>& peer = {}) {
  constexpr double turn = 5e-3;
  Runs runs;
  for (int i = 0; i < repeat; ++i) {
    work();
    const double begin = seconds_now();
    do {
      const double start = seconds_now();
      work();
      runs.add(seconds_now() - start);
    } while (seconds_now() - begin < turn);
    if (peer) peer();
  }
  return runs.best();
}

std::vector<float> random_values(Index n) {
  Random random(1);
  std::vector<float> x(static_cast<size_t>(n));
  for (float& e : x) e = static_cast<float>(random.normal());
  return x;
}

void bench_linear(const Options& o) {
  const model::Gguf file = model::Gguf::open(o.path);
  const DType dtype = dtype_named(o.dtype);
  std::optional<Peer> torch;
  if (!o.against.empty()) torch.emplace("torch", "torch_linear", Json::object({{"threads", threads()}}));
  const Peaks machine = peaks();
  const double peak = dtype == DType::bf16 && machine.bf16 > 0 ? machine.bf16 : machine.f32,
               read = bandwidth(threads());
  Json json{{"machine", machine_name()}, {"isa", kernels().name}, {"threads", threads()}, {"model", o.path},
            {"dtype", o.dtype},          {"rows", o.rows},        {"peak", peak},         {"read_bytes_per_s", read}};
  const bool quiet = o.json == "-";
  if (!quiet)
    fmt::print("{}, {} threads, {}; peak {:.0f} GF/s, reading {:.1f} GB/s\n\n{:<26}{:>8}{:>16}{:>10}{:>9}{}\n",
               kernels().name, threads(), o.dtype, peak * 1e-9, read * 1e-9, "", "format", "inputs→outputs", "GF/s",
               "% peak", torch ? fmt::format("{:>16}{:>10}", torch->title(), "ratio") : "");

  std::set<std::tuple<Index, Index, std::string>> seen;  // one of each kind is timed
  std::vector<model::Linear> all;
  Index widest = 0, longest = 0, bytes = 0, weights = 0;
  for (const model::GgufTensor& w : file.tensors()) {
    if (w.shape.size() != 2 || w.rows() < 2) continue;
    const model::Linear& linear = all.emplace_back(w, dtype, true);
    const Index inputs = linear.inputs(), outputs = linear.outputs(), ldy = round_up(outputs, Index{16});
    widest = std::max(widest, inputs), longest = std::max(longest, ldy), bytes += linear.file_bytes();
    weights += inputs * outputs;
    const std::string format(name_of(w.format));
    if (!seen.insert({outputs, inputs, format}).second) continue;
    const std::vector<float> values = random_values(o.rows * inputs);
    std::vector<float> y(static_cast<size_t>(o.rows * ldy));
    model::Activations x;
    x.assign(values.data(), o.rows, inputs, dtype);
    const model::Linear::Job job{&linear, y.data(), ldy};
    Runs theirs;
    const Json same{{"dtype", o.dtype}, {"rows", o.rows}, {"inputs", inputs}, {"outputs", outputs}};
    const double seconds = best_seconds(
        o.repeat, [&] { model::Linear::apply_all(x, {&job, 1}); },
        [&] {
          if (torch) theirs.add(torch->run(same));
        });
    const double flops = 2.0 * static_cast<double>(o.rows * inputs * outputs), rate = flops / seconds;
    if (!quiet)
      fmt::print(
          "{:<26}{:>8}{:>16}{:>10.0f}{:>9.1f}{}\n", w.name, format, fmt::format("{}→{}", inputs, outputs), rate * 1e-9,
          100 * rate / peak,
          torch ? fmt::format("{:>16.0f}{:>8.2f} ×", flops / theirs.best() * 1e-9, theirs.best() / seconds) : "");
    json["results"].push_back({{"tensor", w.name},
                               {"format", format},
                               {"inputs", inputs},
                               {"outputs", outputs},
                               {"seconds", seconds},
                               {"flops_per_s", rate},
                               {"share_of_peak", rate / peak}});
    if (torch)
      json["results"].back()["against"]["torch"] = {{"version", torch->version()},
                                                    {"seconds", theirs.best()},
                                                    {"flops_per_s", flops / theirs.best()},
                                                    {"ratio", theirs.best() / seconds}};
  }
  // One row goes through every matrix once, as a token that is decoded does: no cache holds them all.
  const std::vector<float> x = random_values(widest);
  std::vector<float> y(static_cast<size_t>(longest));
  const double seconds = best_seconds(o.repeat, [&] {
    for (const model::Linear& linear : all) {
      const model::Linear::Job job{&linear, y.data(), longest};
      model::Linear::apply_row(x.data(), {&job, 1});
    }
  });
  const double rate = static_cast<double>(bytes) / seconds;
  if (!quiet)
    fmt::print("\none row through {} matrices of {}: {:.2f} ms, {:.1f} GB/s, {:.0f} % of reading\n", all.size(),
               bytes_text(bytes), 1e3 * seconds, rate * 1e-9, 100 * rate / read);
  json["one_row"] = {{"matrices", all.size()}, {"bytes", bytes},      {"weights", weights},
                     {"seconds", seconds},     {"bytes_per_s", rate}, {"share_of_read", rate / read}};
  write_json(o.json, json);
}

}  // namespace

void add_bench_linear(CLI::App& bench, Job& job) {
  CLI::App* command = bench.add_subcommand("linear", "The matrices of a model: a prompt's rows at a time, and one row");
  const auto o = std::make_shared<Options>();
  command->add_option("MODEL", o->path, "A GGUF file")->required();
  command->add_option("--rows", o->rows, "Rows of a step of the prefill")
      ->check(whole_number(1, 1 << 16))
      ->capture_default_str();
  command->add_option("--dtype", o->dtype, "Arithmetic: bf16 or f32")
      ->check(one_of({"f32", "bf16"}))
      ->capture_default_str();
  command->add_option("--repeat", o->repeat, "Timed runs")->check(whole_number(1, 1000))->capture_default_str();
  add_against(*command, o->against, {"torch"});
  command->add_option("--json", o->json, "Write the figures as JSON to this file (- for standard output)")
      ->type_name("F");
  command->callback([&job, o] { job = [o] { bench_linear(*o); }; });
}

}  // namespace heed::cli
