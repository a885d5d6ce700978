// Attention on tiles: the tile unit works at two panels while the vector units work at a third.
// Included inside an instruction set's namespace, after attend.h, where HEED_TILES is defined.
//
// A unit is a group of 32 rows and a panel of 64 columns. It becomes scores s = q·k^T, weights p by the softmax, and is
// added up, acc += p·v. While the weights of one unit are made, a few rows at a time, the tiles make the scores of the
// next one and add up the one before, four products between rows.
//
// The softmax has no running maximum, which would have to look at every score first and to rescale acc under the tiles:
// a row keeps the largest score of the first panel it sees as its reference m, and weights grow beyond one. Only where
// they grow beyond `limit` the row waits for the tiles, raises m and is weighed again.

inline constexpr Index widest_tiled = 256;  // features of keys and of values
inline constexpr float limit = 0x1p64f;

/// Rows of a task that meet the tiles together.
struct TileGroup {
  Index first = 0, rows = 0;  // of the task
  Index from = 0, to = 0;  // panels that some row sees
  bool tested = false;  // some row does not see all of them
  const bf16* q = nullptr;  // [32, dp]
  float* acc = nullptr;  // [32, dvp]
  float total[tiled_rows][W];
  // Copies of what does not lie evenly, rows that the task lacks being zero.
  bool copied = false;
  alignas(64) bf16 own_q[tiled_rows * widest_tiled];
  alignas(64) float own_acc[tiled_rows * widest_tiled];
};

struct TileUnit {
  TileGroup* group = nullptr;  // null: there is none
  Index panel = 0;
  bool closes() const { return panel + 1 == group->to; }
};

/// Where tiles 0 to 3 belong, two above two: 32 rows of 32 (not `two`: 16) floats, `bytes` apart.
struct TileSums {
  float* c = nullptr;  // null: nowhere
  Index bytes = 0;
  bool two = false;
  template <int tile>
  float* at() const {
    return c + (tile / 2 * 4 * bytes + tile % 2 * 16);
  }
  template <int tile>
  bool holds() const {
    return c != nullptr && (two || tile % 2 == 0);
  }
  template <int tile>
  void load() const {
    if (holds<tile>()) tile_load<tile>(at<tile>(), bytes);
  }
  template <int tile>
  void store() const {
    if (holds<tile>()) tile_store<tile>(at<tile>(), bytes);
  }
};

/// What the tiles have to do, in steps of four products: the scores of a unit, then the sums of another. Each block of
/// sums is stored while the first products of the next one are made: four stores in a row would hold up everything.
class TileWork {
 public:
  explicit TileWork(const PanelTask& t) : task_(t), depth_(t.layout.dp / 32), blocks_((t.layout.dvp + 31) / 32) {}

  /// s [32, 64] of `scored`; acc of `summed` with its weights p [32, 64]; either group may be null.
  void begin(const TileUnit& scored, float* s, const TileUnit& summed, const bf16* p) {
    scored_ = scored, s_ = s, summed_ = summed, p_ = p;
    step_ = 0;
    score_steps_ = scored.group == nullptr ? 0 : 2 * depth_;
    steps_ = score_steps_ + (summed.group == nullptr ? 0 : 2 * blocks_);
  }
  /// As much as is due when `done` of `all` rows have their weights.
  void keep_up(Index done, Index all) {
    while (step_ * all < steps_ * done) advance();
  }
  void finish() {
    keep_up(1, 1);
    done_.store<0>(), done_.store<1>(), done_.store<2>(), done_.store<3>();
    done_ = {};
  }

 private:
  void advance() {
    const PanelLayout& layout = task_.layout;
    const Index i = step_++;
    if (i < score_steps_) {
      constexpr Index width = panel_columns;
      const Index block = i / depth_, f = i % depth_;
      const auto* k = static_cast<const bf16*>(task_.k) + scored_.panel * layout.panel_elements();
      multiply(scored_.group->q + f * 32, layout.dp * 2, k + (f * 16 * width + block * 32) * 2, width * 4,
               {s_ + block * 32, width * 4, true}, f == 0, f + 1 == depth_,
               []<int c>(const TileSums&, Vectors<c>) { tile_zero<c>(); });
    } else {
      const Index block = (i - score_steps_) / 2, half = (i - score_steps_) % 2, dvp = layout.dvp;
      const auto* v = static_cast<const bf16*>(task_.v) + summed_.panel * panel_columns * dvp;
      multiply(p_ + half * 32, panel_columns * 2, v + (half * 16 * dvp + block * 32) * 2, dvp * 4,
               {summed_.group->acc + block * 32, dvp * 4, block * 32 + 16 < dvp}, half == 0, half == 1,
               []<int c>(const TileSums& sums, Vectors<c>) { sums.load<c>(); });
    }
  }

