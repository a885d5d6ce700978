#include "heed/exec/influence.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "heed/base/error.h"
#include "heed/base/scratch.h"
#include "heed/base/threads.h"
#include "heed/kernel/kernels.h"

namespace heed {
namespace {

constexpr float epsilon = 1e-6f;

void check(const InfluenceInput& in) {
  if (in.q.rank() != 4 || in.v.rank() != 4)
    fail("q, v: shapes {} and {}, expected four axes", to_string(in.q.shape), to_string(in.v.shape));
  const Index b = in.q.shape[0], heads = in.q.shape[1], n = in.q.shape[2], d = in.q.shape[3], kv_heads = in.v.shape[1],
              dv = in.v.shape[3];
  const auto expect = [](const char* name, const TensorView& x, const Shape& shape) {
    if (x.shape != shape) fail("{}: shape = {}, expected {}", name, to_string(x.shape), to_string(shape));
  };
  if (kv_heads < 1 || heads % kv_heads != 0) fail("v: {} heads, expected a divisor of the {} of q", kv_heads, heads);
  expect("k", in.k, {b, kv_heads, n, d});
  expect("v", in.v, {b, kv_heads, n, dv});
  expect("o", in.o, {b, heads, n, dv});
  expect("dout", in.dout, {b, heads, n, dv});
  expect("lse", in.lse, {b, heads, n});
}

// Rows first … first + count - 1 of one head of x [B, H, N, width], one after the other.
void read_rows(const TensorView& x, Index b, Index head, Index first, Index count, float* out) {
  const Index width = x.shape[3];
  for (Index i = 0; i < count; ++i) read_f32(x.at({b, head, first + i}), x.dtype, x.stride[3], width, out + i * width);
}

// Every head's rows of x as f32 panels of 64 columns: the right factor of products with queries or gradients.
std::vector<std::vector<float>> panels_of(const TensorView& x) {
  const Index heads = x.shape[1], n = x.shape[2], width = x.shape[3];
  std::vector<std::vector<float>> panels(static_cast<size_t>(x.shape[0] * heads));
  parallel_for(static_cast<Index>(panels.size()), [&](Index unit, int) {
    std::vector<float>& own = panels[static_cast<size_t>(unit)];
    own.resize(static_cast<size_t>(round_up(n, panel_columns) * width));
    Scratch& scratch = thread_scratch();
    const Scratch::Mark mark(scratch);
    float* rows = scratch.take<float>(panel_columns * width).data();
    for (Index first = 0; first < n; first += panel_columns) {
      const Index count = std::min(panel_columns, n - first);
      read_rows(x, unit / heads, unit % heads, first, count, rows);
      kernels().pack_keys_f32(rows, width, count, width, width, own.data() + first * width);
    }
  });
  return panels;
}

}  // namespace

Tensor influence_map(const InfluenceInput& in, Index block) {
  check(in);
  if (block < 1) fail("block = {}, expected >= 1", block);
  const Index heads = in.q.shape[1], n = in.q.shape[2], d = in.q.shape[3], dv = in.v.shape[3];
  const Index group = heads / in.v.shape[1], kv_heads = in.v.shape[1], blocks = ceil_div(n, block);
  const auto key_panels = panels_of(in.k), value_panels = panels_of(in.v);
  Tensor map(DType::f32, {in.q.shape[0], heads, blocks, blocks});

  // A unit is a block of rows: the last ones, which see the most, go first.
  const Index lanes = in.q.shape[0] * heads;
  parallel_for(lanes * blocks, [&](Index unit, int) {
    const Index lane = unit % lanes, a = blocks - 1 - unit / lanes, b = lane / heads, head = lane % heads;
    const size_t kv = static_cast<size_t>(b * kv_heads + head / group);
    float* out = map.as<float>() + (lane * blocks + a) * blocks;
    std::vector<double> sums(static_cast<size_t>(a + 1), 0.0);
    Scratch& scratch = thread_scratch();
    const Scratch::Mark mark(scratch);
    const Index most = std::min(block, panel_columns);
    float* q = scratch.take<float>(most * d).data();
    float* dout = scratch.take<float>(most * dv).data();
    float* o = scratch.take<float>(most * dv).data();
    float* scores = scratch.take<float>(most * panel_columns).data();
    float* slopes = scratch.take<float>(most * panel_columns).data();  // G
    float* lse = scratch.take<float>(most).data();
    float* delta = scratch.take<float>(most).data();
    const Index end = std::min(n, (a + 1) * block);
    for (Index first = a * block; first < end; first += most) {
      const Index rows = std::min(most, end - first);
      read_rows(in.q, b, head, first, rows, q);
      read_rows(in.dout, b, head, first, rows, dout);
      read_rows(in.o, b, head, first, rows, o);
      read_f32(in.lse.at({b, head, first}), in.lse.dtype, in.lse.stride[2], rows, lse);
      for (Index i = 0; i < rows; ++i) delta[i] = kernels().dot(dout + i * dv, o + i * dv, dv);
      for (Index column = 0; column < first + rows; column += panel_columns) {
        const float *k = key_panels[kv].data() + column * d, *v = value_panels[kv].data() + column * dv;
        kernels().gemm_f32(rows, panel_columns, d, q, d, k, scores, panel_columns, false);
        kernels().gemm_f32(rows, panel_columns, dv, dout, dv, v, slopes, panel_columns, false);
        for (Index i = 0; i < rows; ++i) {
          const Index seen = std::min(panel_columns, first + i + 1 - column);
          for (Index c = 0; c < seen; ++c) {
            const float weight = std::exp(in.scale * scores[i * panel_columns + c] - lse[i]);
            const float slope = slopes[i * panel_columns + c];
            // Weights are rounded: one may come out a little above 1.
            const float hidden =
                first + i == 0 ? -slope * weight : weight / (std::max(0.0f, 1 - weight) + epsilon) * (delta[i] - slope);
            sums[static_cast<size_t>((column + c) / block)] += static_cast<double>(std::abs(hidden));
          }
        }
      }
    }
    for (Index v = 0; v <= a; ++v) out[v] = static_cast<float>(sums[static_cast<size_t>(v)]);
  });
  return map;
}

}  // namespace heed
