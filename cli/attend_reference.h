// A few rows of attention in f64, written plainly: what every benchmark of attention is held to.
#pragma once

#include <functional>
#include <map>
#include <optional>
#include <utility>
#include <vector>

#include "heed/mechanism/attend.h"

namespace heed::cli {

class ReferenceRows {
 public:
  /// Four query tokens, first and last included, of each head that is planned for. Queries, keys and values are taken
  /// as they were given, before any rounding; columns that a mechanism derived, as its plan holds them. Nothing for
  /// plans whose scores are not just scaled products.
  static std::optional<ReferenceRows> of(const CheckedCall& call, const AttendInput& in, const Plan& plan);

  /// Query tokens looked at, ascending.
  const std::vector<Index>& tokens() const { return tokens_; }
  /// The largest difference from got(head of B · Hq, rank in tokens(), feature), relative to the largest value.
  double error(const std::function<double(Index head, size_t rank, Index feature)>& got) const;

 private:
  struct Sum {
    double weight = 0;
    std::vector<double> value;  // [Dv]
  };
  std::vector<Index> tokens_;
  std::map<std::pair<Index, size_t>, Sum> sums_;  // by head and rank
};

}  // namespace heed::cli
