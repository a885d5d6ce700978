// Small GGUF files in memory, and an encoder for every weight format, written from the description
// of the format: element by element, bit by bit, sharing nothing with heed's readers.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "heed/kernel/quant.h"

namespace heed::test {

/// Nearest f16 to x (ties to even; too large: infinity), and what an f16 stands for.
std::uint16_t f16_bits(double x);
double f16_value(std::uint16_t bits);

/// Encoded blocks and, exactly, the values they stand for.
struct Encoded {
  std::vector<std::byte> bytes;
  std::vector<double> values;
};

/// Quantises x, whose size must be a multiple of the format's block, simply rather than well.
Encoded encode(WeightFormat format, const std::vector<double>& x);

/// What a block's bytes stand for, element by element, exactly (x.size() elements are appended).
std::vector<double> decode(WeightFormat format, const std::vector<std::byte>& bytes);

/// Collects metadata and tensors in the order they come; nothing is checked, so wrong files can be
/// made too. Type numbers of metadata values are those of the format.
class GgufWriter {
 public:
  explicit GgufWriter(std::uint32_t version = 3) : version_(version) {}

  GgufWriter& u32(std::string_view key, std::uint32_t x);
  GgufWriter& u64(std::string_view key, std::uint64_t x);
  GgufWriter& i32(std::string_view key, std::int32_t x);
  GgufWriter& f32(std::string_view key, float x);
  GgufWriter& boolean(std::string_view key, bool x);
  GgufWriter& text(std::string_view key, std::string_view x);
  GgufWriter& texts(std::string_view key, const std::vector<std::string>& x);
  GgufWriter& f32s(std::string_view key, const std::vector<float>& x);
  GgufWriter& i32s(std::string_view key, const std::vector<std::int32_t>& x);
  /// Any type number with any bytes behind it.
  GgufWriter& raw(std::string_view key, std::uint32_t type, std::string_view bytes);

  /// Data and general.alignment follow this; call it before any tensor.
  GgufWriter& align(std::uint32_t alignment);

  /// A tensor of the given shape, outermost extent first; returns the values its blocks stand for.
  std::vector<double> tensor(std::string_view name, const std::vector<std::int64_t>& shape, WeightFormat format,
                             const std::vector<double>& x);
  /// A tensor as described, extents innermost first as the file has them, at any offset.
  GgufWriter& raw_tensor(std::string_view name, const std::vector<std::uint64_t>& extents, std::uint32_t type,
                         std::uint64_t offset);
  /// Bytes behind everything added so far, padded to the alignment; returns their offset.
  std::uint64_t data(const void* bytes, size_t count);

  /// The counts in the header, where they shall differ from the truth.
  GgufWriter& claim_tensors(std::uint64_t n);
  GgufWriter& claim_keys(std::uint64_t n);

  /// The whole file.
  std::string file() const;

 private:
  void key(std::string_view name, std::uint32_t type);
  std::uint32_t version_;
  std::uint64_t alignment_ = 32, tensors_ = 0, keys_ = 0;
  std::string metadata_, descriptions_, data_;
};

/// Little-endian bytes of a number, and a string behind its length, as GGUF stores them.
template <class T>
std::string le(T x) {
  std::string bytes;
  for (size_t i = 0; i < sizeof(T); ++i) bytes += static_cast<char>(static_cast<std::uint64_t>(x) >> (8 * i) & 0xff);
  return bytes;
}
std::string counted(std::string_view text);

}  // namespace heed::test