  // One step of a block of sums; the first begins each tile by `start` when the block before has left it.
  template <class Start>
  void multiply(const bf16* a, Index a_bytes, const bf16* b, Index b_bytes, const TileSums& sums, bool first, bool last,
                Start start) {
    if (first) {
      multiply_tiles(a, a_bytes, b, b_bytes, sums.two, [&]<int c>(Vectors<c> tile) {
        done_.store<c>();
        start(sums, tile);
      });
      done_ = {};
    } else {
      multiply_tiles(a, a_bytes, b, b_bytes, sums.two, [](auto) {});
    }
    if (last) done_ = sums;
  }

  const PanelTask& task_;
  Index depth_, blocks_, step_ = 0, score_steps_ = 0, steps_ = 0;
  TileUnit scored_, summed_;
  TileSums done_;  // what the tiles hold still
  float* s_ = nullptr;
  const bf16* p_ = nullptr;
};

/// 2^x, relative error 1.1e-4; what is above any weight's range gives more than `limit`. While tiles are multiplied,
/// one vector port is left for all but additions and bits: rounding down to a fraction takes one operation where a
/// rounded number and a difference take three, and the whole part is found by the scaling itself.
inline F weight_of(F x) {
#if defined(__AVX512DQ__)
  const F r = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  // Minimax on [0, 1), exact at both ends: the largest score of a row is 0 but for a rounding that may fall below it.
  F p = fma(set1(0.0782679702f), r, set1(0.226307682f));
  p = fma(p, r, set1(0.695424348f));
  p = fma(p, r, set1(1));
  return scale_by_power(p, x);
#else
  return exp2<false>(min(x, set1(127)));
#endif
}

class TiledAttention {
 public:
  explicit TiledAttention(const PanelTask& t)
      : task_(t), work_(t), plain_(t.softcap == 0 && t.add == nullptr && t.scale > 0),
        factor_(plain_ ? t.scale * log2_e : log2_e) {}

  void run() {
    begin_products();
    TileUnit before, now, next;
    if (!find(next)) return;
    for (Index parity = 0; next.group != nullptr || now.group != nullptr || before.group != nullptr; parity ^= 1) {
      // `next` is scored, `now` weighed and `before` added up.
      work_.begin(next, scores_[parity ^ 1], before, weights_[parity ^ 1]);
      if (now.group != nullptr) weigh(now, scores_[parity], weights_[parity]);
      work_.finish();
      if (before.group != nullptr && before.closes()) close(*before.group);
      before = now, now = next;
      if (next.group != nullptr) find(next);
    }
  }

 private:
  Index rank(Index row) const { return task_.row_list == nullptr ? task_.first_row + row : task_.row_list[row]; }

  // The next unit: the next panel of the last group, or the first one of the next group that sees any.
  bool find(TileUnit& unit) {
    if (unit.group != nullptr && ++unit.panel < unit.group->to) return true;
    for (; row_ < task_.rows; row_ += tiled_rows) {
      TileGroup& group = groups_[opened_ % 4];  // of the last three units there may be a group each
      group.first = row_, group.rows = task_.rows - row_ < tiled_rows ? task_.rows - row_ : tiled_rows;
      const auto [from, to, tested] = seen_strip(task_, group.first, group.rows, panel_columns);
      if (from >= to) continue;
      group.from = from / panel_columns, group.to = to / panel_columns, group.tested = tested;
      open(group);
      row_ += tiled_rows, ++opened_;
      unit = {&group, group.from};
      return true;
    }
    unit = {};
    return false;
  }

