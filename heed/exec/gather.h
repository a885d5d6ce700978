// What a traversal fetches beside whole panels: listed columns, and addends of scores.
#pragma once

#include "heed/exec/rows.h"

namespace heed {

/// Packs members [from, from + count) of `columns` (count <= chunk_columns) into panels of their own
/// in scratch, in the layout of copies, with their log-weights, positions and visibility.
SourceView gather_columns(const PanelLayout& layout, const SourceView& view, const Set& columns, Index from,
                          Index count, Scratch& scratch);

/// The same without keys and values, for those who only count.
SourceView describe_columns(const SourceView& view, const Set& columns, Index from, Index count, Scratch& scratch);

/// What the rule adds to the scores of one row: ALiBi, bias and log-weights, natural units, for
/// `count` columns from rank `first` on; 0 where the tile has no such column. `origin`: the rank
/// that the view's column 0 has.
void fill_addend(const Plan& plan, const Rows& rows, Index row_rank, const Tile& tile, const SourceView& view,
                 Index first, Index origin, Index count, float* out);

}  // namespace heed
