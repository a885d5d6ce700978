#include "heed/exec/attend.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "heed/base/clock.h"
#include "heed/base/threads.h"
#include "heed/exec/emission.h"
#include "heed/exec/gather.h"
#include "heed/exec/rows.h"
#include "heed/exec/traverse.h"
#include "heed/exec/units.h"

namespace heed {
namespace {

// o = acc / l and lse = m + ln l, with the head's sink in the denominator.
void finish(const Plan& plan, const Rows& rows, const PanelLayout& layout, const AttendTarget& target) {
  constexpr double ln2 = 0.6931471805599453;
  const RowBlock& block = rows.block;
  for (Index i = 0; i < rows.count(); ++i) {
    const Index head = rows.head_of(i),
                row = plan.output_by_token ? block.token(rows.row_of(i)) : block.first + rows.row_of(i);
    double m = static_cast<double>(rows.m[i]) * ln2, l = static_cast<double>(rows.l[i]);
    float* o = target.o + block.b * target.stride_b + head * target.stride_h + row * target.stride_row;
    double weight = l > 0 ? 1 / l : 0;
    double lse = l > 0 ? m + std::log(l) : -std::numeric_limits<double>::infinity();
    if (!plan.rule.sinks.empty()) {
      const double sink = static_cast<double>(plan.rule.sinks[static_cast<size_t>(head)]);
      const double most = std::max(lse, sink);
      const double with = most + std::log(std::exp(lse - most) + std::exp(sink - most));
      weight *= l > 0 ? std::exp(lse - with) : 0;
      lse = with;
    }
    const float w = static_cast<float>(weight);
    const float* acc = rows.acc + i * layout.dvp;
    for (Index e = 0; e < layout.dv; ++e) o[e] = acc[e] * w;
    if (target.lse != nullptr)
      target.lse[(block.b * plan.problem.Hq + head) * plan.rows_per_head() + row] = static_cast<float>(lse);
  }
}

// Scores, online softmax, weighted values.
class AttendPanels final : public PanelWork {
 public:
  explicit AttendPanels(const Plan& plan) : plan_(plan) {}
  SourceView take_up(const Rows&, const Tile& tile, const SourceView& view, Index from, Index count,
                     Scratch& scratch) override {
    const PanelLayout& layout = plan_.sources[static_cast<size_t>(tile.source)].layout;
    return gather_columns(layout, view, tile.columns, from, count, scratch);
  }
  void meet(const Rows&, const Tile&, const PanelTask& task, const Place&, Scratch&) override { attend_panels(task); }

