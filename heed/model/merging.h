// The step that both tokenizers share: join the best pair of neighbours until no pair can be joined.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <limits>
#include <vector>

#include "heed/model/tokenizer.h"

namespace heed::model {

/// A stretch of text on its way to becoming a token.
struct Symbol {
  std::uint32_t begin, size;  // bytes; size 0: absorbed by a symbol to the left
  Token id;                   // of the token it is, where that is known; else -1
};

/// What two neighbours become; the lowest rank is joined first, leftmost among equals.
struct Joined {
  static constexpr std::uint32_t never = std::numeric_limits<std::uint32_t>::max();
  std::uint32_t rank = never;
  Token id = -1;
};

/// Symbols to be joined; n of them take O(n log n) time.
class Merger {
 public:
  void add(const Symbol& symbol) { symbols_.push_back(symbol); }

  /// Joins with `join(left symbol, right symbol) -> Joined`, then hands what is left to `take`, in
  /// order, and is empty again.
  template <class Join, class Take>
  void run(const Join& join, const Take& take) {
    const auto count = static_cast<std::uint32_t>(symbols_.size());
    links_.resize(count);
    queue_.clear();
    for (std::uint32_t i = 0; i < count; ++i) links_[i] = {i - 1, i + 1};  // the first one's left is never read
    for (std::uint32_t i = 0; i + 1 < count; ++i) consider(join, i, i + 1);
    std::make_heap(queue_.begin(), queue_.end(), std::greater<>());
    while (!queue_.empty()) {
      std::pop_heap(queue_.begin(), queue_.end(), std::greater<>());
      const Candidate best = queue_.back();
      queue_.pop_back();
      const auto left = static_cast<std::uint32_t>(best.order);
      Symbol& a = symbols_[left];
      Symbol& b = symbols_[best.right];
      // A symbol grows by absorbing its right neighbour only, so this pair is unchanged if both
      // still stand side by side and are as long together as they were.
      if (a.size == 0 || links_[left].next != best.right || a.size + b.size != best.size) continue;
      a = {a.begin, best.size, best.id};
      b.size = 0;
      const std::uint32_t next = links_[best.right].next;
      links_[left].next = next;
      if (next < count) {
        links_[next].previous = left;
        push(join, left, next);
      }
      if (left > 0) push(join, links_[left].previous, left);
    }
    for (std::uint32_t i = 0; i < count; i = links_[i].next) take(symbols_[i]);
    symbols_.clear();
  }

 private:
  struct Candidate {
    std::uint64_t order;  // rank, then place of the left symbol
    std::uint32_t right, size;
    Token id;
    bool operator>(const Candidate& other) const { return order > other.order; }
  };
  struct Links {
    std::uint32_t previous, next;
  };

  template <class Join>
  bool consider(const Join& join, std::uint32_t left, std::uint32_t right) {
    const Joined joined = join(symbols_[left], symbols_[right]);
    if (joined.rank == Joined::never) return false;
    queue_.push_back(
        {std::uint64_t{joined.rank} << 32 | left, right, symbols_[left].size + symbols_[right].size, joined.id});
    return true;
  }
  template <class Join>
  void push(const Join& join, std::uint32_t left, std::uint32_t right) {
    if (consider(join, left, right)) std::push_heap(queue_.begin(), queue_.end(), std::greater<>());
  }

  std::vector<Symbol> symbols_;
  std::vector<Links> links_;
  std::vector<Candidate> queue_;
};

}  // namespace heed::model
