// Carries out a plan: tile → column panel → row sub-block, with an online softmax.
#pragma once

#include "heed/plan/plan.h"

namespace heed {

/// What was done, counted where it was done.
struct AttendStats {
  Index tiles_planned = 0;   // tiles that emit gave
  Index tiles_visited = 0;   // of those, tiles in which the kernel met at least one panel
  Index panels_visited = 0;  // (row sub-block × 64-column panel) calls of the kernel
  Index pairs = 0;           // (query row, key) pairs attended, summed over heads
  Index pairs_computed = 0;  // pairs whose product was computed, masked ones included
  Index rows_visited = 0;    // (row, chunk of 256 columns) pairs, each of which takes up a row's query and state
  Index columns_gathered = 0;  // listed columns that were packed first, by every row block that lists them
  Index panels_read = 0;     // panels of keys and values that row blocks fetched; their sub-blocks share them
  Index bytes_read = 0;      // of these panels, as they are stored
  Index scratch_bytes = 0;   // most scratch in use at once, all threads
  double plan_s = 0, attend_s = 0;  // wall seconds: deciding (emit included), and attending

  AttendStats& operator+=(const AttendStats& other);
};

/// (query row, key) pairs of dense attention with the same causality, summed over heads.
Index dense_pairs(const Problem& problem);

/// o [B, Hq, R, Dv] and lse [B, Hq, R], where R = plan.rows_per_head(); rows in the order of tokens, or
/// of the plan's rows when it says so. lse is the natural log of the sum of exp(score), log-weights and sinks included;
/// a row without keys gives zeros and -inf. o may have any strides with unit last stride; lse may be null. The same
/// bits for any number of threads. Does not allocate inside the loop.
struct AttendTarget {
  float* o = nullptr;
  Index stride_b = 0, stride_h = 0, stride_row = 0;  // elements
  float* lse = nullptr;  // [B, Hq, R] contiguous
};
AttendStats attend(const Plan& plan, const AttendTarget& target);

/// What attend would count, without arithmetic on scores: every row block emits its tiles, and the traversal goes
/// through them as if. The seconds are the rehearsal's own.
AttendStats rehearse(const Plan& plan);

/// The plan walked without arithmetic: visits every tile of every row block, in order, from one
/// thread. `heads` of a block that share its tiles are visited once.
using TileVisitor = std::function<void(const RowBlock&, const std::vector<Tile>&)>;
void walk(const Plan& plan, const TileVisitor& visit);
/// The same for one query head; where heads share tiles, for the heads it shares them with.
void walk_head(const Plan& plan, Index b, Index head, const TileVisitor& visit);

/// True when row `rank` of the block sees column `rank_c` of the tile (mask, visible interval and
/// the source's own bits together). For pictures and probes; the executor works on intervals.
bool sees(const Plan& plan, const RowBlock& rows, const Tile& tile, Index row_rank, Index column_rank);

}  // namespace heed
