#include "support/cases.h"

#include <fmt/format.h>

#include <cmath>
#include <limits>
#include <numbers>
#include <random>

#include "heed/base/threads.h"
#include "heed/kernel/kernels.h"

namespace heed::test {
namespace {

/// x rounded to `digits` binary digits, ties to even, with exponents not below `least`.
double nearest(double x, int digits, int least) {
  if (x == 0 || !std::isfinite(x)) return x;
  const int exponent = std::max(std::ilogb(x), least);
  const double unit = std::ldexp(1.0, exponent - (digits - 1));
  return std::nearbyint(x / unit) * unit;
}

std::uint16_t f16_bits(double x) {
  const std::uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  const double a = std::fabs(nearest_f16(x));
  if (std::isnan(x)) return 0x7e00;
  if (a > 65504) return static_cast<std::uint16_t>(sign | 0x7c00);
  if (a < 0x1p-14) return static_cast<std::uint16_t>(sign | static_cast<int>(a * 0x1p24));
  const int exponent = std::ilogb(a);
  const int mantissa = static_cast<int>((a / std::ldexp(1.0, exponent) - 1) * 1024);
  return static_cast<std::uint16_t>(sign | ((exponent + 15) << 10) | mantissa);
}

double f16_value(std::uint16_t bits) {
  const double sign = (bits & 0x8000) != 0 ? -1 : 1;
  const int exponent = (bits >> 10) & 31, mantissa = bits & 1023;
  if (exponent == 31) return mantissa != 0 ? std::numeric_limits<double>::quiet_NaN() : sign * INFINITY;
  if (exponent == 0) return sign * mantissa * 0x1p-24;
  return sign * std::ldexp(1.0 + mantissa / 1024.0, exponent - 15);
}

}  // namespace

double nearest_bf16(double x) { return nearest(x, 8, -126); }
double nearest_f16(double x) { return nearest(x, 11, -14); }

Sample::Sample(DType dtype, Index b, Index h, Index t, Index d, Layout layout, std::uint64_t seed, double amplitude)
    : dtype_(dtype), shape_{b, h, t, d} {
  Index last = 1, gap = 0;
  if (layout == Layout::scattered) last = 2, gap = 3;
  const Index row = d * last + gap;
  if (layout == Layout::tokens) stride_ = {t * h * row, row, h * row, last};
  else stride_ = {h * (t * row + gap) + gap, t * row + gap, row, last};
  if (layout == Layout::reversed) {
    base_ = (t - 1) * row;
    stride_[2] = -row;
  }
  storage_.assign(static_cast<size_t>((b * (h * (t * row + gap) + gap) + 8) * size_of(dtype)), std::byte{0xff});
  std::mt19937_64 random(seed);
  const auto uniform = [&] { return (static_cast<double>(random() >> 11) + 0.5) * 0x1p-53; };
  for (Index i = 0; i < b; ++i)
    for (Index j = 0; j < h; ++j)
      for (Index m = 0; m < t; ++m)
        for (Index e = 0; e < d; ++e) {
          const double radius = std::sqrt(-2 * std::log(uniform()));
          set(i, j, m, e, amplitude * radius * std::cos(2 * std::numbers::pi * uniform()));
        }
}

Index Sample::offset(Index b, Index h, Index t, Index d) const {
  return base_ + b * stride_[0] + h * stride_[1] + t * stride_[2] + d * stride_[3];
}

TensorView Sample::view() const {
  return {storage_.data() + base_ * size_of(dtype_), dtype_, Shape(shape_.begin(), shape_.end()),
          Shape(stride_.begin(), stride_.end())};
}

double Sample::get(Index b, Index h, Index t, Index d) const {
  const std::byte* p = storage_.data() + offset(b, h, t, d) * size_of(dtype_);
  if (dtype_ == DType::f32) {
    float x;
    std::memcpy(&x, p, sizeof x);
    return x;
  }
  std::uint16_t bits;
  std::memcpy(&bits, p, sizeof bits);
  if (dtype_ == DType::f16) return f16_value(bits);
  const std::uint32_t wide = static_cast<std::uint32_t>(bits) << 16;
  float x;
  std::memcpy(&x, &wide, sizeof x);
  return x;
}

void Sample::set(Index b, Index h, Index t, Index d, double value) {
  std::byte* p = storage_.data() + offset(b, h, t, d) * size_of(dtype_);
  if (dtype_ == DType::f16) {
    const std::uint16_t bits = f16_bits(value);
    std::memcpy(p, &bits, sizeof bits);
    return;
  }
  const float x = static_cast<float>(dtype_ == DType::bf16 ? nearest_bf16(value) : value);
  if (dtype_ == DType::f32) {
    std::memcpy(p, &x, sizeof x);
    return;
  }
  std::uint32_t wide;
  std::memcpy(&wide, &x, sizeof x);
  const auto bits = static_cast<std::uint16_t>(wide >> 16);  // the lower half is zero
  std::memcpy(p, &bits, sizeof bits);
}

Case::Case(const Sizes& sizes, DType element, DType math, Layout layout, std::uint64_t seed, double amplitude)
    : size(sizes), dtype(element), arithmetic(math),
      q(element, sizes.B, sizes.Hq, sizes.N, sizes.D, layout, 3 * seed, amplitude),
      k(element, sizes.B, sizes.Hk, sizes.M, sizes.D, layout, 3 * seed + 1, amplitude),
      v(element, sizes.B, sizes.Hk, sizes.M, sizes.Dv, layout, 3 * seed + 2, amplitude) {}

AttendInput Case::input(bool causal) const {
  AttendInput in;
  in.q = q.view();
  in.k = k.view();
  in.v = v.view();
  in.causal = causal;
  in.arithmetic = arithmetic;
  return in;
}

double Case::seen(double x) const { return arithmetic == DType::bf16 ? nearest_bf16(x) : x; }

std::string Case::describe() const {
  return fmt::format("{}: B {} Hq {} Hk {} N {} M {} D {} Dv {} of {} in {}", kernels().name, size.B, size.Hq, size.Hk,
                     size.N, size.M, size.D, size.Dv, name_of(dtype), name_of(arithmetic));
}

std::vector<std::int32_t> documents(const std::vector<Index>& lengths) {
  std::vector<std::int32_t> ids;
  for (size_t i = 0; i < lengths.size(); ++i)
    ids.insert(ids.end(), static_cast<size_t>(lengths[i]), static_cast<std::int32_t>(i));
  return ids;
}

UseIsa::UseIsa(const std::string& name) : before_(kernels().name) { select_isa(name); }
UseIsa::~UseIsa() { select_isa(before_); }
UseThreads::UseThreads(int n) : before_(threads()) { set_threads(n); }
UseThreads::~UseThreads() { set_threads(before_); }

Got run(const Plan& plan) {
  const Problem& p = plan.problem;
  const Index rows = plan.rows_per_head();
  Got got;
  const float nan = std::numeric_limits<float>::quiet_NaN();
  got.o.assign(static_cast<size_t>(p.B * p.Hq * rows * p.Dv), nan);
  got.lse.assign(static_cast<size_t>(p.B * p.Hq * rows), nan);
  got.stats = attend(plan, {got.o.data(), p.Hq * rows * p.Dv, rows * p.Dv, p.Dv, got.lse.data()});
  return got;
}

Got run(const std::string& call, const AttendInput& in) { return run(plan_of(MechanismCall::parse(call), in)); }

bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

}  // namespace heed::test
