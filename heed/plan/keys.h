// Keys and values of all heads, kept packed for the kernels: what attention reads, and the KV
// cache of a model. Written once, growing with the tokens.
#pragma once

#include <map>
#include <memory>
#include <span>
#include <vector>

#include "heed/base/tensor.h"
#include "heed/kernel/panels.h"

namespace heed {

/// Mean keys of complete blocks of tokens, per head packed as f32 key panels of d features, a column a block.
struct BlockMeans {
  Index block = 0, complete = 0, capacity = 0;  // capacity: a multiple of 64
  std::vector<float> panels;                    // those of head h from h·capacity·d on
};

/// The largest and the least of each feature of the keys of complete blocks, per head: of block b of head h d largest
/// and then d least ones, at bounds[(h·capacity + b)·2·d].
struct BlockBounds {
  Index block = 0, complete = 0, capacity = 0;
  std::vector<float> bounds;
};

/// Keys as rows in the layout's product type: token t of head h starts at data + (h·capacity + t)·dp elements.
struct KeyRows {
  const std::byte* data = nullptr;
  Index row_bytes = 0, capacity = 0;
  const std::byte* row(Index head, Index token) const { return data + (head * capacity + token) * row_bytes; }
};

class KeyValues {
 public:
  /// Room for `capacity` tokens of `heads` heads (a batch's heads one after the other). Memory is
  /// touched as tokens come. stored: f32, bf16, or i8 with a scale for each key and each value.
  KeyValues(Index heads, Index d, Index dv, Index capacity, DType stored);

  Index heads() const { return heads_; }
  Index size() const { return size_; }  // tokens held
  Index capacity() const { return capacity_; }
  const PanelLayout& layout() const { return layout_; }
  /// What queries that meet these keys are rounded to: bf16 where that is what they are stored as, else f32.
  DType arithmetic() const { return layout_.dtype == DType::bf16 ? DType::bf16 : DType::f32; }
  /// Bytes that the tokens held occupy, summaries included, released panels not.
  Index bytes() const;

  /// Appends n tokens to every head: k [heads, n, D] and v [heads, n, Dv], or with the heads as two
  /// axes [B, Hk, n, D]; any strides; f32, f16 or bf16, rounded to the stored type. Throws Error when the capacity
  /// is exceeded.
  void append(const TensorView& k, const TensorView& v);
  /// Forgets all tokens from `size` on.
  void truncate(Index size);
  /// Frees the memory of panels [first, end) of one head, whole pages of it, for good: whoever reads their tokens finds
  /// zeros, or whatever comes to stand there. The tokens still count as held.
  void release(Index head, Index first, Index end);
  bool released(Index head, Index panel) const {
    return !released_.empty() && released_[static_cast<size_t>(head * panels_ + panel)];
  }
  Index released_panels() const { return released_count_; }  // of all heads

  const void* keys(Index head) const;  // first panel
  const void* values(Index head) const;  // first row
  /// Scales of each key and each value where i8 is stored, else null.
  const float* key_scales(Index head) const;
  const float* value_scales(Index head) const;
  /// Key or value of one token, widened: d (dv) floats.
  void read_key(Index head, Index token, float* out) const;
  void read_value(Index head, Index token, float* out) const;

  /// Adds the keys of tokens [begin, end) of one head to sum [d], f32, in token order within a panel.
  void sum_keys(Index head, Index begin, Index end, float* sum) const;
  /// The same for values, sum [dv], in token order.
  void sum_values(Index head, Index begin, Index end, float* sum) const;

  /// Means of the keys of every complete block of `block` tokens, f32 sums, kept and brought up to date: blocks
  /// whose means are there are not looked at again. Not thread-safe: call it before parallel work.
  const BlockMeans& block_means(Index block) const;

  /// Adds the keys of one panel to sum, a key panel of f32 [d, 64].
  void add_panel(Index head, Index panel, float* sum) const;

  /// Raises most [d] and lowers least [d] to the keys of tokens [begin, end) of one head.
  void bound_keys(Index head, Index begin, Index end, float* most, float* least) const;

  /// Bounds of the keys of every complete block of `block` tokens, kept and brought up to date like block_means.
  const BlockBounds& block_bounds(Index block) const;

  /// The keys once more, as rows: a key's features lie apart in a panel, which is slow for those who
  /// look at single keys. Kept from the first call on, brought up to date by each. Not thread-safe.
  KeyRows key_rows() const;

 private:
  template <class Blocks, class Fill>
  void complete_blocks(Index block, Index width, Blocks& blocks, std::vector<float>& values, Fill fill) const;

  struct Free {
    Index bytes;
    void operator()(std::byte* p) const;
  };
  Index heads_, capacity_, size_ = 0, panels_, released_count_ = 0;  // panels_: a head's, of the capacity
  std::vector<bool> released_;  // [heads, panels], or empty: none was
  PanelLayout layout_;
  Index head_bytes_k_ = 0, head_bytes_v_ = 0, scales_ = 0;  // scales_: of a head's keys, and of its values
  std::unique_ptr<std::byte, Free> memory_k_, memory_v_, memory_scales_;
  mutable std::map<Index, BlockMeans> means_;
  mutable std::map<Index, BlockBounds> bounds_;
  mutable std::unique_ptr<std::byte, Free> memory_rows_;
  mutable Index rows_complete_ = 0;  // tokens in memory_rows_
};

/// Folds the keys of columns [begin, end) of packed keys into out [d], f32, in column order within a panel: adds them,
/// or keeps the largest of each feature.
void sum_columns(const PanelLayout& layout, const void* keys, Index begin, Index end, float* out);
void max_columns(const PanelLayout& layout, const void* keys, Index begin, Index end, float* out);

/// Keys alone (dv = 0), packed: k [heads, n, D], or with the heads as two axes. A source may show them beside the
/// values of other KeyValues that are stored alike.
KeyValues pack_keys(const TensorView& k, DType stored);

}  // namespace heed
