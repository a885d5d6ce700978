#include "heed/nn/text.h"

#include <ATen/ops/empty.h>

#include <algorithm>
#include <cmath>

#include "heed/base/random.h"

namespace heed::nn {

TrainingText::TrainingText(std::vector<model::Token> tokens, double held_out, Index length,
                           std::optional<model::Token> bos, const std::string& name)
    : tokens_(std::move(tokens)), length_(length), bos_(bos) {
  const auto total = static_cast<Index>(tokens_.size());
  const auto held = static_cast<Index>(std::llround(held_out * static_cast<double>(total)));
  held_from_ = total - held;
  if (held_from_ < length + 1)
    fail("{}: {} tokens to train on, expected at least length + 1 = {}", name, held_from_, length + 1);
  if (held_out > 0 && held < length + 1)
    fail("{}: {} tokens are held out, expected at least length + 1 = {}, or held_out = 0", name, held, length + 1);
}

// With a BOS a window's first input is that, and its targets begin where its text begins.
Windows TrainingText::windows(const std::vector<Index>& starts) const {
  const auto count = static_cast<Index>(starts.size());
  const Index lag = bos_ ? 1 : 0;
  Windows w{at::empty({count, length_}, at::kLong), at::empty({count, length_}, at::kLong)};
  auto *in = w.tokens.data_ptr<std::int64_t>(), *out = w.targets.data_ptr<std::int64_t>();
  for (const Index start : starts)
    for (Index t = 0; t < length_; ++t) {
      *in++ = t < lag ? *bos_ : tokens_[static_cast<size_t>(start + t - lag)];
      *out++ = tokens_[static_cast<size_t>(start + t + 1 - lag)];
    }
  return w;
}

Windows TrainingText::batch(std::uint64_t seed, Index step, Index count) const {
  // Two draws apart, so that neighbouring seeds and steps share no windows.
  Random random(Random(seed).next() + static_cast<std::uint64_t>(step));
  Random places(random.next());
  std::vector<Index> starts;
  for (Index i = 0; i < count; ++i) starts.push_back(places.below(held_from_ - length_));
  return windows(starts);
}

std::vector<Windows> TrainingText::held_out(Index tokens, Index batch) const {
  const Index room = held_tokens() / length_ - (held_tokens() % length_ == 0 ? 1 : 0);  // the last has a target, too
  std::vector<Windows> list;
  if (held_tokens() == 0) return list;
  const Index count = std::clamp<Index>(tokens / length_, 1, room);
  std::vector<Index> starts;
  for (Index i = 0; i < count; ++i) {
    starts.push_back(held_from_ + i * room / count * length_);
    if (static_cast<Index>(starts.size()) == batch || i + 1 == count) list.push_back(windows(starts)), starts.clear();
  }
  return list;
}

}  // namespace heed::nn
