#include "heed/plan/clusters.h"

#include <algorithm>
#include <cmath>

#include "heed/base/error.h"
#include "heed/base/random.h"
#include "heed/base/scratch.h"
#include "heed/base/threads.h"
#include "heed/kernel/kernels.h"
#include "heed/plan/select.h"

namespace heed {

void layer_norm(float* x, Index d, float eps) {
  double sums[4] = {};  // chains that run side by side
  Index at = 0;
  for (; at + 4 <= d; at += 4)
    for (Index i = 0; i < 4; ++i) sums[i] += static_cast<double>(x[at + i]);
  for (; at < d; ++at) sums[0] += static_cast<double>(x[at]);
  const auto mean = static_cast<float>((sums[0] + sums[1] + sums[2] + sums[3]) / static_cast<double>(d));
  for (Index i = 0; i < d; ++i) x[i] -= mean;
  auto square = static_cast<double>(kernels().dot(x, x, d));
  if (!std::isfinite(square)) {  // beyond f32
    square = 0;
    for (Index i = 0; i < d; ++i) square += static_cast<double>(x[i]) * static_cast<double>(x[i]);
  }
  const double variance = square / static_cast<double>(d) + static_cast<double>(eps);
  const float factor = variance > 0 ? static_cast<float>(1 / std::sqrt(variance)) : 0;
  for (Index i = 0; i < d; ++i) x[i] *= factor;
}

Tensor layer_norm_rows(Shape shape, float eps, const std::function<void(Index head, Index token, float* row)>& read) {
  const Index tokens = shape[shape.size() - 2], d = shape.back();
  Tensor x(DType::f32, std::move(shape));
  constexpr Index at_once = 256;
  const Index units = ceil_div(tokens, at_once);
  parallel_for(x.size() / (tokens * d) * units, [&](Index unit, int) {
    const Index head = unit / units, first = unit % units * at_once;
    for (Index t = first; t < std::min(tokens, first + at_once); ++t) {
      float* row = x.as<float>() + (head * tokens + t) * d;
      read(head, t, row);
      layer_norm(row, d, eps);
    }
  });
  return x;
}

void layer_norm_rows_backward(Tensor& dy, float eps,
                              const std::function<void(Index head, Index token, float* row)>& read) {
  const Shape& shape = dy.shape();
  const Index tokens = shape[shape.size() - 2], d = shape.back();
  constexpr Index at_once = 256;
  const Index units = ceil_div(tokens, at_once);
  parallel_for(dy.size() / (tokens * d) * units, [&](Index unit, int) {
    Scratch& scratch = thread_scratch();
    const Scratch::Mark mark(scratch);
    float *x = scratch.take<float>(d).data(), *y = scratch.take<float>(d).data();
    const Index head = unit / units, first = unit % units * at_once;
    const auto size = static_cast<double>(d);
    for (Index t = first; t < std::min(tokens, first + at_once); ++t) {
      float* row = dy.as<float>() + (head * tokens + t) * d;
      read(head, t, x);
      std::copy_n(x, d, y);
      layer_norm(y, d, eps);
      double mean = 0, square = 0, dmean = 0, along = 0;
      for (Index i = 0; i < d; ++i) mean += static_cast<double>(x[i]);
      mean /= size;
      for (Index i = 0; i < d; ++i) {
        const double centred = static_cast<double>(x[i]) - mean, g = static_cast<double>(row[i]);
        square += centred * centred, dmean += g, along += g * static_cast<double>(y[i]);
      }
      // y = x' / σ, x' = x - mean, σ² = mean x'² + eps.
      const double variance = square / size + static_cast<double>(eps);
      const double factor = variance > 0 ? 1 / std::sqrt(variance) : 0;
      for (Index i = 0; i < d; ++i)
        row[i] = static_cast<float>(
            factor * (static_cast<double>(row[i]) - dmean / size - static_cast<double>(y[i]) * along / size));
    }
  });
}

std::vector<Index> sample_evenly(Index rows, Index count, std::uint64_t seed) {
  std::vector<Index> sample;
  Random random(seed);
  for (Index i = 0; i < count; ++i) {
    const Index begin = rows * i / count;
    sample.push_back(begin + random.below(rows * (i + 1) / count - begin));
  }
  return sample;
}

void nearest_centroids(const float* x, Index n, Index d, std::span<const float> centroids, std::int32_t* nearest) {
  const Index clusters = static_cast<Index>(centroids.size()) / d, stride = round_up(clusters, panel_columns);
  std::vector<float> panels(static_cast<size_t>(stride * d));
  for (Index c = 0; c < clusters; c += panel_columns)
    kernels().pack_keys_f32(centroids.data() + c * d, d, std::min(panel_columns, clusters - c), d, d,
                            panels.data() + c * d);
  constexpr Index at_once = 48;
  parallel_for(ceil_div(n, at_once), [&](Index unit, int) {
    const Index first = unit * at_once, rows = std::min(at_once, n - first);
    Scratch& scratch = thread_scratch();
    const Scratch::Mark mark(scratch);
    float* scores = scratch.take<float>(rows * stride).data();
    kernels().gemm_f32(rows, clusters, d, x + first * d, d, panels.data(), scores, stride, false);
    for (Index i = 0; i < rows; ++i) {
      const float* row = scores + i * stride;
      nearest[first + i] = static_cast<std::int32_t>(std::max_element(row, row + clusters) - row);
    }
  });
}

std::vector<std::vector<std::int32_t>> gather_clusters(const KeyValues& x,
                                                       std::span<const std::span<const float>> centroids, Index width) {
  const Index n = x.size(), d = x.layout().d, heads = x.heads();
  const Index clusters = static_cast<Index>(centroids[0].size()) / d;
  std::vector<std::vector<std::int32_t>> lists(static_cast<size_t>(heads));
  for (auto& list : lists) list.resize(static_cast<size_t>(clusters * width));
  // The vectors come from afar and are read once for so many centroids, whose scores stay nearer; an even number of
  // units, for few heads.
  const Index most = 4 * kernels().row_step;
  const Index at_once = ceil_div(clusters, round_up(ceil_div(clusters, most), Index{2}));
  const Index units = ceil_div(clusters, at_once), stride = round_up(n, panel_columns);
  parallel_for(heads * units, [&](Index unit, int) {
    const Index head = unit / units, first = unit % units * at_once, rows = std::min(at_once, clusters - first);
    Scratch& scratch = thread_scratch();
    const Scratch::Mark mark(scratch);
    float* scores = scratch.take<float>(rows * stride).data();
    kernels().gemm_f32(rows, n, d, centroids[static_cast<size_t>(head)].data() + first * d, d,
                       static_cast<const float*>(x.keys(head)), scores, stride, false);
    for (Index i = 0; i < rows; ++i)
      choose_top(scores + i * stride, n, width, Ties::lower,
                 lists[static_cast<size_t>(head)].data() + (first + i) * width);
  });
  return lists;
}

std::vector<float> spherical_kmeans(const float* x, Index n, Index d, const KMeansOptions& options) {
  const Index clusters = options.clusters;
  if (clusters < 1 || clusters > n) fail("clusters = {}, expected 1 … {}, the vectors there are", clusters, n);
  std::vector<float> centroids(static_cast<size_t>(clusters * d));
  std::vector<std::int32_t> rows(static_cast<size_t>(n)), nearest(rows.size());
  for (size_t i = 0; i < rows.size(); ++i) rows[i] = static_cast<std::int32_t>(i);
  Random random(options.seed);
  for (Index c = 0; c < clusters; ++c) {  // the first steps of a shuffle
    std::swap(rows[static_cast<size_t>(c)], rows[static_cast<size_t>(c + random.below(n - c))]);
    std::copy_n(x + rows[static_cast<size_t>(c)] * d, d, centroids.data() + c * d);
  }
  std::vector<double> sum(centroids.size());
  for (Index iteration = 0; iteration < options.iterations; ++iteration) {
    nearest_centroids(x, n, d, centroids, nearest.data());
    std::fill(sum.begin(), sum.end(), 0.0);
    for (Index i = 0; i < n; ++i) {
      double* to = sum.data() + nearest[static_cast<size_t>(i)] * d;
      for (Index f = 0; f < d; ++f) to[f] += static_cast<double>(x[i * d + f]);
    }
    for (Index c = 0; c < clusters; ++c) {
      double square = 0;
      for (Index f = 0; f < d; ++f) square += sum[static_cast<size_t>(c * d + f)] * sum[static_cast<size_t>(c * d + f)];
      if (square == 0) continue;  // no rows, or rows that cancel
      const double stretch = std::sqrt(static_cast<double>(d) / square);
      for (size_t i = static_cast<size_t>(c * d); i < static_cast<size_t>((c + 1) * d); ++i)
        centroids[i] = static_cast<float>(sum[i] * stretch);
    }
  }
  return centroids;
}

CentroidAverages::CentroidAverages(std::vector<float> centroids, Index d, double start_count)
    : d_(d), centroids_(std::move(centroids)), count_(centroids_.size() / static_cast<size_t>(d), start_count),
      sum_(centroids_.begin(), centroids_.end()) {}

double CentroidAverages::update(const float* x, Index n, double decay) {
  if (n < 1) fail("rows = {}, expected >= 1", n);
  if (!(decay >= 0 && decay < 1)) fail("decay = {}, expected at least 0 and below 1", decay);
  std::vector<std::int32_t> nearest(static_cast<size_t>(n));
  nearest_centroids(x, n, d_, centroids_, nearest.data());
  for (double& count : count_) count *= decay;
  for (double& sum : sum_) sum *= decay;
  double loss = 0;
  for (Index i = 0; i < n; ++i) {
    const Index c = nearest[static_cast<size_t>(i)];
    count_[static_cast<size_t>(c)] += 1 - decay;
    for (Index f = 0; f < d_; ++f) {
      const auto value = static_cast<double>(x[i * d_ + f]),
                 at = static_cast<double>(centroids_[static_cast<size_t>(c * d_ + f)]);
      sum_[static_cast<size_t>(c * d_ + f)] += (1 - decay) * value;
      loss += (value - at) * (value - at);
    }
  }
  constexpr double epsilon = 1e-5;
  double total = 0;
  for (const double count : count_) total += count;
  for (size_t c = 0; c < count_.size(); ++c) {
    const double count = (count_[c] + epsilon) / (total + static_cast<double>(count_.size()) * epsilon) * total;
    for (size_t i = c * static_cast<size_t>(d_); i < (c + 1) * static_cast<size_t>(d_); ++i)
      centroids_[i] = static_cast<float>(sum_[i] / count);
  }
  return loss / static_cast<double>(n * d_);
}

}  // namespace heed
