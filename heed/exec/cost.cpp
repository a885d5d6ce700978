#include "heed/exec/cost.h"

#include <algorithm>
#include <array>

#include "heed/base/error.h"
#include "heed/kernel/kernels.h"

namespace heed {
namespace {

struct Entry {
  std::string_view isa;
  CostModel f32, bf16;  // by what is multiplied
};

// avx2 and portable are fitted on one core of a Zen 3 (peaks 101 and 38 GF/s), to hand-made plans of 48 … 960 rows,
// heads of 16 … 128 features, tiles of 64 … 256 columns, causal ones, and lists: the least of 15 CPU times, each times
// the peak measured around it. They meet those plans within 7 %, lists of single columns within 12 % from 96 rows on.
//
// Known to be outside: heads of 256 features, whose chunks leave the second-level cache (18 % more than the model
// says); lists of pages, which are packed faster than single columns (85 for single ones, 35 for pairs and 13 for pages
// of 16 stand behind the 50). The plans of real mechanisms at N = 8192 took
// 3 … 20 % more than the model says, scattered blocks at N = 32768 up to 28 %.
//
// An exponential is some 17 vector instructions, each of which keeps a multiply-add of 2 flops a lane from its port:
// hence about 35. avx512 and avx512_bf16 are reckoned from avx2, not measured: exponentials by that rule (11
// instructions, and 10 beside a bf16 product of 4 flops a lane), the rest by the width of the vectors where it waits
// for memory. amx rests on a probe of a Granite Rapids core: 9.5 ns for a listed column and 9 ns for a row of 64
// features, 31 % of the peak in all.
constexpr CostModel portable{.product = 1.3, .exponential = 42, .row = 300, .row_feature = 2, .gather = 20};
constexpr CostModel avx2{.product = 1.09, .exponential = 35, .row = 300, .row_feature = 51, .gather = 50};
constexpr CostModel avx512{.product = 1.09, .exponential = 22, .row = 600, .row_feature = 51, .gather = 100};
constexpr CostModel avx512_bf16{.product = 1.15, .exponential = 40, .row = 1200, .row_feature = 100, .gather = 100};
constexpr CostModel amx{.product = 1.25, .exponential = 500, .row = 0, .row_feature = 460, .gather = 245};

// Where bf16 has no product of its own it is multiplied as f32.
constexpr std::array<Entry, 5> models{{
    {"portable", portable, portable},
    {"avx2", avx2, avx2},
    {"avx512", avx512, avx512},
    {"avx512_bf16", avx512, avx512_bf16},
    {"amx", avx512, amx},
}};

double number(Index n) { return static_cast<double>(n); }

}  // namespace

const CostModel& cost_model(std::string_view isa, DType arithmetic) {
  for (const Entry& e : models)
    if (e.isa == isa) return arithmetic == DType::bf16 ? e.bf16 : e.f32;
  fail("machine: isa = {}, expected portable, avx2, avx512, avx512_bf16 or amx", isa);
}

Cost cost_of(const Plan& plan, const AttendStats& counted, const Machine& machine) {
  if (!(machine.f32_flops > 0)) fail("machine: f32_flops = {}, expected > 0", machine.f32_flops);
  const Problem& p = plan.problem;
  const PanelLayout& layout = plan.sources.at(0).layout;
  const CostModel& m = cost_model(machine.isa.empty() ? kernels().name : machine.isa, layout.product);
  const double peak = layout.product == DType::bf16 && machine.bf16_flops > 0 ? machine.bf16_flops : machine.f32_flops;

  const double pairs = number(counted.pairs_computed), rows = number(counted.rows_visited);
  const double column_bytes = number((layout.dp + layout.dvp) * size_of(layout.dtype));
  const double row_bytes = number(p.D * size_of(plan.queries.view().dtype) + (p.Dv + 1) * size_of(DType::f32));
  Cost cost;
  cost.flops = 2 * pairs * number(layout.d + layout.dv);
  cost.exponentials = pairs;
  // Gathered columns are read where they lie, and again, like others, where they were packed.
  cost.bytes = (number(counted.panels_read * panel_columns) + number(counted.columns_gathered)) * column_bytes +
               number(p.B * p.Hq * plan.rows_per_head()) * row_bytes;
  // What the kernels multiply: padding included.
  const double work = m.product * 2 * pairs * number(layout.dp + layout.dvp) + m.exponential * pairs + m.row * rows +
                      m.row_feature * rows * number(layout.dvp) +
                      m.gather * number(counted.columns_gathered * (layout.dp + layout.dvp));
  cost.seconds = std::max(work / peak, machine.read_bytes > 0 ? cost.bytes / machine.read_bytes : 0);
  return cost;
}

Cost predict(const Plan& plan, const Machine& machine) { return cost_of(plan, rehearse(plan), machine); }

}  // namespace heed
