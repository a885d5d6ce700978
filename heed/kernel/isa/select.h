// The k largest of n scores. Included inside each instruction set's own namespace, after vec.h.
//
// The least of the best k is found by halving an interval of floats: every pass only counts scores
// above a bound, which is a compare a vector, and about log2(n) + 3 passes part the k from the rest.

// Integers that order as floats do, and back.
inline std::int32_t ordered(float x) {
  std::int32_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  return bits ^ ((bits >> 31) & 0x7fffffff);
}
inline float unordered(std::int32_t bits) {
  bits ^= (bits >> 31) & 0x7fffffff;
  float x;
  __builtin_memcpy(&x, &bits, sizeof x);
  return x;
}

inline Index count_above(const float* x, Index n, float bound) {
  const F b = set1(bound);
  Index count = 0, i = 0;
  for (; i + W <= n; i += W) count += __builtin_popcount(less(b, load(x + i)));
  for (; i < n; ++i) count += x[i] > bound ? 1 : 0;
  return count;
}

/// Writes the indices, ascending, of the k (< n) largest; among scores equal to the least of them the
/// lower indices win, or the higher.
inline void choose_top(const float* scores, Index n, Index k, bool higher_wins, std::int32_t* chosen) {
  F least = set1(scores[0]), most = least;
  Index i = 0;
  for (; i + W <= n; i += W) least = min(least, load(scores + i)), most = max(most, load(scores + i));
  float lowest = -max_lane(zero() - least), highest = max_lane(most);
  for (; i < n; ++i) {
    lowest = scores[i] < lowest ? scores[i] : lowest;
    highest = scores[i] > highest ? scores[i] : highest;
  }

  // At least k scores are >= low; `above` < k of them are above high.
  std::int32_t low = ordered(lowest), high = ordered(highest);
  Index above = 0;
  while (low < high) {
    const auto middle = static_cast<std::int32_t>(low + (static_cast<std::int64_t>(high) - low) / 2);
    const Index count = count_above(scores, n, unordered(middle));
    if (count > k) {
      low = middle + 1;
    } else {
      high = middle, above = count;
      if (count == k) break;
    }
  }
  const float bound = unordered(high);
  Index equal_wanted = k - above, equal_skipped = 0;
  if (higher_wins && equal_wanted > 0) {
    Index equal = 0;
    for (Index j = 0; j < n; ++j) equal += scores[j] == bound ? 1 : 0;
    equal_skipped = equal - equal_wanted;
  }
  Index held = 0;
  const auto visit = [&](Index j) {
    if (scores[j] == bound) {
      if (equal_skipped > 0) return void(--equal_skipped);
      if (equal_wanted == 0) return;
      --equal_wanted;
    }
    chosen[held++] = static_cast<std::int32_t>(j);
  };
  const F b = set1(bound);
  for (i = 0; i + W <= n; i += W)
    for (std::uint32_t bits = ~less(load(scores + i), b) & ((1u << W) - 1); bits != 0; bits &= bits - 1)
      visit(i + __builtin_ctz(bits));
  for (; i < n; ++i)
    if (!(scores[i] < bound)) visit(i);
}
