// A text as training reads it: windows at random places, and its end held out.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <vector>

#include "heed/model/tokenizer.h"

namespace heed::nn {

/// Inputs and, one token later, targets: [windows, length] i64 each.
struct Windows {
  at::Tensor tokens, targets;
};

class TrainingText {
 public:
  /// The last `held_out` share of the tokens is held out. `bos`: begins every window. Throws Error when either part is
  /// shorter than a window of `length` tokens and its last target (a share of 0 holds nothing out).
  TrainingText(std::vector<model::Token> tokens, double held_out, Index length, std::optional<model::Token> bos,
               const std::string& name);

  /// `count` windows at places that seed and step alone decide.
  Windows batch(std::uint64_t seed, Index step, Index count) const;
  /// Windows of the held-out part that share no target, spread over it evenly, at most `tokens` tokens but at least one
  /// window. Empty when nothing is held out.
  std::vector<Windows> held_out(Index tokens, Index batch) const;

  Index trained_tokens() const { return held_from_; }
  Index held_tokens() const { return static_cast<Index>(tokens_.size()) - held_from_; }

 private:
  Windows windows(const std::vector<Index>& starts) const;
  std::vector<model::Token> tokens_;
  Index held_from_, length_;
  std::optional<model::Token> bos_;
};

}  // namespace heed::nn
