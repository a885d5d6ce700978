// Large arrays of plain numbers: 64-byte aligned, not zeroed, contents lost when they grow.
#pragma once

#include <cstdlib>
#include <memory>
#include <new>
#include <type_traits>

#include "heed/base/types.h"

namespace heed::model {

template <class T>
class Buffer {
  static_assert(std::is_trivially_destructible_v<T>);

 public:
  Buffer() = default;
  explicit Buffer(Index count) { reach(count); }

  /// Room for at least `count` elements; what was held is lost when that needs new memory.
  void reach(Index count) {
    if (count <= count_) return;
    memory_.reset();
    count_ = 0;
    const Index bytes = round_up(count * static_cast<Index>(sizeof(T)), alignment);
    void* p = std::aligned_alloc(alignment, static_cast<size_t>(bytes));
    if (p == nullptr) throw std::bad_alloc();
    memory_.reset(static_cast<T*>(p));
    count_ = count;
  }

  T* data() { return memory_.get(); }
  const T* data() const { return memory_.get(); }
  Index size() const { return count_; }
  Index bytes() const { return count_ * static_cast<Index>(sizeof(T)); }

 private:
  static constexpr Index alignment = 64;
  struct Free {
    void operator()(T* p) const { std::free(p); }
  };
  std::unique_ptr<T, Free> memory_;
  Index count_ = 0;
};

}  // namespace heed::model
