// Random attention problems for tests: q, k, v of any element type, laid out in awkward ways, and
// the same numbers in f64 as the arithmetic is meant to see them.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "heed/mechanism/attend.h"

namespace heed::test {

/// How the elements of q, k and v lie in memory.
enum class Layout : std::uint8_t {
  packed,     // [B, H, N, D] row-major
  tokens,     // [B, N, H, D] in memory, seen as [B, H, N, D]
  scattered,  // every axis has a gap, the last one has stride 2
  reversed,   // tokens stand in descending order: a negative stride
};

struct Sizes {
  Index B = 1, Hq = 1, Hk = 1, N = 1, M = 1, D = 16, Dv = 16;
};

/// One tensor [B, H, T, D] with its own memory.
class Sample {
 public:
  /// Standard normals times `amplitude`, rounded to `dtype`.
  Sample(DType dtype, Index b, Index h, Index t, Index d, Layout layout, std::uint64_t seed, double amplitude = 1);

  TensorView view() const;
  double get(Index b, Index h, Index t, Index d) const;
  void set(Index b, Index h, Index t, Index d, double value);  // rounded to the dtype
  Index features() const { return shape_[3]; }

 private:
  Index offset(Index b, Index h, Index t, Index d) const;
  DType dtype_;
  std::vector<Index> shape_, stride_;
  Index base_ = 0;
  std::vector<std::byte> storage_;
};

struct Case {
  Sizes size;
  DType dtype, arithmetic;
  Sample q, k, v;

  explicit Case(const Sizes& sizes, DType element = DType::f32, DType math = DType::f32, Layout layout = Layout::packed,
                std::uint64_t seed = 1, double amplitude = 1);

  AttendInput input(bool causal = false) const;
  /// Elements as the arithmetic sees them: rounded to bf16 where it is bf16.
  double q_at(Index b, Index h, Index t, Index d) const { return seen(q.get(b, h, t, d)); }
  double k_at(Index b, Index h, Index j, Index d) const { return seen(k.get(b, h, j, d)); }
  double v_at(Index b, Index h, Index j, Index d) const { return seen(v.get(b, h, j, d)); }
  Index kv_head(Index h) const { return h / (size.Hq / size.Hk); }
  std::string describe() const;

 private:
  double seen(double x) const;
};

/// Keys per document and their ids, one after the other: ids differ, lengths as given.
std::vector<std::int32_t> documents(const std::vector<Index>& lengths);

/// x rounded to the nearest bf16, f16 (ties to even), by arithmetic rather than by bits.
double nearest_bf16(double x);
double nearest_f16(double x);

/// Selects an instruction set for a scope and goes back to the one before.
class UseIsa {
 public:
  explicit UseIsa(const std::string& name);
  ~UseIsa();
  UseIsa(const UseIsa&) = delete;
  UseIsa& operator=(const UseIsa&) = delete;

 private:
  std::string before_;
};

/// Uses n threads for a scope.
class UseThreads {
 public:
  explicit UseThreads(int n);
  ~UseThreads();
  UseThreads(const UseThreads&) = delete;
  UseThreads& operator=(const UseThreads&) = delete;

 private:
  int before_;
};

/// What `attend` wrote, through a plan, into memory that started as NaN.
struct Got {
  std::vector<float> o, lse;  // [B, Hq, R, Dv], [B, Hq, R]
  AttendStats stats;
};
Got run(const Plan& plan);
Got run(const std::string& call, const AttendInput& in);

/// True when both hold the same bits.
bool same_bits(const std::vector<float>& a, const std::vector<float>& b);

}  // namespace heed::test
