// Softmax weights of blocks of columns, without the product with values.
// Included inside each instruction set's own namespace, after attend.h.

/// Folds factor·s[0 … n) into a running (maximum, sum of 2^(score - maximum)).
inline void fold_run(const float* s, Index n, F factor, float& maximum, float& sum) {
  const Index whole = n / W * W;
  const std::uint32_t rest = (1u << (n - whole)) - 1;
  // What stands beyond n may be anything: it is selected away.
  const F tail = rest == 0 ? set1(minus_infinity) : select(rest, load(s + whole) * factor, set1(minus_infinity));
  F top = tail;
  for (Index j = 0; j < whole; j += W) top = max(top, load(s + j) * factor);
  const float most = max_lane(top);
  if (most == minus_infinity) return;
  if (most > maximum) {
    if (maximum != minus_infinity) sum *= __builtin_exp2f(maximum - most);
    maximum = most;
  }
  const F reference = set1(maximum);
  F total = rest == 0 ? zero() : exp2<true>(tail - reference);
  for (Index j = 0; j < whole; j += W) total = total + exp2<true>(load(s + j) * factor - reference);
  sum += sum_lanes(total);
}

inline void fold_blocks(const float* scores, Index n, Index first, Index block, float factor, float* maximum,
                        float* sum) {
  const F f = set1(factor);
  if (block == 1) {
    Index j = 0;
    for (; j + W <= n; j += W) store(maximum + first + j, load(scores + j) * f);
    for (; j < n; ++j) maximum[first + j] = scores[j] * factor;
    return;
  }
  for (Index begin = 0, end; begin < n; begin = end) {
    const Index b = (first + begin) / block, next = (b + 1) * block - first;
    end = next < n ? next : n;
    fold_run(scores + begin, end - begin, f, maximum[b], sum[b]);
  }
}

inline void weigh_blocks(float* maximum, const float* sum, Index n, float* largest, float* mass) {
  F top = set1(minus_infinity);
  for (Index b = 0; b < n; b += W) top = max(top, load(maximum + b));
  const float most = max_lane(top);
  if (most == minus_infinity) return;
  const F reference = set1(most);
  F total = zero();
  for (Index b = 0; b < n; b += W) {
    const F x = exp2<true>(load(maximum + b) - reference);
    store(maximum + b, x);
    total = total + (sum == nullptr ? x : x * load(sum + b));
  }
  const F share = set1(1 / sum_lanes(total));
  for (Index b = 0; b < n; b += W) {
    const F x = load(maximum + b) * share;
    if (largest != nullptr) store(largest + b, max(load(largest + b), x));
    if (mass != nullptr) store(mass + b, load(mass + b) + (sum == nullptr ? x : x * load(sum + b)));
  }
}
