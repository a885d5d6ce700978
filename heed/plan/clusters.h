// Clusters of vectors: centroids found by k-means on a sphere, and the vectors nearest to each of them.
#pragma once

#include <functional>
#include <span>
#include <vector>

#include "heed/plan/keys.h"

namespace heed {

/// x [d] less its mean, over the root of its variance + eps: no weight, no bias. Its norm becomes sqrt(d) (0 for a
/// constant x), so that the largest dot product with a centroid and the least distance to it are the same.
void layer_norm(float* x, Index d, float eps);

/// The rows that read(head, token, row) gives, normalised so: shape [..., tokens, d], whose leading axes are the heads.
Tensor layer_norm_rows(Shape shape, float eps, const std::function<void(Index head, Index token, float* row)>& read);

/// From dy, the gradient of what layer_norm_rows() gave, in place to that of the rows that it read.
void layer_norm_rows_backward(Tensor& dy, float eps,
                              const std::function<void(Index head, Index token, float* row)>& read);

/// `count` (1 … rows) of rows 0 … rows-1, ascending: one at random from each of as many equal stretches.
std::vector<Index> sample_evenly(Index rows, Index count, std::uint64_t seed);

/// nearest[i] = the centroid of largest dot product with row i of x [n, d], the lower among equals. centroids
/// [clusters, d], any norm.
void nearest_centroids(const float* x, Index n, Index d, std::span<const float> centroids, std::int32_t* nearest);

/// Per head of x (vectors packed as f32 keys), for each centroid in turn, the `width` vectors of largest dot product
/// with it, ascending; the lower ones among equals. Balanced by construction: a vector may be in several lists or in
/// none. centroids[head] holds [clusters, d]; width is at most x.size(). Result [heads][clusters · width].
/// Takes heads · clusters · tokens · d multiply-adds and a few rows of `tokens` scores a thread.
std::vector<std::vector<std::int32_t>> gather_clusters(const KeyValues& x,
                                                       std::span<const std::span<const float>> centroids, Index width);

struct KMeansOptions {
  Index clusters = 1;  // at most as many as there are rows
  Index iterations = 10;
  std::uint64_t seed = 0;
};

/// Spherical k-means of the rows of x [n, d]: starts from distinct random rows, then assigns every row to its nearest
/// centroid and moves each centroid to the mean of its rows, stretched to norm sqrt(d). One without rows stays. The
/// same seed gives the same centroids [clusters, d] whatever the number of threads.
std::vector<float> spherical_kmeans(const float* x, Index n, Index d, const KMeansOptions& options);

/// Centroids that follow the batches of a training or calibration by decayed averages, without gradients: the update
/// of Routing Transformer. Centroid c is m_c / n_c, where
///   n_c = decay·n_c + (1 - decay)·(rows of the batch nearest to c), m_c the same of their sum;
/// n_c is smoothed by 1e-5, as published, so that an empty cluster divides by something.
class CentroidAverages {
 public:
  /// centroids [clusters, d]. start_count = 0 is what was published: a centroid that no row chose is then stretched
  /// until rows choose it again, which revives dead clusters but is restless for some 1/(1 - decay) batches. 1 is calm.
  CentroidAverages(std::vector<float> centroids, Index d, double start_count = 0);

  /// Counts a batch of rows x [n, d], n >= 1: all sequences and replicas of a step together; where queries and keys
  /// differ, one call for each. Returns the commitment loss before the update, the mean over all elements of
  /// (x - centroid of x)². Throws Error unless 0 <= decay < 1.
  double update(const float* x, Index n, double decay);

  std::span<const float> centroids() const { return centroids_; }

 private:
  Index d_;
  std::vector<float> centroids_;  // [clusters, d]
  std::vector<double> count_, sum_;  // n [clusters], m [clusters, d]
};

}  // namespace heed
