// A plan says which queries meet which keys: row blocks, and for each, when asked, its tiles.
#pragma once

#include <functional>
#include <limits>
#include <memory>
#include <span>
#include <vector>

#include "heed/base/scratch.h"
#include "heed/base/tensor.h"
#include "heed/plan/keys.h"
#include "heed/plan/rule.h"

namespace heed {

/// The sizes of one attention call. Queries are the last N of M positions.
struct Problem {
  Index B = 1, Hq = 1, Hk = 1, N = 0, M = 0, D = 0, Dv = 0;
  bool causal = false;
  Index group() const { return Hq / Hk; }
  Index position(Index token) const { return M - N + token; }
};

/// A set of rows or columns, ascending: a range, or pages of `page` consecutive members. Page i
/// starts at first + pages[i]·page; only the last page may be cut short (count says).
struct Set {
  Index first = 0, count = 0;
  const std::int32_t* pages = nullptr;
  Index page = 1;

  static Set range(Index begin, Index end) { return {begin, end > begin ? end - begin : 0}; }
  static Set list(std::span<const std::int32_t> members) {
    return {0, static_cast<Index>(members.size()), members.data(), 1};
  }
  bool contiguous() const { return pages == nullptr; }
  Index operator[](Index i) const { return pages == nullptr ? first + i : first + pages[i / page] * page + i % page; }
};

/// Which pairs of a tile exist. Positions, never ranks, are compared.
struct Mask {
  enum class Kind : std::uint8_t { full, band, bits };
  static constexpr Index unbounded = std::numeric_limits<std::int32_t>::max();

  Kind kind = Kind::full;
  Index lo = -unbounded, hi = unbounded;  // band: pos_row + lo <= pos_column <= pos_row + hi
  const std::uint64_t* words = nullptr;   // bits: row i, column c at words[i·stride + c/64], bit c%64
  Index stride = 0;

  static Mask full() { return {}; }
  static Mask band(Index lo, Index hi) { return {Kind::band, lo, hi}; }
  static Mask causal() { return band(-unbounded, 0); }
  static Mask bits(const std::uint64_t* words, Index stride) { return {Kind::bits, 0, 0, words, stride}; }
};

/// Rows × columns of one source.
struct Tile {
  Index source = 0;
  Set rows;     // ranks in the row block
  Set columns;  // columns of the source
  Mask mask;
  // The columns, a range, are groups that the source's landmarks close, the last one at its end. As one
  // softmax, a token's score is s - lse(its group's tokens) + s(its landmark), see PanelTask.
  bool gated = false;
};

/// What the columns of a source are made of: column c is the mean of the input's tokens[begins[c] … begins[c + 1]) or,
/// without begins, a copy of token tokens[c] (-1: of none). Gradients of the columns go home along it, see fold().
struct Members {
  std::vector<std::int32_t> tokens;
  std::vector<Index> begins;
};

/// Packed keys and values of one lane's source, with what a column stands for.
struct SourceView {
  const void *keys = nullptr, *values = nullptr;
  /// The keys once more, [columns, dp] in the layout's type of products, or null: a listed column's features lie apart
  /// in a panel, side by side here.
  const std::byte* key_rows = nullptr;
  const float *key_scale = nullptr, *value_scale = nullptr;  // [columns] where i8 is stored
  Index columns = 0;
  const float* log_weight = nullptr;  // [columns], natural log, or null = 0
  const std::int32_t* position = nullptr;  // [columns], ascending, or null = its rank
  const std::uint64_t* visible = nullptr;  // one bit per column, null = all: padding
  const std::uint64_t* gates = nullptr;  // one bit per column: the landmarks, for gated tiles
  const Members* members = nullptr;  // of derived columns, or null: they are nobody's but their own
};

/// Keys and values that tiles may name. The first source is the input itself.
struct Source {
  PanelLayout layout;
  bool per_query_head = false;  // views differ per query head, else per KV head
  std::vector<SourceView> views;  // [B · heads]
};

/// Rows of one head: tokens [first, first + rows) of the lane's row order.
struct RowBlock {
  Index b = 0, kv_head = 0, head = 0;  // head: the (first) query head
  Index first = 0, rows = 0;
  const std::int32_t* tokens = nullptr;  // the lane's row order, or null = identity
  Index position0 = 0;  // position of token 0

