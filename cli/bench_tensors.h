// What `heed bench attend` and `heed bench backward` attend to.
#pragma once

#include <CLI/CLI.hpp>

#include <optional>
#include <string>
#include <vector>

#include "cli/tensors.h"

namespace heed::cli {

/// q, k, v and what else a file holds, or random numbers in [-1, 1).
struct BenchTensors {
  std::string path;
  Index length = 8192, heads = 2, kv_heads = 0, head_size = 64;
  std::uint64_t seed = 0;

  void add(CLI::App& command);
  /// The tensors, which this keeps. Throws Error for a file that cannot be used.
  const AttendInput& fill();
  /// More random numbers, after those of q, k and v.
  std::vector<float> more(Index count) const;

 private:
  std::optional<OpenedTensors> opened_;
  std::vector<float> memory_[3];
  AttendInput input_;
};

}  // namespace heed::cli
