#include "heed/plan/block_runs.h"

namespace heed {
namespace {

// What a line sees of [begin, end): its runs that are not yet done, cut to it.
bool sees_alike(const RowRuns& a, const RowRuns& b, Index begin, Index end) {
  const auto cut = [&](Index column) { return std::clamp(column, begin, end); };
  for (size_t i = 0;; ++i) {
    const bool more_a = i < a.runs.size() && a.runs[i].begin < end, more_b = i < b.runs.size() && b.runs[i].begin < end;
    if (!more_a || !more_b) return more_a == more_b;
    if (cut(a.runs[i].begin) != cut(b.runs[i].begin) || cut(a.runs[i].end) != cut(b.runs[i].end)) return false;
  }
}

}  // namespace

void add_shared_runs(const RowBlock& rows, std::span<RowRuns> lines, Tiles& tiles) {
  constexpr Index none = Mask::unbounded;
  // The tile at hand, which grows while the same rows see the columns that follow.
  Set shared, columns;
  const auto flush = [&] {
    if (shared.count == 0) return;
    const bool past = columns.first + columns.count <= rows.position(shared.first) + 1;
    tiles.add(shared, columns, past ? Mask::full() : Mask::causal());
  };
  for (Index from = 0;;) {
    Index next = none;
    for (const RowRuns& line : lines)
      if (!line.runs.empty()) next = std::min(next, line.runs.front().begin);
    if (next == none) return flush();
    const Index begin = std::max(from, next / chunk_columns * chunk_columns);
    // Chunks of which every line sees all or nothing are taken together, any other by itself.
    Index end = none;
    for (const RowRuns& line : lines) {
      if (line.runs.empty()) continue;
      const auto [first, last] = line.runs.front();
      const Index constant = first <= begin ? last : first;  // up to here the line sees all, or nothing
      end = std::min(end, std::max(constant / chunk_columns * chunk_columns, begin + chunk_columns));
    }
    for (size_t i = 0, j; i < lines.size(); i = j) {
      for (j = i + 1; j < lines.size() && sees_alike(lines[i], lines[j], begin, end);) ++j;
      const Index first = lines[i].begin, count = lines[j - 1].end - first;
      for (const BlockRun& run : lines[i].runs) {
        if (run.begin >= end) break;
        const BlockRun piece{std::max(run.begin, begin), std::min(run.end, end)};
        if (shared.first != first || shared.count != count || columns.first + columns.count != piece.begin) {
          flush();
          shared = {first, count}, columns = {piece.begin, 0};
        }
        columns.count = piece.end - columns.first;
      }
    }
    for (RowRuns& line : lines)
      while (!line.runs.empty() && line.runs.front().end <= end) line.runs = line.runs.subspan(1);
    from = end;
  }
}

}  // namespace heed
