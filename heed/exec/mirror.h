// Sources as gradients read them: f32, keys and values each both as panels and as rows where products need them.
#pragma once

#include <vector>

#include "heed/exec/gather.h"

namespace heed {

/// The second sides of a plan's sources: a view's "keys" are its values as panels, its "values" are its keys as rows.
/// Lists of columns are gathered from them as from any source.
struct Mirrors {
  PanelLayout scores;  // of the plan's sources: keys as panels, no values
  PanelLayout layout;  // of the mirrors
  Index dvp = 0;       // Dv rounded up to 16; keys' rows hold layout.dvp = D rounded up to 16
  std::vector<std::vector<SourceView>> views;  // [source][view]
  std::vector<Tensor> memory;

  Index qp() const { return layout.dvp; }
  const SourceView& view(const Plan& plan, Index source, const RowBlock& rows) const;
};

/// Makes the mirrors, and turns the plan's own sources into f32 ones without values. Takes (D + Dv)·columns numbers a
/// view, and D·columns more where keys are bf16; views of the same memory share theirs. The mirrors keep what both
/// point to.
Mirrors mirror_sources(Plan& plan);

}  // namespace heed
