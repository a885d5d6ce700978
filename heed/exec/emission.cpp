#include "heed/exec/emission.h"

namespace heed {
namespace {

Index pages_of(const Set& set) { return set.contiguous() ? 0 : ceil_div(set.count, set.page); }
Index words_of(const Mask& mask, const Set& rows) { return mask.words == nullptr ? 0 : rows.count * mask.stride; }

}  // namespace

const std::vector<Tile>& emit_tiles(const Plan& plan, const RowBlock& block, Scratch& scratch) {
  thread_local std::vector<Tile> reused;
  Tiles tiles(scratch, reused);
  plan.emit(block, tiles);
  return tiles.list();
}

const std::vector<Tile>& KeptTiles::emit(const Plan& plan, const RowBlock& block, Scratch& scratch) {
  std::call_once(once_, [&] {
    const Scratch::Mark mark(scratch);
    keep(emit_tiles(plan, block, scratch));
  });
  return tiles_;
}

void KeptTiles::keep(const std::vector<Tile>& tiles) {
  Index pages = 0, words = 0;
  for (const Tile& t : tiles) pages += pages_of(t.rows) + pages_of(t.columns), words += words_of(t.mask, t.rows);
  pages_.reserve(static_cast<size_t>(pages)), words_.reserve(static_cast<size_t>(words));  // so that nothing moves
  const auto copy = [](auto& to, const auto*& from, Index count) {
    if (count == 0) return;
    to.insert(to.end(), from, from + count);
    from = to.data() + to.size() - count;
  };
  tiles_ = tiles;
  for (Tile& t : tiles_) {
    copy(words_, t.mask.words, words_of(t.mask, t.rows));
    copy(pages_, t.rows.pages, pages_of(t.rows));
    copy(pages_, t.columns.pages, pages_of(t.columns));
  }
}

}  // namespace heed
