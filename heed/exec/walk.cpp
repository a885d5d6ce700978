// A plan looked at without arithmetic.

#include "heed/base/scratch.h"
#include "heed/exec/attend.h"

namespace heed {

void walk_head(const Plan& plan, Index b, Index head, const TileVisitor& visit) {
  const Problem& p = plan.problem;
  const bool per_query = plan.lanes == Lanes::per_query_head;
  Scratch& scratch = thread_scratch();
  std::vector<Tile> reused;
  for (size_t cut = 0; cut + 1 < plan.cuts.size(); ++cut) {
    RowBlock block;
    block.b = b, block.kv_head = head / p.group();
    block.head = per_query ? head : block.kv_head * p.group();
    block.first = plan.cuts[cut], block.rows = plan.cuts[cut + 1] - plan.cuts[cut];
    block.position0 = p.position(0);
    if (!plan.row_tokens.empty())
      block.tokens =
          plan.row_tokens[static_cast<size_t>(per_query ? b * p.Hq + head : b * p.Hk + block.kv_head)].data();
    const Scratch::Mark mark(scratch);
    Tiles tiles(scratch, reused);
    plan.emit(block, tiles);
    visit(block, tiles.list());
  }
}

void walk(const Plan& plan, const TileVisitor& visit) {
  const Problem& p = plan.problem;
  const Index step = plan.lanes == Lanes::per_query_head ? 1 : p.group();
  for (Index b = 0; b < p.B; ++b)
    for (Index head = 0; head < p.Hq; head += step) walk_head(plan, b, head, visit);
}

bool sees(const Plan& plan, const RowBlock& rows, const Tile& tile, Index row_rank, Index column_rank) {
  const Source& source = plan.sources[static_cast<size_t>(tile.source)];
  const Problem& p = plan.problem;
  const SourceView& view =
      source
          .views[static_cast<size_t>(source.per_query_head ? rows.b * p.Hq + rows.head : rows.b * p.Hk + rows.kv_head)];
  const Index column = tile.columns[column_rank];
  if (tile.gated && ((view.gates[column / 64] >> (column % 64)) & 1) != 0) return false;
  if (view.visible != nullptr && ((view.visible[column / 64] >> (column % 64)) & 1) == 0) return false;
  const Index from = rows.position(tile.rows[row_rank]);
  const Index to = view.position == nullptr ? column : view.position[column];
  if (!plan.visible_first.empty()) {
    const size_t at = static_cast<size_t>(rows.b * p.M + from);
    if (to < plan.visible_first[at] || to >= plan.visible_end[at]) return false;
  }
  switch (tile.mask.kind) {
    case Mask::Kind::full: return true;
    case Mask::Kind::band: return from + tile.mask.lo <= to && to <= from + tile.mask.hi;
    case Mask::Kind::bits:
      return ((tile.mask.words[row_rank * tile.mask.stride + column_rank / 64] >> (column_rank % 64)) & 1) != 0;
  }
  return false;
}

}  // namespace heed
