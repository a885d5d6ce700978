#include "heed/kernel/quant.h"

#include <algorithm>
#include <array>
#include <cstring>

#include "heed/base/error.h"
#include "heed/kernel/group_scales.h"

namespace heed {
namespace {

struct FormatInfo {
  WeightFormat format;
  std::string_view name;
  BlockLayout layout;
};

constexpr std::array<FormatInfo, 11> formats{{
    {WeightFormat::f32, "F32", {1, 4}},
    {WeightFormat::f16, "F16", {1, 2}},
    {WeightFormat::bf16, "BF16", {1, 2}},
    {WeightFormat::q4_0, "Q4_0", {32, 18}},
    {WeightFormat::q4_1, "Q4_1", {32, 20}},
    {WeightFormat::q5_0, "Q5_0", {32, 22}},
    {WeightFormat::q5_1, "Q5_1", {32, 24}},
    {WeightFormat::q8_0, "Q8_0", {32, 34}},
    {WeightFormat::q4_k, "Q4_K", {256, 144}},
    {WeightFormat::q5_k, "Q5_K", {256, 176}},
    {WeightFormat::q6_k, "Q6_K", {256, 210}},
}};

const FormatInfo& info(WeightFormat format) {
  for (const FormatInfo& f : formats)
    if (f.format == format) return f;
  fail("weight format = {}, expected one of {}", static_cast<std::uint32_t>(format), supported_weight_formats());
}

using Byte = std::uint8_t;

// Fields are copied out of the block first: it may stand at any address, and bytes may alias `out`.
template <size_t n>
std::array<Byte, n> bytes_at(const Byte* p) {
  std::array<Byte, n> field;
  std::memcpy(field.data(), p, n);
  return field;
}

std::uint16_t u16_at(const Byte* p) {
  std::uint16_t x;
  std::memcpy(&x, p, sizeof(x));
  return x;
}

float half_at(const Byte* p) { return f16_to_f32(u16_at(p)); }

// Both kinds of exponent are computed and one is chosen, so that the loop over elements vectorises.
float widen_half(std::uint16_t h) {
  const std::uint32_t sign = (h & 0x8000u) << 16, rest = h & 0x7fffu;
  const std::uint32_t normal = (rest << 13) + (112u << 23);
  const std::uint32_t tiny = std::bit_cast<std::uint32_t>(static_cast<float>(static_cast<int>(rest)) * 0x1p-24f);
  const std::uint32_t infinite = (rest << 13) | 0x7f800000u;
  const std::uint32_t magnitude = rest < 0x0400u ? tiny : (rest < 0x7c00u ? normal : infinite);
  return std::bit_cast<float>(sign | magnitude);
}

// Plain floats, in pieces of `piece` elements that are copied to aligned memory.
constexpr Index piece = 256;

template <class Widen>
void widen_16(const Byte* p, Index count, float* out, Widen widen) {
  std::array<std::uint16_t, piece> x;
  for (Index i = 0; i < count; i += piece) {
    const Index n = std::min(piece, count - i);
    std::memcpy(x.data(), p + 2 * i, static_cast<size_t>(n) * 2);
    for (Index j = 0; j < n; ++j) out[i + j] = widen(x[static_cast<size_t>(j)]);
  }
}

// 32-element blocks. Element j < 16 has the low nibble of qs[j], element j + 16 the high one; five-bit
// formats keep bit 4 of element j in bit j of a 32-bit word.

void nibbles(const std::array<Byte, 16>& qs, std::array<int, 32>& q) {
  for (size_t j = 0; j < 16; ++j) {
    q[j] = qs[j] & 15;
    q[j + 16] = qs[j] >> 4;
  }
}

void add_fifth_bits(const Byte* p, std::array<int, 32>& q) {
  std::uint32_t bits;
  std::memcpy(&bits, p, sizeof(bits));
  for (std::uint32_t j = 0; j < 32; ++j) q[j] |= static_cast<int>(bits >> j & 1u) << 4;
}

void scale_block(const std::array<int, 32>& q, float d, int zero, float* out) {
  for (size_t j = 0; j < 32; ++j) out[j] = d * static_cast<float>(q[j] - zero);
}

void scale_shift_block(const std::array<int, 32>& q, float d, float m, float* out) {
  for (size_t j = 0; j < 32; ++j) out[j] = d * static_cast<float>(q[j]) + m;
}

void q4_0_block(const Byte* p, float* out) {  // d f16, qs [16]
  std::array<int, 32> q;
  nibbles(bytes_at<16>(p + 2), q);
  scale_block(q, half_at(p), 8, out);
}

void q4_1_block(const Byte* p, float* out) {  // d f16, m f16, qs [16]
  std::array<int, 32> q;
  nibbles(bytes_at<16>(p + 4), q);
  scale_shift_block(q, half_at(p), half_at(p + 2), out);
}

void q5_0_block(const Byte* p, float* out) {  // d f16, fifth bits u32, qs [16]
  std::array<int, 32> q;
  nibbles(bytes_at<16>(p + 6), q);
  add_fifth_bits(p + 2, q);
  scale_block(q, half_at(p), 16, out);
}

void q5_1_block(const Byte* p, float* out) {  // d f16, m f16, fifth bits u32, qs [16]
  std::array<int, 32> q;
  nibbles(bytes_at<16>(p + 8), q);
  add_fifth_bits(p + 4, q);
  scale_shift_block(q, half_at(p), half_at(p + 2), out);
}

void q8_0_block(const Byte* p, float* out) {  // d f16, qs i8 [32]
  const float d = half_at(p);
  const auto q = bytes_at<32>(p + 2);
  for (size_t j = 0; j < 32; ++j) out[j] = d * static_cast<float>(static_cast<std::int8_t>(q[j]));
}

// 256-element blocks of 8 groups of 32: x = d·scale·q - dmin·minimum, scale and minimum of 6 bits.
struct Groups {
  float scale[8], minimum[8];  // d and dmin multiplied in
};
Groups groups_at(const Byte* p) {  // d f16, dmin f16, packed [12]
  const GroupScales packed = group_scales(p + 4);
  const float d = half_at(p), dmin = half_at(p + 2);
  Groups g;
  for (size_t i = 0; i < 8; ++i) {
    g.scale[i] = d * static_cast<float>(packed.scale[i]);
    g.minimum[i] = dmin * static_cast<float>(packed.minimum[i]);
  }
  return g;
}

// qs: 32 bytes serve two groups, the even one by its low nibbles, the odd one by its high nibbles.

void q4_k_block(const Byte* p, float* out) {  // groups [16], qs [128]
  const Groups g = groups_at(p);
  for (size_t pair = 0; pair < 4; ++pair, out += 64) {
    const auto q = bytes_at<32>(p + 16 + 32 * pair);
    for (size_t j = 0; j < 32; ++j) out[j] = g.scale[2 * pair] * static_cast<float>(q[j] & 15) - g.minimum[2 * pair];
    for (size_t j = 0; j < 32; ++j)
      out[j + 32] = g.scale[2 * pair + 1] * static_cast<float>(q[j] >> 4) - g.minimum[2 * pair + 1];
  }
}

// qh: bit g of byte j is the fifth bit of element j of group g.
void q5_k_block(const Byte* p, float* out) {  // groups [16], qh [32], qs [128]
  const Groups g = groups_at(p);
  const auto high = bytes_at<32>(p + 16);
  for (size_t pair = 0; pair < 4; ++pair, out += 64) {
    const auto q = bytes_at<32>(p + 48 + 32 * pair);
    for (size_t j = 0; j < 32; ++j) {
      const int low = (q[j] & 15) | (high[j] >> (2 * pair) & 1) << 4;
      out[j] = g.scale[2 * pair] * static_cast<float>(low) - g.minimum[2 * pair];
    }
    for (size_t j = 0; j < 32; ++j) {
      const int upper = (q[j] >> 4) | (high[j] >> (2 * pair + 1) & 1) << 4;
      out[j + 32] = g.scale[2 * pair + 1] * static_cast<float>(upper) - g.minimum[2 * pair + 1];
    }
  }
}

// Two halves of 128 elements, each four runs of 32: runs 0 and 1 have the low nibbles of ql[0..31] and
// ql[32..63], runs 2 and 3 the high nibbles; run r has bits 2r and 2r+1 of qh[0..31] on top.
// 16 elements share a scale.
void q6_k_block(const Byte* p, float* out) {  // ql [128], qh [64], scales i8 [16], d f16
  const float d = half_at(p + 208);
  const auto scales = bytes_at<16>(p + 192);
  for (size_t half = 0; half < 2; ++half) {
    const auto low = bytes_at<64>(p + 64 * half);
    const auto high = bytes_at<32>(p + 128 + 32 * half);
    for (size_t run = 0; run < 4; ++run)
      for (size_t part = 0; part < 2; ++part, out += 16) {
        const float scale = d * static_cast<float>(static_cast<std::int8_t>(scales[8 * half + 2 * run + part]));
        const size_t first = 32 * (run % 2) + 16 * part;
        for (size_t j = 0; j < 16; ++j) {
          const int nibble = low[first + j] >> (4 * (run / 2)) & 15;
          const int top = high[16 * part + j] >> (2 * run) & 3;
          out[j] = scale * static_cast<float>((nibble | top << 4) - 32);
        }
      }
  }
}

template <auto block, WeightFormat format>
void each_block(const Byte* p, Index count, float* out) {
  const BlockLayout layout = block_layout(format);
  for (Index i = 0; i < count; i += layout.elements, p += layout.bytes) block(p, out + i);
}

}  // namespace

std::string_view name_of(WeightFormat format) { return info(format).name; }

std::string supported_weight_formats() {
  std::string list;
  for (const FormatInfo& f : formats) {
    if (!list.empty()) list += ", ";
    list += f.name;
  }
  return list;
}

bool weight_format(std::uint32_t type, WeightFormat& format) {
  for (const FormatInfo& f : formats)
    if (static_cast<std::uint32_t>(f.format) == type) {
      format = f.format;
      return true;
    }
  return false;
}

BlockLayout block_layout(WeightFormat format) { return info(format).layout; }

void dequantize(WeightFormat format, const void* blocks, Index count, float* out) {
  const BlockLayout layout = block_layout(format);
  if (count < 0 || count % layout.elements != 0)
    fail("{} elements of {}, expected a multiple of {}", count, name_of(format), layout.elements);
  const auto* p = static_cast<const Byte*>(blocks);
  switch (format) {
    case WeightFormat::f32:
      if (count > 0) std::memcpy(out, p, static_cast<size_t>(count) * 4);
      return;
    case WeightFormat::f16: return widen_16(p, count, out, widen_half);
    case WeightFormat::bf16: return widen_16(p, count, out, [](std::uint16_t x) { return to_f32(bf16{x}); });
    case WeightFormat::q4_0: return each_block<q4_0_block, WeightFormat::q4_0>(p, count, out);
    case WeightFormat::q4_1: return each_block<q4_1_block, WeightFormat::q4_1>(p, count, out);
    case WeightFormat::q5_0: return each_block<q5_0_block, WeightFormat::q5_0>(p, count, out);
    case WeightFormat::q5_1: return each_block<q5_1_block, WeightFormat::q5_1>(p, count, out);
    case WeightFormat::q8_0: return each_block<q8_0_block, WeightFormat::q8_0>(p, count, out);
    case WeightFormat::q4_k: return each_block<q4_k_block, WeightFormat::q4_k>(p, count, out);
    case WeightFormat::q5_k: return each_block<q5_k_block, WeightFormat::q5_k>(p, count, out);
    case WeightFormat::q6_k: return each_block<q6_k_block, WeightFormat::q6_k>(p, count, out);
  }
}

}  // namespace heed
