// The k largest of n scores. Included inside each instruction set's own namespace, after vec.h.
//
// The least of the best k is found by halving an interval of floats. A pass only counts scores above a bound, which is
// a compare a vector; once few scores are left in the interval, the others are not looked at again.

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
#pragma GCC unroll 4
  for (; i + W <= n; i += W) count += __builtin_popcount(less(b, load(x + i)));
  for (; i < n; ++i) count += x[i] > bound ? 1 : 0;
  return count;
}

/// Copies those of n scores that lie in [low, high] to `kept`, which may be x itself, and returns how many.
inline Index keep_between(const float* x, Index n, float low, float high, float* kept) {
  const F least = set1(low), most = set1(high);
  Index held = 0, i = 0;
  for (; i + W <= n; i += W) {
    const F v = load(x + i);
    for (std::uint32_t bits = ~(less(v, least) | less(most, v)) & ((1u << W) - 1); bits != 0; bits &= bits - 1)
      kept[held++] = x[i + __builtin_ctz(bits)];
  }
  for (; i < n; ++i)
    if (x[i] >= low && x[i] <= high) kept[held++] = x[i];
  return held;
}

/// Bit j: fewer than k of n (<= 64) numbers are larger than number j. x is readable up to the next multiple of W.
inline std::uint64_t among_largest(const float* x, Index n, Index k) {
  const std::uint64_t all = ~std::uint64_t{0} >> (64 - n);
  std::uint64_t among = 0;
  for (Index j = 0; j < n; ++j) {
    std::uint64_t larger = 0;
    const F own = set1(x[j]);
    for (Index i = 0; i < n; i += W) larger |= static_cast<std::uint64_t>(less(own, load(x + i))) << i;
    among |= static_cast<std::uint64_t>(__builtin_popcountll(larger & all) < k) << j;
  }
  return among;
}

/// The least of those x [0, n) (n <= 64) whose bits are set.
inline float least_of(const float* x, Index n, std::uint64_t bits) {
  F least = set1(-minus_infinity);
  for (Index i = 0; i < n; i += W)
    least = min(least, select(static_cast<std::uint32_t>(bits >> i), load(x + i), set1(-minus_infinity)));
  return -max_lane(zero() - least);
}

inline constexpr Index few_groups = 16;

/// choose_top for k <= 16 of 32 … 2^24 scores. They are dealt to 16 groups; no less than k of them reach the k-th of
/// the groups' largest, and seldom many more: among those the choice is made. False, with nothing chosen, if they are
/// more than 64.
inline bool choose_few(const float* scores, Index n, Index k, bool higher_wins, std::int32_t* chosen) {
  constexpr Index vectors = few_groups / W, room = 64;
  F most[vectors];
  for (Index v = 0; v < vectors; ++v) most[v] = load(scores + v * W);
  for (Index i = few_groups; i + few_groups <= n; i += few_groups)
    for (Index v = 0; v < vectors; ++v) most[v] = max(most[v], load(scores + i + v * W));
  alignas(64) float largest[few_groups];
  for (Index v = 0; v < vectors; ++v) store(largest + v * W, most[v]);
  const float reached = least_of(largest, few_groups, among_largest(largest, few_groups, k));

  alignas(64) static constexpr float lane_numbers[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  alignas(64) float kept[room + W], at[room + W];  // indices are exact as floats
  const F least = set1(reached), lanes = load(lane_numbers);
  Index held = 0, i = 0;
  for (; i + W <= n; i += W) {
    const F x = load(scores + i);
    const std::uint32_t bits = ~less(x, least) & ((1u << W) - 1);
    if (held + __builtin_popcount(bits) > room) return false;
    store(kept + held, pack_lanes(bits, x));
    store(at + held, pack_lanes(bits, lanes + set1(static_cast<float>(i))));
    held += __builtin_popcount(bits);
  }
  for (; i < n; ++i) {
    if (scores[i] < reached) continue;
    if (held == room) return false;
    kept[held] = scores[i], at[held++] = static_cast<float>(i);
  }

  std::uint64_t best = among_largest(kept, held, k);
  if (Index excess = __builtin_popcountll(best) - k; excess > 0) {
    const float bound = least_of(kept, held, best);
    for (Index step = 0; excess > 0; ++step) {
      const Index j = higher_wins ? step : held - 1 - step;
      if (kept[j] == bound) best &= ~(std::uint64_t{1} << j), --excess;
    }
  }
  for (; best != 0; best &= best - 1) *chosen++ = static_cast<std::int32_t>(at[__builtin_ctzll(best)]);
  return true;
}

/// Writes the indices, ascending, of the k (< n) largest; among scores equal to the least of them the
/// lower indices win, or the higher.
inline void choose_top(const float* scores, Index n, Index k, bool higher_wins, std::int32_t* chosen) {
  if (k <= few_groups && n >= 2 * few_groups && n <= 1 << 24 && choose_few(scores, n, k, higher_wins, chosen)) return;
  F least = set1(scores[0]), most = least;
  Index i = 0;
  for (; i + W <= n; i += W) least = min(least, load(scores + i)), most = max(most, load(scores + i));
  float lowest = -max_lane(zero() - least), highest = max_lane(most);
  for (; i < n; ++i) {
    lowest = scores[i] < lowest ? scores[i] : lowest;
    highest = scores[i] > highest ? scores[i] : highest;
  }

  // at_least >= k scores are >= low; `above` <= k of them are above high. Of those between, `left` holds all.
  constexpr Index room = 2048, many = 2048;
  float kept[room];
  const float* left = scores;
  Index lefts = n, beyond = 0;  // `beyond` scores are not in `left` as they are above it
  std::int32_t low = ordered(lowest), high = ordered(highest);
  Index at_least = n, above = 0;
  for (int pass = 0; low < high; ++pass) {
    // Halves of a range of numbers part common scores soonest; halves of a range of bits bound the passes.
    auto middle = static_cast<std::int32_t>(low + (static_cast<std::int64_t>(high) - low) / 2);
    if (pass < 8 || pass % 2 == 0) {
      const std::int32_t mean = ordered(unordered(low) / 2 + unordered(high) / 2);
      middle = mean < low ? low : mean >= high ? high - 1 : mean;
    }
    const Index count = beyond + count_above(left, lefts, unordered(middle));
    if (count > k) {
      low = middle + 1, at_least = count;
    } else {
      high = middle, above = count;
      if (count == k) break;
    }
    if (lefts > many && at_least - above <= room && (at_least - above) * 4 <= lefts) {
      lefts = keep_between(left, lefts, unordered(low), unordered(high), kept);
      left = kept, beyond = above;
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
