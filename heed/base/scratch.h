// Scratch memory: a bump allocator that keeps what it once grew to, so hot loops never allocate.
#pragma once

#include <memory>
#include <span>
#include <type_traits>
#include <vector>

#include "heed/base/types.h"

namespace heed {

/// One thread's scratch. `take` hands out 64-byte aligned, uninitialised arrays that live until
/// the enclosing Mark is destroyed.
class Scratch {
 public:
  template <class T>
  std::span<T> take(Index count) {
    static_assert(std::is_trivially_copyable_v<T>);
    return {static_cast<T*>(take_bytes(count * static_cast<Index>(sizeof(T)))), static_cast<size_t>(count)};
  }

  /// Restores the scratch to what it was when the mark was made.
  class Mark {
   public:
    explicit Mark(Scratch& s) : scratch_(s), block_(s.block_), used_(s.used_) {}
    ~Mark() { scratch_.block_ = block_, scratch_.used_ = used_; }
    Mark(const Mark&) = delete;
    Mark& operator=(const Mark&) = delete;

   private:
    Scratch& scratch_;
    size_t block_;
    Index used_;
  };

  /// Bytes held, in use or not.
  Index capacity() const;

 private:
  struct Free {
    void operator()(void* p) const;
  };
  struct Block {
    std::unique_ptr<void, Free> memory;
    Index bytes;
  };
  void* take_bytes(Index bytes);

  void note_use();

  std::vector<Block> blocks_;
  size_t block_ = 0;  // the block in use
  Index used_ = 0;    // bytes of it handed out
  Index peak_ = 0;    // most bytes of all blocks in use at once, in the current epoch
  Index epoch_ = 0;
};

/// The calling thread's own scratch.
Scratch& thread_scratch();

/// The most bytes that every thread had in use at once since reset_scratch_peak(), summed over threads.
Index scratch_bytes();
void reset_scratch_peak();

}  // namespace heed