  void open(TileGroup& group) {
    const Index dp = task_.layout.dp, dvp = task_.layout.dvp;
    const auto* q = static_cast<const bf16*>(task_.q);
    for (Index i = 0; i < group.rows; ++i) store(group.total[i], zero());
    group.copied = task_.row_list != nullptr || group.rows < tiled_rows;
    if (!group.copied) {
      group.q = q + rank(group.first) * dp, group.acc = task_.acc + rank(group.first) * dvp;
      return;
    }
    group.q = group.own_q, group.acc = group.own_acc;
    for (Index i = 0; i < tiled_rows; ++i) {
      const Index at = i < group.rows ? rank(group.first + i) : -1;
      for (Index f = 0; f < dp; ++f) group.own_q[i * dp + f] = at < 0 ? bf16{} : q[at * dp + f];
      for (Index e = 0; e < dvp; e += W)
        store(group.own_acc + i * dvp + e, at < 0 ? zero() : load(task_.acc + at * dvp + e));
    }
  }

  void close(const TileGroup& group) {
    const Index dvp = task_.layout.dvp;
    for (Index i = 0; i < group.rows; ++i) {
      const Index at = rank(group.first + i);
      task_.l[at] += sum_lanes(load(group.total[i]));
      if (!group.copied) continue;
      for (Index e = 0; e < dvp; e += W) store(task_.acc + at * dvp + e, load(group.acc + i * dvp + e));
    }
  }

  void weigh(const TileUnit& unit, float* s, bf16* p) {
    TileGroup& group = *unit.group;
    for (Index i = 0; i < group.rows; ++i, s += panel_columns, p += panel_columns) {
      const Index row = group.first + i;
      if (!plain_) {
        const float* add =
            task_.add == nullptr ? nullptr : task_.add + row * task_.add_stride + unit.panel * panel_columns;
        apply_rule(task_, add, s, 0, panel_columns);
      }
      if (group.tested) {
        const std::uint64_t word = task_.words[row * task_.word_stride + unit.panel];
        for (Index j = 0; j < panel_columns; j += W) store(s + j, visible_score(s, j, &word));
      }
      float& m = task_.m[rank(row)];
      if (m == minus_infinity) m = largest(s);
      if (m == minus_infinity) {
        for (Index j = 0; j < panel_columns; j += 2 * W) store_weights(p + j, zero(), zero());
      } else {
        F sum = weights(s, p, m);
        if (less(set1(limit), sum) != 0) {
          raise(group, i, largest(s), m);
          sum = weights(s, p, m);
        }
        store(group.total[i], load(group.total[i]) + sum);
      }
      work_.keep_up(i + 1, group.rows);
    }
  }

  // The largest score of a row's panel, base 2.
  float largest(const float* s) const {
    F top = load(s);
    for (Index j = W; j < panel_columns; j += W) top = max(top, load(s + j));
    return max_lane(top) * factor_;
  }
  // The weights of a row's panel by the reference m, and their sums.
  F weights(const float* s, bf16* p, float m) const {
    const F f = set1(factor_), reference = set1(-m);
    F sum = zero();
    for (Index j = 0; j < panel_columns; j += 2 * W) {
      const F a = weight_of(fma(load(s + j), f, reference)), b = weight_of(fma(load(s + j + W), f, reference));
      sum = sum + (a + b);
      store_weights(p + j, a, b);
    }
    return sum;
  }

  // A row's reference becomes `most`; what was weighed by the old one must be at rest, and shrinks.
  void raise(TileGroup& group, Index i, float most, float& m) {
    work_.finish();
    const Index at = rank(group.first + i), dvp = task_.layout.dvp;
    task_.l[at] += sum_lanes(load(group.total[i]));
    store(group.total[i], zero());
    raise_maximum(most, m, task_.l[at], group.acc + i * dvp, dvp);
  }

  const PanelTask& task_;
  TileWork work_;
  bool plain_;
  float factor_;
  Index row_ = 0, opened_ = 0;
  TileGroup groups_[4];
  alignas(64) float scores_[2][tiled_rows * panel_columns];
  alignas(64) bf16 weights_[2][tiled_rows * panel_columns] = {};
};

/// attend_rows<bf16> on tiles.
inline void attend_tiled(const PanelTask& t) {
  // A group's gate must be weighed after all of its columns.
  if (t.gates != nullptr || t.layout.dp > widest_tiled || t.layout.dvp > widest_tiled) return attend_rows<bf16>(t);
  TiledAttention(t).run();
}
