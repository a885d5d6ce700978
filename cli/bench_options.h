// What `heed bench attend` and `heed bench backward` are told, and the tensors that they attend to.
#pragma once

#include <CLI/CLI.hpp>

#include <optional>
#include <string>
#include <vector>

#include "cli/tensors.h"

namespace heed::cli {

struct BenchOptions {
  std::vector<std::string> mechanisms, against;
  std::string dtype, json;
  int repeat = 1;
  bool full = false;
  std::string path;
  Index length = 8192, heads = 2, kv_heads = 0, head_size = 64;
  std::uint64_t seed = 0;

  /// Adds the options, with defaults that differ: number type and how often to run.
  void add(CLI::App& command, std::string default_dtype, int default_repeat);
  /// q, k, v and what else a file holds, or random numbers in [-1, 1); kept here. Throws Error for a file that cannot
  /// be used.
  const AttendInput& fill();
  /// More random numbers, after those of q, k and v.
  std::vector<float> more(Index count) const;
  bool wants(DType type) const { return dtype == "both" || dtype == name_of(type); }

 private:
  std::optional<OpenedTensors> opened_;
  std::vector<float> memory_[3];
  AttendInput input_;
};

}  // namespace heed::cli