  Index token(Index rank) const { return tokens == nullptr ? first + rank : tokens[first + rank]; }
  Index position(Index rank) const { return position0 + token(rank); }
};

/// Collects the tiles of one row block; what `take` hands out lives as long as the tiles.
class Tiles {
 public:
  /// Starts empty; `list` lends its memory, so that a hot loop reuses it.
  Tiles(Scratch& scratch, std::vector<Tile>& list) : scratch_(scratch), tiles_(list) { tiles_.clear(); }
  void add(const Set& rows, const Set& columns, const Mask& mask, Index source = 0, bool gated = false) {
    if (rows.count > 0 && columns.count > 0) tiles_.push_back({source, rows, columns, mask, gated});
  }
  template <class T>
  std::span<T> take(Index count) {
    return scratch_.take<T>(count);
  }
  Scratch& scratch() { return scratch_; }
  const std::vector<Tile>& list() const { return tiles_; }

 private:
  Scratch& scratch_;
  std::vector<Tile>& tiles_;
};

/// Whether query heads that share a KV head share their tiles.
enum class Lanes : std::uint8_t { per_kv_head, per_query_head };

/// Queries as the arithmetic sees them.
class Queries {
 public:
  Queries() = default;
  /// q [B, Hq, N, D], any strides; with bf16 arithmetic f32 values are rounded when read.
  Queries(TensorView q, DType arithmetic) : q_(std::move(q)), arithmetic_(arithmetic) {}
  void read(Index b, Index head, Index token, float* out) const;
  /// One query as the kernels read it: dp elements of the layout's product type, those beyond D zero.
  void read_packed(const PanelLayout& layout, Index b, Index head, Index token, void* out) const;
  DType arithmetic() const { return arithmetic_; }
  const TensorView& view() const { return q_; }

 private:
  TensorView q_;
  DType arithmetic_ = DType::f32;
};

struct Plan {
  Problem problem;
  Lanes lanes = Lanes::per_kv_head;
  Queries queries;
  std::vector<Source> sources;
  Rule rule;

  /// Boundaries of row blocks inside a head: 0 = cuts[0] < … < cuts.back() = rows of a head.
  std::vector<Index> cuts;
  /// Per lane [B · heads] the query token of each row, or empty = every token once, in order.
  std::vector<std::vector<std::int32_t>> row_tokens;
  /// Where the result of a row goes: to its token's row of the output (row_tokens is a permutation),
  /// or, when a token stands in several rows or none, to the row's own.
  bool output_by_token = true;
  /// Per batch and position [B · M]: the first and one past the last position that a query there
  /// may see, on top of every mask (documents, prefixes), or empty.
  std::vector<std::int32_t> visible_first, visible_end;

  /// Pure and thread-safe; called again by whoever walks the plan.
  std::function<void(const RowBlock&, Tiles&)> emit;

  /// Whether a query that stands at `position` or later, of this call or of one that follows it, may see one of the
  /// tokens [begin, end) of a KV head (lane b·Hk + head); empty: it may. What none may see can be dropped once as many
  /// tokens are held. Pure; holds what it needs, as it outlives the plan.
  std::function<bool(Index lane, Index position, Index begin, Index end)> reaches;

  /// What emit's closure and the views point to.
  std::vector<std::shared_ptr<const void>> keep;

  /// Cuts every `rows` rows, at token indices whose position is a multiple of `rows` + phase 0.
  void cut_rows_every(Index rows);
  Index rows_per_head() const { return cuts.empty() ? 0 : cuts.back(); }
};

/// A plan over q and the packed keys and values of the call, one row block per 256 positions, with
/// nothing emitted yet: mechanisms start from it. The views stay the caller's.
Plan make_plan(const Problem& problem, const Queries& queries, const KeyValues& kv, const Rule& rule, Lanes lanes);

/// Lets the plan's input show its keys as rows too (KeyValues::key_rows): worth it where each key is listed, far from
/// its neighbours, by several row blocks.
void show_key_rows(Plan& plan, const KeyValues& kv);

}  // namespace heed
