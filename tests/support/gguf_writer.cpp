#include "support/gguf_writer.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <stdexcept>

namespace heed::test {

std::uint16_t f16_bits(double x) {
  const std::uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  const double a = std::fabs(x);
  if (!(a < 65520)) return static_cast<std::uint16_t>(sign | 0x7c00);
  // Multiples of 2^-24 below 2^-14, else 10 bits behind the leading one.
  int exponent = -14;
  if (a >= 0x1p-14) std::frexp(a, &exponent), --exponent;
  const auto steps = static_cast<int>(std::nearbyint(std::ldexp(a, 10 - exponent)));
  return static_cast<std::uint16_t>(sign | (steps + (exponent + 14) * 1024));
}

double f16_value(std::uint16_t bits) {
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  double a = exponent == 0 ? std::ldexp(fraction, -24) : std::ldexp(1024 + fraction, exponent - 25);
  if (exponent == 31) a = fraction == 0 ? INFINITY : NAN;
  return (bits & 0x8000) != 0 ? -a : a;
}

namespace {

// Where the parts of one block stand, in bytes from its start.
struct Field {
  size_t byte;
  int shift, bits;
};

using Block = std::vector<std::byte>;

std::uint32_t get(const Block& b, Field f) {
  return std::to_integer<std::uint32_t>(b[f.byte]) >> f.shift & ((1u << f.bits) - 1);
}
void put(Block& b, Field f, std::uint32_t x) {
  b[f.byte] |= static_cast<std::byte>((x & ((1u << f.bits) - 1)) << f.shift);
}

std::uint16_t get16(const Block& b, size_t byte) {
  return static_cast<std::uint16_t>(get(b, {byte, 0, 8}) | get(b, {byte + 1, 0, 8}) << 8);
}
void put16(Block& b, size_t byte, std::uint16_t x) {
  put(b, {byte, 0, 8}, x & 255u);
  put(b, {byte + 1, 0, 8}, x >> 8);
}

// A format of one or two levels: x = d · scale(group) · (q - zero) + m, or - dmin · minimum(group).
struct Format {
  int elements, bytes, bits;  // bits of q
  int zero;                   // what q = 0 is below
  int d_at, m_at;             // f16 scale and f16 shift; -1: none
  bool is_signed;             // q is two's complement
  int group;                  // elements that share a second-level scale; 0: one level
};

Format describe(WeightFormat f) {
  switch (f) {
    case WeightFormat::q4_0: return {32, 18, 4, 8, 0, -1, false, 0};
    case WeightFormat::q4_1: return {32, 20, 4, 0, 0, 2, false, 0};
    case WeightFormat::q5_0: return {32, 22, 5, 16, 0, -1, false, 0};
    case WeightFormat::q5_1: return {32, 24, 5, 0, 0, 2, false, 0};
    case WeightFormat::q8_0: return {32, 34, 8, 0, 0, -1, true, 0};
    case WeightFormat::q4_k: return {256, 144, 4, 0, 0, 2, false, 32};
    case WeightFormat::q5_k: return {256, 176, 5, 0, 0, 2, false, 32};
    case WeightFormat::q6_k: return {256, 210, 6, 32, 208, -1, false, 16};
    default: throw std::logic_error("not a block format");
  }
}

// The pieces of element i's q, lowest bits first.
std::vector<Field> element_at(WeightFormat f, size_t i) {
  const auto nibble32 = [&](size_t base) { return Field{base + i % 16, i < 16 ? 0 : 4, 4}; };
  const auto fifth32 = [&](size_t base) { return Field{base + i / 8, static_cast<int>(i % 8), 1}; };
  // 64 elements share 32 bytes: the first 32 the low nibbles, the others the high ones.
  const auto nibble256 = [&](size_t base) { return Field{base + i / 64 * 32 + i % 32, i % 64 < 32 ? 0 : 4, 4}; };
  switch (f) {
    case WeightFormat::q4_0: return {nibble32(2)};
    case WeightFormat::q4_1: return {nibble32(4)};
    case WeightFormat::q5_0: return {nibble32(6), fifth32(2)};
    case WeightFormat::q5_1: return {nibble32(8), fifth32(4)};
    case WeightFormat::q8_0: return {{2 + i, 0, 8}};
    case WeightFormat::q4_k: return {nibble256(16)};
    case WeightFormat::q5_k: return {nibble256(48), {16 + i % 32, static_cast<int>(i / 32), 1}};
    case WeightFormat::q6_k: {
      // 128 elements share 64 bytes of low nibbles (the first 64 low, the others high) and 32 bytes of pairs of bits.
      const size_t half = i / 128, j = i % 128;
      return {{half * 64 + j % 64, j < 64 ? 0 : 4, 4}, {128 + half * 32 + j % 32, static_cast<int>(j / 32) * 2, 2}};
    }
    default: throw std::logic_error("not a block format");
  }
}

// The pieces of group g's 6-bit scale or minimum (Q4_K, Q5_K), lowest bits first; 12 bytes from byte 4 on.
std::vector<Field> group_at(size_t g, bool minimum) {
  if (g < 4) return {{4 + g + (minimum ? 4 : 0), 0, 6}};
  return {{4 + g + 4, minimum ? 4 : 0, 4}, {4 + g - 4 + (minimum ? 4 : 0), 6, 2}};
}

void put_pieces(Block& b, const std::vector<Field>& pieces, std::uint32_t x) {
  for (const Field& p : pieces) put(b, p, x), x >>= p.bits;
}
std::uint32_t get_pieces(const Block& b, const std::vector<Field>& pieces) {
  std::uint32_t x = 0;
  int at = 0;
  for (const Field& p : pieces) x |= get(b, p) << at, at += p.bits;
  return x;
}

int as_signed_byte(std::uint32_t x) { return static_cast<int>(x) - (x < 128 ? 0 : 256); }

// The value of largest magnitude, with its sign.
double extreme(const double* x, int n) {
  return *std::max_element(x, x + n, [](double a, double b) { return std::fabs(a) < std::fabs(b); });
}

double rounded_ratio(double a, double b, double low, double high) {
  return b == 0 ? std::clamp(0.0, low, high) : std::clamp(std::nearbyint(a / b), low, high);
}

// Scales without a shift: the extreme value maps onto the lowest q, so scales may be negative.
Block encode_symmetric(WeightFormat format, const Format& f, const double* x, std::vector<double>& values) {
  Block b(static_cast<size_t>(f.bytes));
  const double lowest = f.is_signed ? -127 : -f.zero, highest = f.is_signed ? 127 : (1 << f.bits) - 1 - f.zero;
  const int group = f.group != 0 ? f.group : f.elements;
  double d = f16_value(f16_bits(extreme(x, f.elements) / lowest));
  if (f.group != 0) d = f16_value(f16_bits(std::fabs(d) / 127));
  put16(b, static_cast<size_t>(f.d_at), f16_bits(d));
  for (int first = 0; first < f.elements; first += group) {
    double step = d;
    if (f.group != 0) {
      const double scale = rounded_ratio(extreme(x + first, group) / lowest, d, -127, 127);
      put(b, {192 + static_cast<size_t>(first / group), 0, 8}, static_cast<std::uint32_t>(static_cast<int>(scale)));
      step = d * scale;
    }
    for (int i = first; i < first + group; ++i) {
      const double q = rounded_ratio(x[i], step, lowest, highest);
      const int stored = static_cast<int>(q) + (f.is_signed ? 0 : f.zero);
      put_pieces(b, element_at(format, static_cast<size_t>(i)), static_cast<std::uint32_t>(stored));
      values.push_back(step * q);
    }
  }
  return b;
}

// Scale and shift from the least and the greatest value.
Block encode_shifted(WeightFormat format, const Format& f, const double* x, std::vector<double>& values) {
  Block b(static_cast<size_t>(f.bytes));
  const double steps = (1 << f.bits) - 1;
  const int group = f.group != 0 ? f.group : f.elements, groups = f.elements / group;
  std::vector<double> low(static_cast<size_t>(groups)), step(static_cast<size_t>(groups));
  for (int g = 0; g < groups; ++g) {
    const auto [least, greatest] = std::minmax_element(x + g * group, x + (g + 1) * group);
    // Two-level formats store -minimum >= 0.
    low[static_cast<size_t>(g)] = f.group != 0 ? std::min(*least, 0.0) : *least;
    step[static_cast<size_t>(g)] = (*greatest - low[static_cast<size_t>(g)]) / steps;
  }
  double d = step[0], m = low[0];
  if (f.group != 0) {
    d = std::max(0.0, *std::max_element(step.begin(), step.end())) / 63;
    m = -*std::min_element(low.begin(), low.end()) / 63;
  }
  d = f16_value(f16_bits(d)), m = f16_value(f16_bits(m));
  put16(b, static_cast<size_t>(f.d_at), f16_bits(d));
  put16(b, static_cast<size_t>(f.m_at), f16_bits(m));
  for (int g = 0; g < groups; ++g) {
    double unit = d, base = m;
    if (f.group != 0) {
      const double scale = rounded_ratio(step[static_cast<size_t>(g)], d, 0, 63);
      const double minimum = rounded_ratio(-low[static_cast<size_t>(g)], m, 0, 63);
      put_pieces(b, group_at(static_cast<size_t>(g), false), static_cast<std::uint32_t>(scale));
      put_pieces(b, group_at(static_cast<size_t>(g), true), static_cast<std::uint32_t>(minimum));
      unit = d * scale, base = -m * minimum;
    }
    for (int i = g * group; i < (g + 1) * group; ++i) {
      const double q = rounded_ratio(x[i] - base, unit, 0, steps);
      put_pieces(b, element_at(format, static_cast<size_t>(i)), static_cast<std::uint32_t>(q));
      values.push_back(unit * q + base);
    }
  }
  return b;
}

std::uint16_t nearest_bf16_bits(double x) {
  const auto bits = std::bit_cast<std::uint32_t>(static_cast<float>(x));
  const std::uint32_t below = bits & 0xffffu, kept = bits >> 16;
  const bool up = below > 0x8000u || (below == 0x8000u && kept % 2 == 1);
  return static_cast<std::uint16_t>(kept + (up ? 1 : 0));
}

double bf16_value(std::uint16_t bits) { return std::bit_cast<float>(static_cast<std::uint32_t>(bits) << 16); }

void append(std::vector<std::byte>& to, const std::string& from) {
  for (const char c : from) to.push_back(static_cast<std::byte>(c));
}

}  // namespace

Encoded encode(WeightFormat format, const std::vector<double>& x) {
  Encoded e;
  if (format == WeightFormat::f32 || format == WeightFormat::f16 || format == WeightFormat::bf16) {
    for (const double value : x) {
      if (format == WeightFormat::f32) append(e.bytes, le(std::bit_cast<std::uint32_t>(static_cast<float>(value))));
      if (format == WeightFormat::f16) append(e.bytes, le(f16_bits(value)));
      if (format == WeightFormat::bf16) append(e.bytes, le(nearest_bf16_bits(value)));
    }
    e.values = decode(format, e.bytes);
    return e;
  }
  const Format f = describe(format);
  if (x.size() % static_cast<size_t>(f.elements) != 0) throw std::logic_error("not a whole number of blocks");
  for (size_t i = 0; i < x.size(); i += static_cast<size_t>(f.elements)) {
    const auto encode_block = f.m_at >= 0 ? encode_shifted : encode_symmetric;
    const Block b = encode_block(format, f, &x[i], e.values);
    e.bytes.insert(e.bytes.end(), b.begin(), b.end());
  }
  return e;
}

std::vector<double> decode(WeightFormat format, const std::vector<std::byte>& bytes) {
  std::vector<double> values;
  if (format == WeightFormat::f32)
    for (size_t i = 0; i < bytes.size(); i += 4)
      values.push_back(std::bit_cast<float>(static_cast<std::uint32_t>(get16(bytes, i)) |
                                            static_cast<std::uint32_t>(get16(bytes, i + 2)) << 16));
  if (format == WeightFormat::f16)
    for (size_t i = 0; i < bytes.size(); i += 2) values.push_back(f16_value(get16(bytes, i)));
  if (format == WeightFormat::bf16)
    for (size_t i = 0; i < bytes.size(); i += 2) values.push_back(bf16_value(get16(bytes, i)));
  if (!values.empty() || bytes.empty()) return values;

  const Format f = describe(format);
  for (auto start = bytes.begin(); start != bytes.end(); start += f.bytes) {
    const Block b(start, start + f.bytes);
    const double d = f16_value(get16(b, static_cast<size_t>(f.d_at)));
    const double m = f.m_at < 0 ? 0 : f16_value(get16(b, static_cast<size_t>(f.m_at)));
    for (size_t i = 0; i < static_cast<size_t>(f.elements); ++i) {
      const std::uint32_t stored = get_pieces(b, element_at(format, i));
      const double q = f.is_signed ? as_signed_byte(stored) : static_cast<int>(stored) - f.zero;
      if (f.group == 0) {
        values.push_back(d * q + m);
      } else if (f.m_at < 0) {
        values.push_back(d * as_signed_byte(get(b, {192 + i / 16, 0, 8})) * q);
      } else {
        const size_t g = i / 32;
        values.push_back(d * get_pieces(b, group_at(g, false)) * q - m * get_pieces(b, group_at(g, true)));
      }
    }
  }
  return values;
}

std::string counted(std::string_view text) { return le(std::uint64_t{text.size()}) + std::string(text); }

void GgufWriter::key(std::string_view name, std::uint32_t type) {
  metadata_ += counted(name) + le(type);
  ++keys_;
}

GgufWriter& GgufWriter::raw(std::string_view name, std::uint32_t type, std::string_view bytes) {
  key(name, type);
  metadata_ += bytes;
  return *this;
}

GgufWriter& GgufWriter::u32(std::string_view name, std::uint32_t x) { return raw(name, 4, le(x)); }
GgufWriter& GgufWriter::i32(std::string_view name, std::int32_t x) { return raw(name, 5, le(x)); }
GgufWriter& GgufWriter::f32(std::string_view name, float x) {
  return raw(name, 6, le(std::bit_cast<std::uint32_t>(x)));
}
GgufWriter& GgufWriter::boolean(std::string_view name, bool x) { return raw(name, 7, le(std::uint8_t{x})); }
GgufWriter& GgufWriter::text(std::string_view name, std::string_view x) { return raw(name, 8, counted(x)); }
GgufWriter& GgufWriter::u64(std::string_view name, std::uint64_t x) { return raw(name, 10, le(x)); }

GgufWriter& GgufWriter::texts(std::string_view name, const std::vector<std::string>& x) {
  std::string bytes = le(std::uint32_t{8}) + le(std::uint64_t{x.size()});
  for (const std::string& item : x) bytes += counted(item);
  return raw(name, 9, bytes);
}

GgufWriter& GgufWriter::f32s(std::string_view name, const std::vector<float>& x) {
  std::string bytes = le(std::uint32_t{6}) + le(std::uint64_t{x.size()});
  for (const float item : x) bytes += le(std::bit_cast<std::uint32_t>(item));
  return raw(name, 9, bytes);
}

GgufWriter& GgufWriter::i32s(std::string_view name, const std::vector<std::int32_t>& x) {
  std::string bytes = le(std::uint32_t{5}) + le(std::uint64_t{x.size()});
  for (const std::int32_t item : x) bytes += le(item);
  return raw(name, 9, bytes);
}

GgufWriter& GgufWriter::align(std::uint32_t alignment) {
  alignment_ = alignment;
  return u32("general.alignment", alignment);
}

std::uint64_t GgufWriter::data(const void* bytes, size_t count) {
  while (data_.size() % alignment_ != 0) data_ += '\0';
  const std::uint64_t offset = data_.size();
  data_.append(static_cast<const char*>(bytes), count);
  return offset;
}

std::vector<double> GgufWriter::tensor(std::string_view name, const std::vector<std::int64_t>& shape,
                                       WeightFormat format, const std::vector<double>& x) {
  Encoded e = encode(format, x);
  const std::vector<std::uint64_t> extents(shape.rbegin(), shape.rend());
  raw_tensor(name, extents, static_cast<std::uint32_t>(format), data(e.bytes.data(), e.bytes.size()));
  return std::move(e.values);
}

GgufWriter& GgufWriter::raw_tensor(std::string_view name, const std::vector<std::uint64_t>& extents, std::uint32_t type,
                                   std::uint64_t offset) {
  descriptions_ += counted(name) + le(static_cast<std::uint32_t>(extents.size()));
  for (const std::uint64_t extent : extents) descriptions_ += le(extent);
  descriptions_ += le(type) + le(offset);
  ++tensors_;
  return *this;
}

GgufWriter& GgufWriter::claim_tensors(std::uint64_t n) {
  tensors_ = n;
  return *this;
}

GgufWriter& GgufWriter::claim_keys(std::uint64_t n) {
  keys_ = n;
  return *this;
}

std::string GgufWriter::file() const {
  std::string bytes = "GGUF" + le(version_) + le(tensors_) + le(keys_) + metadata_ + descriptions_;
  if (!data_.empty())
    while (alignment_ != 0 && bytes.size() % alignment_ != 0) bytes += '\0';
  return bytes + data_;
}

}  // namespace heed::test