 private:
  const Plan& plan_;
};

// One thread's tally, on cache lines of its own.
struct alignas(128) Tally {
  AttendStats stats;
  double emit_s = 0;
};

// Emits the tiles of every unit, calls carry_out(unit, split, block, tiles, stats, scratch) with them, and sums what
// that counted.
template <class CarryOut>
AttendStats run_units(const Plan& plan, const Units& u, CarryOut carry_out) {
  const double start = seconds_now();
  std::vector<Tally> tallies(static_cast<size_t>(threads()));
  std::vector<KeptTiles> kept(static_cast<size_t>(u.splits > 1 ? u.lanes * u.blocks : 0));
  parallel_for(u.count(), [&](Index unit, int thread) {
    // Later blocks see more columns when causal, so they go first. The splits of a block follow each other at a
    // distance, so that they seldom wait for the one that emits.
    const Index lane = unit % u.lanes, split = unit / u.lanes % u.splits,
                cut = u.blocks - 1 - unit / u.lanes / u.splits;
    Tally& tally = tallies[static_cast<size_t>(thread)];
    Scratch& scratch = thread_scratch();
    const Scratch::Mark mark(scratch);
    const RowBlock block = block_of(plan, u, lane, cut);

    const double emit_start = seconds_now();
    const std::vector<Tile>& tiles = u.splits > 1
                                         ? kept[static_cast<size_t>(lane * u.blocks + cut)].emit(plan, block, scratch)
                                         : emit_tiles(plan, block, scratch);
    tally.emit_s += seconds_now() - emit_start;
    if (split == 0) tally.stats.tiles_planned += static_cast<Index>(tiles.size());
    carry_out((lane * u.blocks + cut) * u.splits + split, split, block, tiles, tally.stats, scratch);
  });
  AttendStats stats;
  double emit_s = 0;
  for (const Tally& t : tallies) stats += t.stats, emit_s += t.emit_s;
  const double wall = seconds_now() - start;
  stats.plan_s =
      std::min(wall, emit_s / static_cast<double>(std::max<Index>(1, std::min<Index>(threads(), u.count()))));
  stats.attend_s = wall - stats.plan_s;
  return stats;
}

}  // namespace

AttendStats& AttendStats::operator+=(const AttendStats& o) {
  tiles_planned += o.tiles_planned, tiles_visited += o.tiles_visited, panels_visited += o.panels_visited;
  pairs += o.pairs, pairs_computed += o.pairs_computed;
  bytes_read += o.bytes_read, rows_visited += o.rows_visited, columns_gathered += o.columns_gathered,
      panels_read += o.panels_read;
  scratch_bytes = std::max(scratch_bytes, o.scratch_bytes);
  plan_s += o.plan_s, attend_s += o.attend_s;
  return *this;
}

Index dense_pairs(const Problem& p) {
  if (!p.causal) return p.B * p.Hq * p.N * p.M;
  const Index first = p.M - p.N + 1;  // keys of the first query
  return p.B * p.Hq * (p.N * first + p.N * (p.N - 1) / 2);
}

AttendStats attend(const Plan& plan, const AttendTarget& target) {
  const double start = seconds_now();
  const Units u = units_of(plan);
  const PanelLayout& layout = plan.sources.at(0).layout;

  // Splits leave their state here; the first split's is the row's own.
  struct Part {
    float *m, *l, *acc;
  };
  Scratch& shared = thread_scratch();
  const Scratch::Mark shared_mark(shared);
  const Index widest = plan.rows_per_head() * u.heads;
  const Index partials = u.splits > 1 ? u.count() : 0;
  const auto parts = shared.take<Part>(partials);
  if (u.splits > 1) {
    float* memory = shared.take<float>(u.lanes * u.splits * widest * (layout.dvp + 2)).data();
    for (Index lane = 0; lane < u.lanes; ++lane)
      for (Index split = 0; split < u.splits; ++split)
        for (Index cut = 0; cut < u.blocks; ++cut) {
          const Index rows = (plan.cuts[static_cast<size_t>(cut) + 1] - plan.cuts[static_cast<size_t>(cut)]) * u.heads;
          parts[static_cast<size_t>((lane * u.blocks + cut) * u.splits + split)] = {memory, memory + rows,
                                                                                    memory + 2 * rows};
          memory += rows * (layout.dvp + 2);
        }
  }

  const auto carry_out = [&](Index unit, Index split, const RowBlock& block, const std::vector<Tile>& tiles,
                             AttendStats& counted, Scratch& scratch) {
    const bool met = std::ranges::any_of(tiles, [&](const Tile& t) { return meets(t, split, u.split_chunks); });
    if (!met && split > 0) {  // most splits of a sparse plan: nothing to merge
      std::fill_n(parts[static_cast<size_t>(unit)].m, block.rows * u.heads, -std::numeric_limits<float>::infinity());
      return;
    }
    Rows rows = load_rows(plan, block, u.heads, layout, scratch);
    AttendPanels work(plan);
    if (u.splits > 1) {
      const Part& part = parts[static_cast<size_t>(unit)];
      std::copy_n(rows.m, rows.count(), part.m);
      std::copy_n(rows.l, rows.count(), part.l);
      std::copy_n(rows.acc, rows.count() * layout.dvp, part.acc);
      rows.m = part.m, rows.l = part.l, rows.acc = part.acc;
    }
    Traversal(plan, scratch, &work).run(rows, tiles, split, u.split_chunks, counted);
    if (u.splits == 1) finish(plan, rows, layout, target);
  };
  AttendStats stats = run_units(plan, u, carry_out);

  if (u.splits > 1)
    for (Index unit = 0; unit < u.lanes * u.blocks; ++unit) {
      const Part* part = &parts[static_cast<size_t>(unit * u.splits)];
      Rows rows{.block = block_of(plan, u, unit / u.blocks, unit % u.blocks), .heads = u.heads};
      rows.m = part->m, rows.l = part->l, rows.acc = part->acc;
      for (Index split = 1; split < u.splits; ++split)
        merge_state(rows, part[split].m, part[split].l, part[split].acc, layout.dvp);
      finish(plan, rows, layout, target);
    }

  stats.attend_s = seconds_now() - start - stats.plan_s;
  stats.scratch_bytes = scratch_bytes();
  return stats;
}

AttendStats rehearse(const Plan& plan) {
  const Units u = units_of(plan);
  const auto count = [&](Index, Index split, const RowBlock& block, const std::vector<Tile>& tiles,
                         AttendStats& counted, Scratch& scratch) {
    Rows rows;
    rows.block = block, rows.heads = u.heads;
    Traversal(plan, scratch, nullptr).run(rows, tiles, split, u.split_chunks, counted);
  };
  return run_units(plan, u, count);
}

}  // namespace heed
