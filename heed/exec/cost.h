// What carrying out a plan costs: counted before anything is computed, and turned into time by a linear model.
#pragma once

#include <string>
#include <string_view>

#include "heed/exec/attend.h"

namespace heed {

/// What a machine can do at most, all threads in use together, as `heed bench peak` measures it.
struct Machine {
  std::string isa;        // whose coefficients: a name of available_isas(); empty: the one in use
  double f32_flops = 0;   // a second
  double bf16_flops = 0;  // a second; 0: bf16 is multiplied as f32
  double read_bytes = 0;  // a second, from memory; 0: not known, memory is taken to keep up
};

/// Attending alone: packing the input and selecting are not in it.
struct Cost {
  double flops = 0;         // of both products, 2 · (D + Dv) for each pair computed, masked ones included
  double exponentials = 0;  // one for each pair computed
  double bytes = 0;         // keys and values, once for each row block that meets them; queries, outputs and lse
  double seconds = 0;
};

/// What small work costs beside the products, in the time of so many flops at the machine's peak. Sums of these make
/// the model: seconds = (product · flops + exponential · pairs + row · rows + row_feature · rows · Dv
/// + gather · columns · (D + Dv)) / peak, or bytes / read_bytes where memory is slower.
struct CostModel {
  double product = 1;      // a flop of a product: peak / what the microkernel reaches
  double exponential = 0;  // a pair: its scale, maximum, exponential and sum
  double row = 0;          // a row taken up for a chunk of up to 256 columns
  double row_feature = 0;  // the same for each feature of its weighted sum
  double gather = 0;       // a feature of a listed column's key or value
};

/// The coefficients of an instruction set; where they come from stands in cost.cpp. Throws Error for an unknown one.
const CostModel& cost_model(std::string_view isa, DType arithmetic);

/// The cost of work that was counted, by attend or by rehearse. Throws Error for a machine without flops.
Cost cost_of(const Plan& plan, const AttendStats& counted, const Machine& machine);

/// The cost of a plan, rehearsed: flops and exponentials are exactly those that attend will count. Neither
/// allocates nor reads anything that grows with N·M; emits every tile once.
Cost predict(const Plan& plan, const Machine& machine);

}  // namespace heed
