// Centroids and the vectors nearest to them.
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <random>
#include <set>

#include "heed/plan/clusters.h"
#include "support/naive.h"

using namespace heed;
using namespace heed::test;

namespace {

constexpr Index d = 24;

/// Rows around `means`, which are unit vectors times sqrt(d), in turn.
struct Bumps {
  std::mt19937_64 random;
  std::normal_distribution<double> normal;
  std::vector<std::vector<double>> means;
  explicit Bumps(Index count, std::uint64_t seed) : random(seed) {
    for (Index c = 0; c < count; ++c) means.push_back(on_sphere(std::vector<double>(d), 1));
  }
  std::vector<double> on_sphere(std::vector<double> x, double noise) {
    double square = 0;
    for (double& v : x) v += noise * normal(random), square += v * v;
    for (double& v : x) v *= std::sqrt(static_cast<double>(d) / square);
    return x;
  }
  std::vector<float> batch(Index rows) {
    std::vector<float> x;
    for (Index i = 0; i < rows; ++i) {
      const std::vector<double> row = on_sphere(means[static_cast<size_t>(i) % means.size()], 0.3);
      x.insert(x.end(), row.begin(), row.end());
    }
    return x;
  }
  /// The least cosine of a mean with the centroid that is nearest to it.
  double worst_cosine(std::span<const float> centroids) const {
    double worst = 1;
    for (const auto& mean : means) {
      double best = -1;
      for (size_t c = 0; c < centroids.size(); c += static_cast<size_t>(d)) {
        double product = 0, square = 0;
        for (size_t i = 0; i < mean.size(); ++i) {
          const auto x = static_cast<double>(centroids[c + i]);
          product += mean[i] * x, square += x * x;
        }
        best = std::max(best, product / std::sqrt(square * static_cast<double>(d)));
      }
      worst = std::min(worst, best);
    }
    return worst;
  }
};

std::vector<float> random_rows(Index n, Index width, std::uint64_t seed) {
  std::mt19937_64 random(seed);
  std::normal_distribution<double> normal;
  std::vector<float> x;
  for (Index i = 0; i < n * width; ++i) x.push_back(static_cast<float>(normal(random)));
  return x;
}

}  // namespace

TEST_CASE("averaged centroids find planted clusters within 500 batches, and the loss falls") {
  for (const double start_count : {0.0, 1.0}) {
    CAPTURE(start_count);
    Bumps bumps(6, 3);
    // Centroids start as other vectors of the batch do: at random on the sphere.
    const std::vector<float> first = bumps.batch(6 * 5);
    std::vector<float> start;
    for (size_t c = 0; c < 6; ++c)  // one of each bump but far from its middle
      for (size_t i = 0; i < d; ++i)
        start.push_back(first[c * d + i] + 0.8f * static_cast<float>(bumps.normal(bumps.random)));
    CentroidAverages averages(start, d, start_count);
    double before = 0, after = 0;
    for (int step = 0; step < 500; ++step) {
      const std::vector<float> x = bumps.batch(60);
      const double loss = averages.update(x.data(), 60, 0.99);
      if (step < 10) before += loss / 10;
      if (step >= 490) after += loss / 10;
    }
    CHECK(bumps.worst_cosine(averages.centroids()) >= 0.95);
    CHECK(after < 0.8 * before);
  }
}

TEST_CASE("one update of the averages is the published one") {
  // Two centroids along two axes; rows 0 and 1 choose the first, row 2 the second, equal scores the lower.
  std::vector<float> mu{1, 0, 0, 1};
  CentroidAverages averages(mu, 2);
  const std::vector<float> x{3, 1, 2, 2, -1, 4};
  const double loss = averages.update(x.data(), 3, 0.9);
  CHECK(loss == doctest::Approx(((2 * 2 + 1) + (1 + 2 * 2) + (1 + 3 * 3)) / 6.0));
  const double n0 = 0.1 * 2, n1 = 0.1, total = n0 + n1;
  const double m[4] = {0.9 + 0.1 * 5, 0.1 * 3, 0.1 * -1, 0.9 + 0.1 * 4};
  for (size_t i = 0; i < 4; ++i) {
    const double count = ((i < 2 ? n0 : n1) + 1e-5) / (total + 2e-5) * total;
    CHECK(averages.centroids()[i] == doctest::Approx(m[i] / count).epsilon(1e-6));
  }
  CHECK_FAILS(averages.update(x.data(), 3, 1), Error, "decay = 1, expected at least 0 and below 1");
  CHECK_FAILS(averages.update(x.data(), 0, 0.5), Error, "rows = 0, expected >= 1");
}

