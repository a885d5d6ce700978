#include "heed/model/linear.h"

#include <algorithm>

#include "heed/base/error.h"
#include "heed/base/scratch.h"
#include "heed/base/threads.h"

namespace heed::model {
namespace {

bool multiplies_bf16(DType arithmetic) { return arithmetic == DType::bf16 && kernels().bf16_dot; }

Index depth_of(Index inputs, DType arithmetic) {
  return multiplies_bf16(arithmetic) ? round_up(inputs, kernels().key_step) : inputs;
}

// Rows that one unit of work takes: with their inputs they stay in the second-level cache while
// panels pass by, and they fill whole passes of the kernel.
Index rows_a_unit(Index rows) {
  constexpr Index wanted = 128;
  const Index step = std::max<Index>(1, kernels().row_step);
  return std::min(rows, std::max(step, wanted / step * step));
}

// A row and its values rounded to 16 bits, in the thread's scratch.
RowInput rounded_row(const float* values, Index n) {
  const auto x = thread_scratch().take<std::int16_t>(n);
  const auto scale = thread_scratch().take<float>(n / 32 * 2);
  kernels().round_row(values, n, x.data(), scale.data());
  return {values, x.data(), scale.data()};
}

}  // namespace

void Activations::reach(Index rows, Index columns, DType arithmetic) {
  rows_ = rows, columns_ = columns, stride_ = depth_of(columns, arithmetic);
  f32_ = nullptr;
  if (multiplies_bf16(arithmetic)) {
    rounded_.reach(rows * stride_);
  } else {
    own_.reach(rows * stride_);
    f32_ = own_.data();
  }
}

void Activations::make(Index rows, Index columns, DType arithmetic, const std::function<void(Index, float*)>& row) {
  reach(rows, columns, arithmetic);
  const bool pairs = multiplies_bf16(arithmetic);
  constexpr Index step = 16;
  parallel_for(ceil_div(rows, step), [&](Index unit, int) {
    const Scratch::Mark mark(thread_scratch());
    float* made = pairs ? thread_scratch().take<float>(columns).data() : nullptr;
    for (Index r = unit * step; r < std::min(rows, (unit + 1) * step); ++r) {
      if (pairs) {
        row(r, made);
        bf16* to = rounded_.data() + r * stride_;
        kernels().round_bf16(made, columns, to);
        std::fill(to + columns, to + stride_, bf16{});
      } else {
        float* to = own_.data() + r * stride_;
        row(r, to);
        if (arithmetic == DType::bf16)
          for (Index i = 0; i < columns; ++i) to[i] = round_to_bf16(to[i]);
      }
    }
  });
}

void Activations::assign(const float* x, Index rows, Index columns, DType arithmetic, Index ldx) {
  if (ldx == 0) ldx = columns;
  if (arithmetic == DType::bf16) {
    make(rows, columns, arithmetic, [&](Index r, float* out) { std::copy_n(x + r * ldx, columns, out); });
    return;
  }
  rows_ = rows, columns_ = columns, stride_ = ldx;
  f32_ = x;
}

Linear::Linear(const GgufTensor& w, DType arithmetic, bool keep_file)
    : file_(keep_file ? w : GgufTensor{}), inputs_(w.columns()), outputs_(w.rows()),
      depth_(depth_of(inputs_, arithmetic)), arithmetic_(arithmetic), bf16_(multiplies_bf16(arithmetic)) {
  const Index panel = depth_ * panel_columns;
  if (bf16_) bf16_panels_.reach(panels() * panel);
  else f32_panels_.reach(panels() * panel);
  parallel_for(panels(), [&](Index p, int) {
    const Scratch::Mark mark(thread_scratch());
    const Index first = p * panel_columns, columns = std::min(panel_columns, outputs_ - first);
    float* rows = thread_scratch().take<float>(columns * inputs_).data();
    for (Index r = 0; r < columns; ++r) w.read_row(first + r, rows + r * inputs_);
    if (bf16_) {
      kernels().pack_keys_bf16(rows, inputs_, columns, inputs_, depth_, bf16_panels_.data() + p * panel);
      return;
    }
    if (arithmetic == DType::bf16)
      for (Index i = 0; i < columns * inputs_; ++i) rows[i] = round_to_bf16(rows[i]);
    kernels().pack_keys_f32(rows, inputs_, columns, inputs_, depth_, f32_panels_.data() + p * panel);
  });
}

Index Linear::packed_bytes(Index outputs, Index inputs, DType arithmetic) {
  return round_up(outputs, panel_columns) * depth_of(inputs, arithmetic) * (multiplies_bf16(arithmetic) ? 2 : 4);
}

void Linear::apply_panels(const Activations& x, Index row, Index rows, Index first_panel, Index panels, float* y,
                          Index ldy) const {
  const Index columns = std::min(panels * panel_columns, outputs_ - first_panel * panel_columns);
  const Index panel = depth_ * panel_columns;
  if (bf16_)
    kernels().gemm_bf16(rows, columns, depth_, x.rounded() + row * x.stride(), x.stride(),
                        bf16_panels_.data() + first_panel * panel, y, ldy, false);
  else
    kernels().gemm_f32(rows, columns, depth_, x.f32() + row * x.stride(), x.stride(),
                       f32_panels_.data() + first_panel * panel, y, ldy, false);
}

void Linear::apply(const Activations& x, float* y, Index ldy) const {
  const Job job{this, y, ldy};
  apply_all(x, {&job, 1});
}

void Linear::apply_all(const Activations& x, std::span<const Job> jobs) {
  Index all_panels = 0;
  for (const Job& job : jobs) {
    if (job.linear->inputs_ != x.columns())
      fail("activations: columns = {}, expected the layer's {} inputs", x.columns(), job.linear->inputs_);
    all_panels += job.linear->panels();
  }
  // Small units balance the threads, large ones read x less often.
  const Index rows = rows_a_unit(x.rows()), blocks = ceil_div(x.rows(), std::max<Index>(rows, 1));
  const Index step = std::clamp<Index>(all_panels * blocks / (8 * threads()), 1, 8);
  Index units = 0;
  for (const Job& job : jobs) units += ceil_div(job.linear->panels(), step) * blocks;
  // Row blocks run fastest: neighbours in time share panels.
  parallel_for(units, [&](Index unit, int) {
    for (const Job& job : jobs) {
      const Index here = ceil_div(job.linear->panels(), step) * blocks;
      if (unit >= here) {
        unit -= here;
        continue;
      }
      const Index first = unit / blocks * step, row = unit % blocks * rows;
      job.linear->apply_panels(x, row, std::min(rows, x.rows() - row), first,
                               std::min(step, job.linear->panels() - first),
                               job.y + row * job.ldy + first * panel_columns, job.ldy);
      return;
    }
  });
}

void Linear::apply_row(const float* x, std::span<const Job> jobs) {
  constexpr Index group = 32;
  const Index inputs = jobs.empty() ? 0 : jobs.front().linear->inputs_;
  Index outputs = 0, units = 0;
  for (const Job& job : jobs) outputs += job.linear->outputs_;
  // Long runs of memory: what fetches ahead must find its stream anew in each unit.
  const Index rows_a_unit = std::max<Index>(8, ceil_div(outputs, 4 * threads()));
  for (const Job& job : jobs) {
    if (!job.linear->has_file()) fail("linear: no file to read its rows from, expected a layer that kept it");
    if (job.linear->inputs_ != inputs)
      fail("linear: {} inputs, expected {} as its neighbours", job.linear->inputs_, inputs);
    units += ceil_div(job.linear->outputs_, rows_a_unit);
  }
  const Scratch::Mark mark(thread_scratch());
  RowInput in{.values = x}, remainder;
  if (inputs % group == 0) {  // else no layer is in a format of blocks
    in = rounded_row(x, inputs);
    if (!jobs.empty() && jobs.front().linear->arithmetic_ == DType::f32) {
      // What rounding to 16 bits leaves is rounded and multiplied in its turn; of it 2^-16 is lost.
      float* left = thread_scratch().take<float>(inputs).data();
      for (Index i = 0; i < inputs; ++i) left[i] = x[i] - in.scale[i / group * 2] * static_cast<float>(in.x[i]);
      remainder = rounded_row(left, inputs);
    }
  }
  parallel_for(units, [&](Index unit, int) {
    for (const Job& job : jobs) {
      const Linear& layer = *job.linear;
      const Index here = ceil_div(layer.outputs_, rows_a_unit);
      if (unit >= here) {
        unit -= here;
        continue;
      }
      const Index first = unit * rows_a_unit, rows = std::min(rows_a_unit, layer.outputs_ - first);
      const WeightFormat format = layer.file_.format;
      const auto multiply = [&](const RowInput& row, float* y) {
        kernels().row_product(format, layer.file_.bytes.data() + first * layer.file_.row_bytes(),
                              layer.file_.row_bytes(), rows, inputs, row, y);
      };
      multiply(in, job.y + first);
      if (remainder.x == nullptr || block_layout(format).elements == 1) return;
      const Scratch::Mark unit_mark(thread_scratch());
      float* more = thread_scratch().take<float>(rows).data();
      multiply(remainder, more);
      for (Index i = 0; i < rows; ++i) job.y[first + i] += more[i];
      return;
    }
  });
}

}  // namespace heed::model
