// How much memory a job takes, and how much there is.

#include <algorithm>
#include <fstream>
#include <limits>
#include <sstream>

#include "heed/model/weights.h"

namespace heed::model {
namespace {

constexpr Index unknown = std::numeric_limits<Index>::max();

// The first number of a file such as memory.max; `unknown` for "max" or when it cannot be read.
Index number_in(const std::string& path) {
  std::ifstream file(path);
  Index n = 0;
  return file >> n && n >= 0 ? n : unknown;
}

// "NAME VALUE" or "NAME: VALUE" in a file of such lines.
Index line_of(const std::string& path, const std::string& name) {
  std::ifstream file(path);
  std::string word;
  for (Index n = 0; file >> word; file.ignore(std::numeric_limits<std::streamsize>::max(), '\n'))
    if (word == name && file >> n) return n;
  return unknown;
}

// What the limit of one cgroup leaves. Cached file pages give way, so they do not count as used.
Index left_in(const std::string& folder) {
  const Index most = number_in(folder + "/memory.max"), used = number_in(folder + "/memory.current");
  if (most == unknown) return unknown;
  const Index cached = line_of(folder + "/memory.stat", "inactive_file");
  return std::max<Index>(0, most - (used == unknown ? 0 : used) + (cached == unknown ? 0 : cached));
}

}  // namespace

Index available_memory() {
  const Index kib = line_of("/proc/meminfo", "MemAvailable:");
  Index least = kib == unknown ? unknown : kib * 1024;

  // cgroup v2 names this process's group as "0::/a/b"; every group above it limits too.
  const std::string root = "/sys/fs/cgroup";
  std::ifstream file("/proc/self/cgroup");
  std::string group;
  for (std::string line; std::getline(file, line);)
    if (line.rfind("0::", 0) == 0) group = line.substr(3);
  while (!group.empty() && group != "/") {
    least = std::min(least, left_in(root + group));
    group.resize(group.rfind('/') == std::string::npos ? 0 : group.rfind('/'));
  }
  return std::min(least, left_in(root));
}

Index estimate_weight_bytes(const Gguf& file, DType arithmetic) {
  const ModelInfo info = read_info(file);
  Index bytes = 0;
  for (const TensorSpec& spec : expected_tensors(info)) {
    const GgufTensor& t = file.tensor(spec.name, spec.shape);
    if (spec.shape.size() == 1) bytes += spec.shape[0] * 4;
    else if (spec.name == "token_embd.weight") bytes += static_cast<Index>(t.bytes.size());
    else bytes += Linear::packed_bytes(spec.shape[0], spec.shape[1], arithmetic);
  }
  if (info.tied_output) bytes += Linear::packed_bytes(info.vocabulary, info.width, arithmetic);
  return bytes;
}

DType stored_kv(DType arithmetic, DType kv) { return arithmetic == DType::f32 && kv == DType::bf16 ? DType::f32 : kv; }

Index kv_bytes_per_token(const ModelInfo& info, DType kv) {
  const PanelLayout layout = panel_layout(kv, info.head_size, info.head_size);
  const Index scales = kv == DType::i8 ? 2 * static_cast<Index>(sizeof(float)) : 0;
  return info.layers * info.kv_heads * (layout.panel_bytes() / panel_columns + scales);
}

Index estimate_kv_bytes(const ModelInfo& info, DType kv, Index tokens, Index chunk) {
  // What a window has left is dropped when a whole panel of it may be.
  const Index local = std::min(tokens, info.window + SessionOptions{}.rewind + chunk + panel_columns);
  const Index windows = static_cast<Index>(std::count(info.local.begin(), info.local.end(), true));
  return kv_bytes_per_token(info, kv) / info.layers * ((info.layers - windows) * tokens + windows * local);
}

}  // namespace heed::model
