#include "heed/base/scratch.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <new>

namespace heed {
namespace {
std::atomic<Index> peaks{0}, current_epoch{0};
}  // namespace

void Scratch::Free::operator()(void* p) const { std::free(p); }

void* Scratch::take_bytes(Index bytes) {
  constexpr Index alignment = 64, smallest = Index{1} << 20;
  bytes = round_up(std::max<Index>(bytes, 1), alignment);
  while (block_ < blocks_.size() && used_ + bytes > blocks_[block_].bytes) ++block_, used_ = 0;
  if (block_ == blocks_.size()) {
    // Doubling keeps the number of blocks, and of page faults, logarithmic.
    const Index grow = blocks_.empty() ? smallest : 2 * blocks_.back().bytes;
    const Index size = round_up(std::max(bytes, std::min(grow, Index{64} << 20)), 4096);
    void* memory = std::aligned_alloc(4096, static_cast<size_t>(size));
    if (memory == nullptr) throw std::bad_alloc();
    blocks_.push_back({std::unique_ptr<void, Free>(memory), size});
    used_ = 0;
  }
  void* p = static_cast<std::byte*>(blocks_[block_].memory.get()) + used_;
  used_ += bytes;
  note_use();
  return p;
}

void Scratch::note_use() {
  Index in_use = used_;
  for (size_t i = 0; i < block_; ++i) in_use += blocks_[i].bytes;
  if (const Index epoch = current_epoch; epoch != epoch_) epoch_ = epoch, peak_ = 0;
  if (in_use > peak_) {
    peaks += in_use - peak_;
    peak_ = in_use;
  }
}

Index Scratch::capacity() const {
  Index sum = 0;
  for (const Block& b : blocks_) sum += b.bytes;
  return sum;
}

Scratch& thread_scratch() {
  thread_local Scratch scratch;
  return scratch;
}

Index scratch_bytes() { return peaks; }

void reset_scratch_peak() {
  ++current_epoch;
  peaks = 0;
}

}  // namespace heed
