#include "cli/bench_options.h"

#include "cli/bench.h"
#include "cli/peer.h"
#include "heed/base/random.h"

namespace heed::cli {
namespace {

std::vector<float> random_values(Index n, Random& random) {
  std::vector<float> x(static_cast<size_t>(n));
  for (float& e : x) e = static_cast<float>(2 * random.uniform() - 1);
  return x;
}

}  // namespace

void BenchOptions::add(CLI::App& command, std::string default_dtype, int default_repeat) {
  dtype = std::move(default_dtype), repeat = default_repeat;
  command.add_option("--mechanism", mechanisms, "NAME[:p=v,…], may be given several times; dense first gives ratios")
      ->take_all();
  command.add_option("--input", path, "A safetensors file with q, k, v and extra tensors (default: random numbers)")
      ->type_name("F");
  command.add_option("--length", length, "Tokens N = M")->check(whole_number(1, 1 << 24))->capture_default_str();
  command.add_option("--heads", heads, "Query heads")->check(whole_number(1, 1024))->capture_default_str();
  command.add_option("--kv-heads", kv_heads, "Key heads (default: as many as query heads)")
      ->check(whole_number(1, 1024));
  command.add_option("--head-size", head_size, "D")->check(whole_number(1, 512))->capture_default_str();
  command.add_option("--dtype", dtype, "f32, bf16 or both")
      ->check(one_of({"f32", "bf16", "both"}))
      ->capture_default_str();
  command.add_option("--repeat", repeat, "Timed runs")->check(whole_number(1, 1000))->capture_default_str();
  command.add_option("--seed", seed, "Seed of the random numbers")->check(whole_number(0))->capture_default_str();
  command.add_flag("--full", full, "Not causal, where a mechanism leaves the choice");
  add_against(command, against, {"torch"});
  command.add_option("--json", json, "Write the figures as JSON to this file (- for standard output)")->type_name("F");
}

const AttendInput& BenchOptions::fill() {
  if (!path.empty()) {
    TensorOptions file;
    file.in = path;
    return input_ = opened_.emplace(file.open()).input;
  }
  Random random(seed);
  TensorView* views[3] = {&input_.q, &input_.k, &input_.v};
  for (int i = 0; i < 3; ++i) {
    const Index some = i == 0 || kv_heads == 0 ? heads : kv_heads;
    memory_[i] = random_values(some * length * head_size, random);
    *views[i] = {memory_[i].data(), DType::f32, {1, some, length, head_size}};
  }
  return input_;
}

std::vector<float> BenchOptions::more(Index count) const {
  Random random(seed + 1);
  return random_values(count, random);
}

}  // namespace heed::cli
