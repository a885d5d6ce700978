// The results of heed compare, and the ways to say them.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "cli/options.h"
#include "heed/exec/picture.h"
#include "heed/model/compare.h"

namespace heed::cli {

/// One head's plan over the whole document.
struct PlanPicture {
  size_t row = 0;  // of Comparison::rows
  Index layer = 0, head = 0;
  Picture picture;
  double density = 0;
};

struct Comparison {
  std::string machine, isa, dtype, kv, model, model_name, file, layers, phase;
  int threads = 1;
  Index tokens = 0, chunk = 0;
  bool perplexity = false;
  std::vector<std::uint64_t> seeds;
  std::vector<model::CompareRow> rows;
  std::vector<PlanPicture> pictures;

  /// The row named dense, or null.
  const model::CompareRow* dense() const;
};

Index keys_found(const model::CompareRow& row);
/// Seconds of the dense row's prefill by those of this one; nothing without a dense row.
std::optional<double> speedup(const Comparison& c, const model::CompareRow& row);
/// Share of the prefill's time that attention took.
double attention_share(const model::CompareRow& row);

std::string comparison_table(const Comparison& c);
Json comparison_json(const Comparison& c);
/// One page that needs nothing else: styles, charts and pictures are inside.
std::string comparison_html(const Comparison& c);

}  // namespace heed::cli
