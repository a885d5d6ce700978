// GGUF model files, versions 2 and 3, read in place through mmap with every length checked.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "heed/base/tensor.h"
#include "heed/base/types.h"
#include "heed/kernel/quant.h"

namespace heed::model {

/// A metadata value: integers widened to 64 bits, floats to f64, arrays of one type (integers and
/// booleans as i64).
using MetaValue = std::variant<std::uint64_t, std::int64_t, double, bool, std::string, std::vector<std::int64_t>,
                               std::vector<double>, std::vector<std::string>>;

/// One tensor of the file. Shape is outermost first (rows, columns): GGUF's order reversed.
struct GgufTensor {
  std::string name;
  WeightFormat format;
  Shape shape;
  std::span<const std::byte> bytes;  // inside the mapping; length checked against shape and format

  /// Rows of the last axis: elements(shape) / shape.back().
  Index rows() const;
  Index columns() const { return shape.back(); }
  /// Bytes of one row in the file's format.
  Index row_bytes() const;
  /// Widens row r, 0 … rows()-1, to f32 (columns() values).
  void read_row(Index r, float* out) const;
};

/// A parsed file. The mapping lives as long as this object; tensors point into it.
class Gguf {
 public:
  /// Maps and parses `path`. Throws Error naming the path and the culprit: not a GGUF file, an
  /// unsupported version, a length or offset outside the file, an unsupported tensor type
  /// (the message lists what is supported), a duplicate name, tensors that overlap. Allocates no
  /// more than a small multiple of the file's bytes, whatever the file claims.
  static Gguf open(const std::string& path);
  /// Parses bytes that the caller keeps alive; `name` stands for the path in messages.
  static Gguf parse(std::span<const std::byte> bytes, const std::string& name);

  int version() const { return version_; }
  const std::string& name() const { return name_; }
  Index file_bytes() const { return static_cast<Index>(bytes_.size()); }
  const std::map<std::string, MetaValue, std::less<>>& metadata() const { return metadata_; }
  const std::vector<GgufTensor>& tensors() const { return tensors_; }

  bool has(std::string_view key) const { return metadata_.find(key) != metadata_.end(); }
  /// Typed reads. Without a default a missing key is an Error; a wrong type always is. An integer
  /// serves as a number.
  Index integer(std::string_view key) const;
  Index integer_or(std::string_view key, Index otherwise) const;
  double number(std::string_view key) const;
  double number_or(std::string_view key, double otherwise) const;
  bool boolean_or(std::string_view key, bool otherwise) const;
  const std::string& text(std::string_view key) const;
  std::string text_or(std::string_view key, std::string otherwise) const;
  const std::vector<std::string>& texts(std::string_view key) const;
  const std::vector<double>& numbers(std::string_view key) const;
  const std::vector<std::int64_t>& integers(std::string_view key) const;

  /// nullptr when there is no such tensor.
  const GgufTensor* find(std::string_view tensor) const;
  /// Throws Error when it is missing or its shape is not `expected`.
  const GgufTensor& tensor(std::string_view name, const Shape& expected) const;

 private:
  const MetaValue& value(std::string_view key) const;
  template <class T>
  const T& typed(std::string_view key, std::string_view expected) const;
  [[noreturn]] void wrong_type(std::string_view key, std::string_view expected) const;

  std::string name_;
  int version_ = 0;
  std::shared_ptr<void> mapping_;
  std::span<const std::byte> bytes_;
  std::map<std::string, MetaValue, std::less<>> metadata_;
  std::vector<GgufTensor> tensors_;
  std::map<std::string, size_t, std::less<>> by_name_;
};

}  // namespace heed::model
