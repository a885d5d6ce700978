// Small language models with random weights: as GGUF files, and run in f64 straight from the
// equations. Nothing here uses heed's arithmetic.
#pragma once

#include <map>
#include <set>
#include <string>
#include <vector>

#include "support/gguf_writer.h"

namespace heed::test {

/// Sizes of a model that is made up. Tokens are the 256 bytes (byte-level BPE), one merge, and an
/// end mark, so there are 258 of them.
struct TinySizes {
  std::string architecture = "llama";  // or gemma3
  int layers = 2, width = 48, ffn = 80, heads = 4, kv_heads = 2, head_size = 12, context = 512;
  int window = 0;                      // gemma3: of its local layers, all but the last of six
  bool tied = true;
  bool key_length = false;             // says the head size in the file
  WeightFormat weights = WeightFormat::f32;  // of the matrices; extents must fit its blocks
  double rope_base = 1e4;
};

class TinyModel {
 public:
  static constexpr int vocabulary = 258;
  explicit TinyModel(const TinySizes& sizes, std::uint64_t seed = 1);

  struct Matrix {
    std::vector<std::int64_t> shape;
    WeightFormat format = WeightFormat::f32;
    std::vector<double> written, values;  // before encoding, and as the file's blocks stand for
  };
  /// What the file holds: tests may change, add or drop tensors.
  std::map<std::string, Matrix> tensors;
  const TinySizes sizes;

  /// A file with all metadata and no tensors yet. Keys in `changed` are left out: whoever wants them
  /// otherwise writes them himself.
  GgufWriter metadata(const std::set<std::string>& changed = {}) const;
  void write_tensors(GgufWriter& writer) const;
  std::string file() const;
  /// Logits after every token, [tokens][vocabulary].
  std::vector<std::vector<double>> logits(const std::vector<int>& tokens) const;

 private:
  void add(const std::string& name, std::vector<std::int64_t> shape, WeightFormat format, double scale, double centre);
  const std::vector<double>& values(const std::string& name) const { return tensors.at(name).values; }
  std::vector<double> multiply(const std::string& name, const std::vector<double>& x) const;
  std::vector<double> norm(const std::string& name, std::vector<double> x) const;
  void attention(int layer, std::vector<std::vector<double>>& x) const;
  void feed_forward(int layer, std::vector<double>& x) const;
  std::uint64_t state_;
};

}  // namespace heed::test
