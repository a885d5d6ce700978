// Ragged chunks of tokens: where they end, and one vector for all tokens of one.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <span>
#include <vector>

#include "heed/plan/summary.h"

namespace heed {

/// Which local maxima of a boundary score end a chunk.
struct PeakRule {
  Index most = 0;         // ends accepted at most, a forced one included
  double threshold = 0;   // an end's score lies above
  Index radius = 0;       // no two ends this near
  Index margin = 1;       // tokens before the first and after the last possible end, plus one before
  Index forced = -1;      // an end whatever its score, beyond which there is none; -1: none such
  // 0: the best ends first. Else they are taken from left to right, whatever comes later: of the first t tokens at most
  // most·t/per may be ends.
  Index per = 0;
};

/// Chunks that cover [0, scores.size()): the best ends first (equal scores: the lower) or from left to right, each
/// farther than `radius` from all accepted before; end i closes the chunk that holds token i. Ends lie in
/// [margin - 1, size - margin).
std::vector<BlockRange> cut_at_peaks(std::span<const float> scores, const PeakRule& rule);

/// Chunks of `length` tokens, the last one shorter where they do not fit.
std::vector<BlockRange> cut_evenly(Index tokens, Index length);

/// How tokens become one vector: mean · sqrt(count), mean, or the largest of each feature.
enum class Pooling : std::uint8_t { avg_norm, avg, max };

/// Pools tokens [begin, end) of `heads` heads into out [d]: first the mean over heads, then over tokens as
/// told. add(token, head, row) adds one vector to row [d].
template <class Add>
void pool_tokens(Pooling pooling, Index begin, Index end, Index heads, Index d, float* out, Add add) {
  std::vector<float> row(static_cast<size_t>(d));
  std::fill_n(out, d, pooling == Pooling::max ? -std::numeric_limits<float>::infinity() : 0.0f);
  for (Index t = begin; t < end; ++t) {
    std::fill(row.begin(), row.end(), 0.0f);
    for (Index h = 0; h < heads; ++h) add(t, h, row.data());
    for (size_t i = 0; i < row.size(); ++i)
      out[i] = pooling == Pooling::max ? std::max(out[i], row[i]) : out[i] + row[i];
  }
  const auto count = static_cast<float>(end - begin);
  const float tokens = pooling == Pooling::max ? 1 : pooling == Pooling::avg ? count : std::sqrt(count);
  for (Index i = 0; i < d; ++i) out[i] /= tokens * static_cast<float>(heads);
}

/// The keys of one chunk of batch b, pooled over tokens and KV heads: out [D].
void pool_key(const KeyValues& kv, const Problem& problem, Index b, const BlockRange& chunk, Pooling pooling,
              float* out);

/// The chunks' keys of batch b, pooled over tokens and KV heads, as f32 key panels.
std::vector<float> pool_keys(const KeyValues& kv, const Problem& problem, Index b, std::span<const BlockRange> chunks,
                             Pooling pooling);

/// `need` tokens of [begin, end), which must hold as many: whole chunks by falling score (equal: the lower chunk), of
/// the last one the lower tokens. Ascending.
std::vector<std::int32_t> fill_from_chunks(std::span<const BlockRange> chunks, const float* scores, Index begin,
                                           Index end, Index need);

}  // namespace heed
