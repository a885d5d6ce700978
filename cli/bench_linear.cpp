// heed bench linear: the matrices of a model, many rows at a time and one.

#include <fmt/format.h>

#include <algorithm>
#include <memory>
#include <set>

#include "cli/bench.h"
#include "heed/base/random.h"
#include "heed/base/threads.h"
#include "heed/kernel/kernels.h"
#include "heed/model/linear.h"

namespace heed::cli {
namespace {

struct Options {
  std::string path, dtype = "bf16", json;
  Index rows = 512;
  int repeat = 7;
};

double best_seconds(const model::Linear& linear, const model::Activations& x, std::vector<float>& y, int repeat) {
  const Index ldy = round_up(linear.outputs(), Index{16});
  double best = 1e300;
  for (int i = 0; i <= repeat; ++i) {
    const double start = seconds_now();
    linear.apply(x, y.data(), ldy);
    if (i > 0) best = std::min(best, seconds_now() - start);
  }
  return best;
}

void bench_linear(const Options& o) {
  const model::Gguf file = model::Gguf::open(o.path);
  const DType dtype = dtype_named(o.dtype);
  const Peaks machine = peaks();
  const double peak = dtype == DType::bf16 && machine.bf16 > 0 ? machine.bf16 : machine.f32,
               read = bandwidth(threads());
  Json json{{"machine", machine_name()}, {"isa", kernels().name}, {"threads", threads()},    {"model", o.path},
            {"dtype", o.dtype},          {"peak", peak},          {"read_bytes_per_s", read}};
  const bool quiet = o.json == "-";
  if (!quiet)
    fmt::print("{}, {} threads, {}; peak {:.0f} GF/s, reading {:.1f} GB/s\n\n{:<26}{:>8}{:>16}{:>10}{:>9}{:>14}{:>9}\n",
               kernels().name, threads(), o.dtype, peak * 1e-9, read * 1e-9, "", "format", "inputs→outputs",
               fmt::format("{} rows", o.rows), "% peak", "one row GB/s", "% read");
  std::set<std::tuple<Index, Index, std::string>> seen;
  for (const model::GgufTensor& w : file.tensors()) {
    if (w.shape.size() != 2 || w.rows() < 2) continue;
    const std::string format(name_of(w.format));
    if (!seen.insert({w.rows(), w.columns(), format}).second) continue;  // one of each kind
    const model::Linear linear(w, dtype);
    const Index inputs = linear.inputs(), outputs = linear.outputs();
    Random random(1);
    std::vector<float> values(static_cast<size_t>(o.rows * inputs)),
        y(static_cast<size_t>(o.rows * round_up(outputs, Index{16})));
    for (float& v : values) v = static_cast<float>(random.normal());
    model::Activations many, one;
    many.assign(values.data(), o.rows, inputs, dtype);
    one.assign(values.data(), 1, inputs, dtype);
    const double many_s = best_seconds(linear, many, y, o.repeat), one_s = best_seconds(linear, one, y, 4 * o.repeat);
    const double rate = 2.0 * static_cast<double>(o.rows * inputs * outputs) / many_s;
    const double bytes = static_cast<double>(linear.bytes()) / one_s;
    if (!quiet)
      fmt::print("{:<26}{:>8}{:>16}{:>10.0f}{:>9.1f}{:>14.1f}{:>9.1f}\n", w.name, format,
                 fmt::format("{}→{}", inputs, outputs), rate * 1e-9, 100 * rate / peak, bytes * 1e-9,
                 100 * bytes / read);
    json["results"].push_back({{"tensor", w.name},
                               {"format", format},
                               {"inputs", inputs},
                               {"outputs", outputs},
                               {"rows", o.rows},
                               {"rows_s", many_s},
                               {"flops_per_s", rate},
                               {"share_of_peak", rate / peak},
                               {"row_s", one_s},
                               {"row_bytes", linear.bytes()},
                               {"row_bytes_per_s", bytes},
                               {"share_of_read", bytes / read}});
  }
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
  command->add_option("--json", o->json, "Write the figures as JSON to this file (- for standard output)")
      ->type_name("F");
  command->callback([&job, o] { job = [o] { bench_linear(*o); }; });
}

}  // namespace heed::cli
