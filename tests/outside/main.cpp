// A program that knows heed only as installed: moba over random keys, and dense attention beside it.

#include <heed/mechanism/attend.h>

#include <cmath>
#include <cstdio>
#include <random>
#include <string_view>
#include <vector>

int main() {
  const heed::Index B = 1, Hq = 4, Hk = 2, N = 300, D = 32;
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  const auto values = [&](heed::Index n) {
    std::vector<float> x(static_cast<std::size_t>(n));
    for (float& e : x) e = normal(random);
    return x;
  };
  const std::vector<float> q = values(B * Hq * N * D), k = values(B * Hk * N * D), v = values(B * Hk * N * D);

  heed::AttendInput in;
  in.q = {q.data(), heed::DType::f32, {B, Hq, N, D}};
  in.k = {k.data(), heed::DType::f32, {B, Hk, N, D}};
  in.v = {v.data(), heed::DType::f32, {B, Hk, N, D}};
  in.causal = true;
  const heed::AttendOutput dense = heed::attend("dense", in);
  const heed::AttendOutput few = heed::attend("moba:block=32,top_k=3", in);
  const heed::AttendOutput all = heed::attend("moba:block=32,top_k=99", in);

  // Every block chosen is dense attention; three of ten are not, and cost less.
  float same = 0, differs = 0;
  for (heed::Index i = 0; i < B * Hq * N * D; ++i) {
    const float want = dense.o.as<float>()[i];
    same = std::max(same, std::fabs(all.o.as<float>()[i] - want));
    differs = std::max(differs, std::fabs(few.o.as<float>()[i] - want));
  }
  std::printf("moba: density %.3f, off dense by %.3g with 3 blocks, by %.3g with all\n", few.density, differs, same);
  if (!(same < 1e-4f && differs > 1e-2f && few.density < 0.6)) return 1;

  // Errors cross the library's border as heed::Error.
  try {
    heed::attend("moba:top_k=0", in);
  } catch (const heed::Error& e) {
    std::printf("refused: %s\n", e.what());
    return std::string_view(e.what()).find("top_k") == std::string_view::npos;
  }
  return 1;
}
