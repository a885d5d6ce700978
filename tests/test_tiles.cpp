// The AMX kernels with their eight tiles emulated: the loops around the instructions are the ones
// that run on such a machine, so packing, gathering and ragged edges are tested without one.
#include <doctest/doctest.h>

#include <cmath>
#include <vector>

#include "heed/base/random.h"

#define HEED_ISA amx_emulated
#define HEED_TILES
#define HEED_TILES_EMULATED
#include "heed/kernel/isa/table.h"

using namespace heed;

namespace {

const Kernels& table = heed::amx_emulated::table;

std::vector<float> random_rounded(Index n, std::uint64_t seed) {
  Random random(seed);
  std::vector<float> x(static_cast<size_t>(n));
  for (float& e : x) e = round_to_bf16(static_cast<float>(random.normal()));
  return x;
}

std::vector<bf16> padded_rows(const std::vector<float>& x, Index rows, Index d, Index dp) {
  std::vector<bf16> out(static_cast<size_t>(rows * dp));
  for (Index i = 0; i < rows; ++i) table.round_bf16(x.data() + i * d, d, out.data() + i * dp);
  return out;
}

std::vector<bf16> packed_keys(const std::vector<float>& x, Index rows, Index d, Index dp) {
  std::vector<bf16> out(static_cast<size_t>(round_up(rows, panel_columns) * dp));
  for (Index first = 0; first < rows; first += panel_columns)
    table.pack_keys_bf16(x.data() + first * d, d, std::min(panel_columns, rows - first), d, dp,
                         out.data() + first * dp);
  return out;
}

}  // namespace

TEST_CASE("tiled products equal the sum of products") {
  CHECK(std::string(table.name) == "amx_emulated");
  CHECK(table.key_step == 32);
  for (Index m : {1, 6, 31, 32, 33, 70})
    for (Index n : {16, 48, 64, 100})
      for (Index k : {32, 50, 600}) {
        const Index kp = round_up(k, table.key_step), ldc = round_up(n, Index{16});
        const auto a = random_rounded(m * k, 1), b = random_rounded(n * k, 2);
        const auto ap = padded_rows(a, m, k, kp), bp = packed_keys(b, n, k, kp);
        std::vector<float> c(static_cast<size_t>(m * ldc), 0.5f);
        table.gemm_bf16(m, n, kp, ap.data(), kp, bp.data(), c.data(), ldc, true);
        double worst = 0;
        for (Index i = 0; i < m; ++i)
          for (Index j = 0; j < n; ++j) {
            double want = 0.5;
            for (Index f = 0; f < k; ++f) want += double(a[size_t(i * k + f)]) * double(b[size_t(j * k + f)]);
            worst = std::max(worst, std::abs(want - double(c[size_t(i * ldc + j)])));
          }
        CHECK(worst < 1e-3);
      }
}

TEST_CASE("tiled attention equals softmax, rows in order or listed") {
  for (Index rows : {1, 32, 45})
    for (bool listed : {false, true}) {
      const Index d = 40, dv = 24, columns = 200, total = 64;
      PanelTask t;
      t.layout = {DType::bf16, d, dv, round_up(d, table.key_step), round_up(dv, Index{16})};
      const auto q = random_rounded(total * d, 3), k = random_rounded(columns * d, 4),
                 v = random_rounded(columns * dv, 5);
      const auto qp = padded_rows(q, total, d, t.layout.dp), kp = packed_keys(k, columns, d, t.layout.dp);
      std::vector<bf16> vp(size_t(t.layout.value_elements(columns)));
      for (Index j = 0; j < columns; ++j)
        for (Index e = 0; e < dv; ++e) vp[size_t(t.layout.value_offset(j, e))] = to_bf16(v[size_t(j * dv + e)]);
      std::vector<float> m(total, -INFINITY), l(total, 0), acc(size_t(total * t.layout.dvp), 0);
      std::vector<std::int32_t> list;
      for (Index i = 0; i < rows; ++i) list.push_back(std::int32_t(listed ? (i * 7 + 3) % total : i));
      std::vector<std::uint64_t> words(size_t(rows * 4));
      for (Index i = 0; i < rows; ++i)
        for (Index j = 0; j < columns; ++j)
          if ((i + j) % 3 != 0) words[size_t(i * 4 + j / 64)] |= std::uint64_t{1} << (j % 64);
      if (listed) t.row_list = list.data();
      t.rows = rows, t.q = qp.data(), t.m = m.data(), t.l = l.data(), t.acc = acc.data();
      t.k = kp.data(), t.v = vp.data(), t.panels = 4, t.words = words.data(), t.scale = 0.2f;
      table.attend_bf16(t);
      double worst = 0;
      for (Index i = 0; i < rows; ++i) {
        const Index row = list[size_t(i)];
        double sum = 0;
        std::vector<double> o(size_t(dv), 0.0);
        for (Index j = 0; j < columns; ++j) {
          if ((i + j) % 3 == 0) continue;
          double s = 0;
          for (Index f = 0; f < d; ++f) s += double(q[size_t(row * d + f)]) * double(k[size_t(j * d + f)]);
          const double w = std::exp(0.2 * s);
          sum += w;
          for (Index e = 0; e < dv; ++e) o[size_t(e)] += w * double(v[size_t(j * dv + e)]);
        }
        for (Index e = 0; e < dv; ++e)
          worst = std::max(worst,
                           std::abs(o[size_t(e)] / sum - double(acc[size_t(row * t.layout.dvp + e)] / l[size_t(row)])));
      }
      CHECK(worst < 1e-2);
    }
}