TEST_CASE("k-means ends where no round changes it, and from one row of each bump finds the bumps") {
  Bumps bumps(5, 4);
  const std::vector<float> x = bumps.batch(5 * 80);
  double best = 0;
  for (std::uint64_t seed = 0; seed < 40; ++seed) {
    const std::vector<float> mu = spherical_kmeans(x.data(), 400, d, {.clusters = 5, .iterations = 20, .seed = seed});
    best = std::max(best, bumps.worst_cosine(mu));
    if (seed > 3) continue;
    CHECK(mu == spherical_kmeans(x.data(), 400, d, {.clusters = 5, .iterations = 21, .seed = seed}));
    for (size_t c = 0; c < 5; ++c) {
      double square = 0;
      for (size_t i = 0; i < d; ++i) square += static_cast<double>(mu[c * d + i]) * static_cast<double>(mu[c * d + i]);
      CHECK(square == doctest::Approx(d).epsilon(1e-5));
    }
  }
  CHECK(best > 0.99);
  // As many clusters as rows: every row is its own.
  const std::vector<float> few = bumps.batch(7);
  std::vector<float> mu = spherical_kmeans(few.data(), 7, d, {.clusters = 7, .iterations = 0, .seed = 2});
  std::multiset<float> a(few.begin(), few.end()), b(mu.begin(), mu.end());
  CHECK(a == b);
  CHECK_FAILS(spherical_kmeans(few.data(), 7, d, {.clusters = 8}), Error,
              "clusters = 8, expected 1 … 7, the vectors there are");
}

TEST_CASE("lists hold the nearest vectors of every head, ascending") {
  for (const Index n : {1, 63, 64, 65, 500})
    for (const Index clusters : {1, 5, 13, 70}) {
      const Index width = std::max<Index>(1, n / 3);
      const std::vector<float> rows = random_rows(3 * n, d, 5), mu = random_rows(2 * clusters, d, 6);
      const KeyValues x = pack_keys({rows.data(), DType::f32, {3, n, d}}, DType::f32);
      const size_t size = static_cast<size_t>(clusters * d);
      const std::vector<std::span<const float>> of_head{{mu.data(), size}, {mu.data() + size, size}, {mu.data(), size}};
      const auto lists = gather_clusters(x, of_head, width);
      REQUIRE(lists.size() == 3);
      for (size_t head = 0; head < 3; ++head)
        for (Index c = 0; c < clusters; ++c) {
          std::vector<std::pair<double, Index>> scored;
          for (Index t = 0; t < n; ++t) {
            double s = 0;
            for (Index i = 0; i < d; ++i)
              s += static_cast<double>(rows[static_cast<size_t>((static_cast<Index>(head) * n + t) * d + i)]) *
                   static_cast<double>(of_head[head][static_cast<size_t>(c * d + i)]);
            scored.emplace_back(-s, t);
          }
          std::sort(scored.begin(), scored.end());
          if (width < n &&
              scored[static_cast<size_t>(width)].first - scored[static_cast<size_t>(width) - 1].first < 1e-4)
            continue;
          std::vector<std::int32_t> want;
          for (Index i = 0; i < width; ++i)
            want.push_back(static_cast<std::int32_t>(scored[static_cast<size_t>(i)].second));
          std::sort(want.begin(), want.end());
          const auto first = lists[head].begin() + c * width;
          CHECK(std::vector<std::int32_t>(first, first + width) == want);
        }
    }
}

TEST_CASE("layer_norm of a constant is zero; large numbers are no trouble") {
  float large[4] = {1e30f, -1e30f, 1e30f, -1e30f};
  layer_norm(large, 4, 1e-6f);
  for (int i = 0; i < 4; ++i) CHECK(large[i] == doctest::Approx(i % 2 == 0 ? 1 : -1));
  float x[5] = {3, 3, 3, 3, 3};
  layer_norm(x, 5, 0);
  for (const float v : x) CHECK(v == 0);
}

TEST_CASE("a sample is distinct, ascending, spread out and all rows when it may be") {
  for (const auto& [rows, count] : std::vector<std::pair<Index, Index>>{{10, 10}, {1000, 7}, {65, 64}, {3, 1}}) {
    const std::vector<Index> sample = sample_evenly(rows, count, 5);
    REQUIRE(static_cast<Index>(sample.size()) == count);
    for (size_t i = 0; i < sample.size(); ++i) {
      CHECK(sample[i] >= rows * static_cast<Index>(i) / count);
      CHECK(sample[i] < rows * static_cast<Index>(i + 1) / count);
    }
  }
  CHECK(sample_evenly(1000, 7, 5) != sample_evenly(1000, 7, 6));
}
