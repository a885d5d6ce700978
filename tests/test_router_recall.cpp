// How often the mean key of a block betrays one relevant key in it: flash-moba's router against its theory.
#include <doctest/doctest.h>
#include <fmt/format.h>

#include <cmath>
#include <map>
#include <random>

#include "support/cases.h"

using namespace heed;
using namespace heed::test;

TEST_CASE("block means find needles as often as the theory of signal and noise says") {
  // 16384 unit keys; a query's needle is m tokens of one block with cosine `mu` to it; 2048 tokens' worth of blocks is
  // chosen. A block's mean stands m·mu·sqrt(d/(2B)) above another's: recall = P[Binomial(n - 1, 1 - Phi(z)) < k],
  // z ~ N(sqrt(2)·SNR, 1). The queries share keys, and each other's needles are noise to them.
  constexpr Index tokens = 16384, queries = 32, batches = 24;
  std::mt19937_64 random(5);
  std::normal_distribution<float> normal;
  const auto unit = [&](Index d) {
    std::vector<float> x(static_cast<size_t>(d));
    float sum = 0;
    for (float& e : x) e = normal(random), sum += e * e;
    for (float& e : x) e /= std::sqrt(sum);
    return x;
  };
  const auto phi = [](double x) { return 0.5 * std::erfc(-x / std::sqrt(2.0)); };
  const auto predicted = [&](double mu, Index m, Index d, Index block) {
    const double snr = static_cast<double>(m) * mu * std::sqrt(static_cast<double>(d) / static_cast<double>(2 * block));
    const double n = static_cast<double>(tokens / block), k = 2048.0 / static_cast<double>(block);
    double recall = 0;
    for (double e = -6; e < 6; e += 0.01) {
      const double better = 1 - phi(std::sqrt(2.0) * snr + e);
      double term = std::pow(1 - better, n - 1), below = 0;  // Binomial's terms 0 … k - 1
      for (double i = 0; i < k; ++i) {
        below += term;
        term *= (n - 1 - i) / (i + 1) * better / (1 - better);
      }
      recall += 0.01 * std::exp(-e * e / 2) / std::sqrt(2 * 3.14159265358979) * below;
    }
    return recall;
  };
  struct Setting {
    Index d, m;
    float mu;
  };
  for (const Setting& s : {Setting{64, 4, 0.5f}, Setting{64, 1, 1.0f}, Setting{128, 4, 0.5f}}) {
    std::map<Index, Index> found;
    std::vector<float> q, k, v(tokens + 1);
    for (Index j = 0; j <= tokens; ++j) {
      const std::vector<float> x = unit(s.d);
      k.insert(k.end(), x.begin(), x.end());
    }
    for (Index batch = 0; batch < batches; ++batch) {
      q.clear();
      std::vector<Index> needle;
      for (Index h = 0; h < queries; ++h) {
        const std::vector<float> x = unit(s.d);
        q.insert(q.end(), x.begin(), x.end());
        Index cell = 0;  // of 64 tokens, its own
        do cell = static_cast<Index>(random() % (tokens / 64));
        while (std::find(needle.begin(), needle.end(), cell * 64) != needle.end());
        needle.push_back(cell * 64);
        for (Index i = 0; i < s.m; ++i) {
          std::vector<float> noise = unit(s.d);
          float along = 0, length = 0;
          for (size_t f = 0; f < noise.size(); ++f) along += noise[f] * x[f];
          for (size_t f = 0; f < noise.size(); ++f) noise[f] -= along * x[f], length += noise[f] * noise[f];
          for (size_t f = 0; f < noise.size(); ++f)
            k[static_cast<size_t>((cell * 64 + i) * s.d) + f] =
                s.mu * x[f] + std::sqrt((1 - s.mu * s.mu) / length) * noise[f];
        }
      }
      AttendInput in;
      in.q = {q.data(), DType::f32, {1, queries, 1, s.d}};
      in.k = {k.data(), DType::f32, {1, 1, tokens + 1, s.d}};
      in.v = {v.data(), DType::f32, {1, 1, tokens + 1, 1}};
      in.causal = true;
      for (const Index block : {512, 256, 128, 64}) {
        const std::string call = fmt::format("flash-moba:block={},top_k={}", block, 2048 / block + 1);
        walk(plan_of(MechanismCall::parse(call), in), [&](const RowBlock& rows, const std::vector<Tile>& tiles) {
          for (const Tile& tile : tiles)
            found[block] += needle[static_cast<size_t>(rows.head)] / block * block == tile.columns.first ? 1 : 0;
        });
      }
    }
    double before = 0;
    for (const Index block : {512, 256, 128, 64}) {
      const double recall = static_cast<double>(found[block]) / static_cast<double>(queries * batches);
      const double want = predicted(s.mu, s.m, s.d, block);
      INFO("d ", s.d, " m ", s.m, " mu ", s.mu, " block ", block, ": ", recall, ", predicted ", want);
      CHECK(std::fabs(recall - want) < 0.05);
      CHECK(recall > before);  // smaller blocks find more
      before = recall;
    }
  }
}
