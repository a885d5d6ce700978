// How much blocks of keys matter to blocks of queries, guessed from a part of the pairs.
#pragma once

#include <vector>

#include "heed/plan/plan.h"

namespace heed {

/// What a row block is scored for: query blocks of `query_block` rows from its first on (the last may be shorter)
/// against blocks of `block` keys, as [query blocks, stride].
struct Importance {
  Index query_block = 0, block = 0;
  float scale = 1;
  float* out = nullptr;
  Index stride = 0;
};

/// Every few-th key of every block, packed so that queries are scored against all blocks by one product.
class SampledKeys {
 public:
  /// Keys at offsets 0, stride, 2·stride, … of every block of `block` tokens. Keeps tokens / stride keys a head, f32.
  SampledKeys(const KeyValues& kv, Index tokens, Index block, Index stride);

  /// Per query block and block b: the largest of scale·<q_i, k_j> - max over all sampled j' of scale·<q_i, k_j'>, over
  /// queries i at offsets 0, stride, … of the query block and sampled keys j of b. Its exponential, at most 1, is
  /// the block's largest weight relative to a row's largest.
  void score(const Queries& queries, const RowBlock& rows, Index kv_head, const Importance& to, Scratch& scratch) const;

 private:
  Index d_, blocks_, columns_, stride_;
  std::vector<std::vector<float>> panels_;  // per KV head; key o·blocks + b is at offset o·stride of block b
};

/// Keys in folds of `fold` consecutive tokens, features one after the other. Folds of queries are read backwards,
/// so that the product of two folds is the sum along an antidiagonal of their square of pairs: one product in
/// `fold`, and no stripe or slash of the pattern escapes.
class FoldedKeys {
 public:
  /// Keeps all keys, f32. What a fold holds beyond `tokens` is zero.
  FoldedKeys(const KeyValues& kv, Index tokens, Index fold);

  /// Per query block and block b: over the query block's folds, the sum of the softmax weights of the folds in b. A
  /// fold a of queries has scores scale/fold · <q_a, k_c> at folds c <= a. N = M, and `fold` divides block, query_block
  /// and the row block's beginning. Writes as many blocks as begin before the row block's end, 0 beyond the query
  /// block's.
  void score(const Queries& queries, const RowBlock& rows, Index kv_head, const Importance& to, Scratch& scratch) const;

 private:
  Index tokens_, d_, fold_;
  std::vector<std::vector<float>> panels_;  // per KV head
};

}  // namespace heed
