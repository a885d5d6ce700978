// The kernels: one table of functions per instruction set, chosen once at start-up.
#pragma once

#include <string>
#include <vector>

#include "heed/base/types.h"
#include "heed/kernel/panels.h"
#include "heed/kernel/quant.h"

namespace heed {

/// Some rows of a block meet a run of packed columns: scores, online softmax, weighted values.
struct PanelTask {
  // Rows: ranks in the block; `row_list` or, when null, first_row … first_row + rows - 1.
  const std::int32_t* row_list = nullptr;
  Index first_row = 0, rows = 0;
  // The block's queries [·, dp] in the layout's product type, and its softmax state: per row the
  // reference maximum m (base 2, -inf = nothing seen), the sum l, and acc [·, dvp] = Σ p·v.
  const void* q = nullptr;
  float *m = nullptr, *l = nullptr, *acc = nullptr;
  // Columns: `panels` (1 … 4) consecutive panels of one source.
  PanelLayout layout;
  const void *k = nullptr, *v = nullptr;
  const float *key_scale = nullptr, *value_scale = nullptr;  // [panels·64], or null = 1
  Index panels = 0;
  // Visibility: null = everything, else bit c of words[r·word_stride + p] says that row r (rank in this
  // task) sees column c of panel p. word_stride = 0: all rows see the same.
  const std::uint64_t* words = nullptr;
  Index word_stride = chunk_columns / panel_columns;
  // The rule: score = softcap(scale · q·k) + add, natural units. softcap = 0: none. add is null or
  // [rows or 1][panels·64] with row stride add_stride (0: one row for all), -inf allowed.
  float scale = 1, softcap = 0;
  const float* add = nullptr;
  Index add_stride = 0;
  // gates: null, or bit c of gates[p] says that column c of panel p is a gate, which closes the group of
  // columns since the gate before it, or since column gates_begin. A gate's score is added to those
  // of its group's visible columns after their log-sum-exp was taken away; the gate itself is not
  // attended, nor is a group whose gate is hidden, nor a column that no group holds.
  const std::uint64_t* gates = nullptr;
  Index gates_begin = 0;
};

/// The backward pass over the rows and columns of a PanelTask in f32. A row's weights p come again from its
/// log-sum-exp; then ds = p∘(do·v^T - delta), dv += p^T·do, dq += ds·k and dk += ds^T·q, where ds has the soft-cap's
/// derivative but not the scale, which is left to whoever reads dq and dk.
struct BackwardTask {
  // Rows, k, words, gates and the rule, as forward; not q, v, m, l and acc. layout: f32.
  PanelTask scores;
  Index qp = 0, dvp = 0;  // widths of padded rows of D and of Dv numbers, multiples of 16
  // Of the task's rows, one after the other: q [rows, qp], dout [rows, dvp], natural lse (finite) and delta = Σ do·o.
  const float *q = nullptr, *dout = nullptr, *lse = nullptr, *delta = nullptr;
  // The task's columns once more: values as panels of Dv features, keys as rows [panels·64, qp].
  const float *values = nullptr, *keys = nullptr;
  // Sums: of all rows, reached by rank [·, qp]; of the task's columns [panels·64, qp], [panels·64, dvp].
  float *dq = nullptr, *dk = nullptr, *dv = nullptr;
  float* dcolumn = nullptr;  // [panels·64] += Σ over rows of the scores' gradients, or null
  // Room for [rows][stride] weights and as many ds; the scores' gradients, ds before the soft-cap, go to dscore
  // unless it is null, 0 where a row sees nothing.
  float *p = nullptr, *ds = nullptr, *dscore = nullptr;
  static constexpr Index stride = chunk_columns + 16;  // lines of successive rows meet in different cache sets
};

/// A row of activations for row_product: as they are, and rounded by round_row.
struct RowInput {
  const float* values = nullptr;  // [n]
  const std::int16_t* x = nullptr;  // [n]
  const float* scale = nullptr;  // [n/32, 2]
};

struct Kernels {
  const char* name;
  bool bf16_dot;  // bf16 panels are multiplied as such; else bf16 means rounded f32
  Index key_step;  // bf16: dp is a multiple of this
  Index row_step;  // rows that one pass over a panel serves
  Index task_rows;  // rows that share one look at a chunk: enough to amortise a call, few enough for a tight diagonal

  void (*attend_f32)(const PanelTask&);
  void (*attend_bf16)(const PanelTask&);
  // f32 queries meet panels stored as bf16 (null where bf16_dot) or i8, which are widened on their way to registers.
  // Panels of bf16 give the bits that their numbers would give as f32.
  void (*attend_wide_bf16)(const PanelTask&);
  void (*attend_wide_i8)(const PanelTask&);

  void (*attend_backward)(const BackwardTask&);

  // C[m×n] = A[m×k]·B, or C += when accumulate. A: row-major, lda elements. B: panels of 64
  // columns packed like keys (B[k×n] has n/64 panels, n rounded up). C: row-major, ldc elements,
  // its rows must hold n rounded up to 16 columns.
  void (*gemm_f32)(Index m, Index n, Index k, const float* a, Index lda, const float* b, float* c, Index ldc,
                   bool accumulate);
  void (*gemm_bf16)(Index m, Index n, Index k, const bf16* a, Index lda, const bf16* b, float* c, Index ldc,
                    bool accumulate);
  // The same for f32 rows and panels stored as bf16 (null where bf16_dot) or i8, scales left out.
  void (*gemm_wide_bf16)(Index m, Index n, Index k, const float* a, Index lda, const bf16* b, float* c, Index ldc,
                         bool accumulate);
  void (*gemm_wide_i8)(Index m, Index n, Index k, const float* a, Index lda, const std::int8_t* b, float* c, Index ldc,
                       bool accumulate);

  // Packs `columns` (1 … 64) rows of x [columns, d] (f32, stride ldx) as one key panel; columns
  // and features beyond are zero. d_padded: the layout's dp.
  void (*pack_keys_f32)(const float* x, Index ldx, Index columns, Index d, Index d_padded, float* panel);
  void (*pack_keys_bf16)(const float* x, Index ldx, Index columns, Index d, Index d_padded, bf16* panel);

  // Folds one row's scores of columns first … first + n - 1 into their blocks of `block` columns: per block b (of
  // all columns) the running maximum[b] of factor·score (base 2, -inf = nothing seen) and sum[b] of
  // 2^(factor·score - maximum[b]). Blocks of one column have no sum (null) and are written, not folded. scores
  // must be readable up to n + 15.
  void (*fold_blocks)(const float* scores, Index n, Index first, Index block, float factor, float* maximum, float* sum);
  // A row's blocks 0 … n-1 (n a multiple of 16) at last: with m and l of the whole row, 2^(maximum[b] - m) / l is
  // folded into largest[b] by maximum, sum[b] times that added to mass[b]; either may be null, sum null = ones.
  // Overwrites maximum. A row that saw nothing changes nothing.
  void (*weigh_blocks)(float* maximum, const float* sum, Index n, float* largest, float* mass);

  // Numbers as f32: pairs of bf16 as panels hold them, in [steps][width], to rows [2·steps, width]; or n bytes. width
  // and n are multiples of 16.
  void (*widen_pairs)(const bf16* in, Index steps, Index width, float* out);
  void (*widen_bytes)(const std::int8_t* in, Index n, float* out);

  // Rounds n floats to bf16, nearest even.
  void (*round_bf16)(const float* x, Index n, bf16* out);

  // y[i] = Σ_j w[i][j]·v[j] for `rows` rows of n weights in a file's own format, row_bytes apart, at any address.
  // n: a multiple of the format's block. Formats of blocks read the rounded row, plain floats its values.
  void (*row_product)(WeightFormat format, const void* w, Index row_bytes, Index rows, Index n, const RowInput& v,
                      float* y);
  // Rounds n values, a multiple of 32: of each 32 the largest magnitude becomes 32767, and every value a whole number x
  // times a scale, with an error of at most scale/2. x [n]; scale [n/32, 2]: the scale, and the scale times Σ x.
  void (*round_row)(const float* values, Index n, std::int16_t* x, float* scale);

  // Rows of models; n elements each.
  void (*rms_norm)(const float* x, const float* weight, Index n, float eps, float* out);
  void (*silu_mul)(const float* gate, const float* up, Index n, float* out);  // silu(gate)·up
  void (*gelu_mul)(const float* gate, const float* up, Index n, float* out);  // tanh-gelu(gate)·up
  // Folds n scores into a running (maximum, sum of exp(x - maximum)), natural units.
  void (*log_sum_exp)(const float* x, Index n, float& maximum, float& sum);
  float (*dot)(const float* a, const float* b, Index n);
  // Indices, ascending, of the k (1 … n-1) largest of n scores, none NaN; among those equal to the
  // least of them the lower indices win, or the higher.
  void (*choose_top)(const float* scores, Index n, Index k, bool higher_wins, std::int32_t* chosen);

  // Yardsticks: `steps` rounds of independent multiply-adds, returning the operations done, 0 where there is no such
  // product (bf16: null); and one reading of n floats. int8: bytes, unsigned times signed.
  double (*peak_f32)(Index steps);
  double (*peak_bf16)(Index steps);
  double (*peak_int8)(Index steps);
  float (*read_all)(const float* p, Index n);
};

/// The instruction sets that this build holds and this machine can run, best first by default rule.
std::vector<std::string> available_isas();

/// The table in use. Chosen at first use: HEED_ISA where it is set, else the best that has been
/// proven on such a machine. Throws UsageError for an unknown or absent HEED_ISA, listing those present.
const Kernels& kernels();

/// Switches to another table (tests run every one). Throws UsageError as above.
void select_isa(const std::string& name);

/// The layout of keys and values stored as f32, bf16 or i8 under the current kernels.
PanelLayout panel_layout(DType stored, Index d, Index dv);

/// Widens `panels` panels of bf16 or i8, scales left out, to keys and values of the layout that is returned: f32.
PanelLayout widen_panels(const PanelLayout& layout, const void* keys, const void* values, Index panels,
                         float* wide_keys, float* wide_values);

/// Carries out a task by the kernel that its layout asks for.
void attend_panels(const PanelTask& task);

/// Packed keys of one head.
struct PackedKeys {
  PanelLayout layout;
  const void* panels = nullptr;
  const float* scale = nullptr;  // of each column, where i8 is stored
};

/// products[i·ldc + j] = <q_i, key first + j> for `rows` queries q [rows, dp] in the layout's product type and
/// `columns` keys from `first` on, a multiple of 64. Rows of products must hold `columns` rounded up to 16.
void multiply_keys(const PackedKeys& keys, Index first, Index columns, const void* q, Index rows, float* products,
                   Index ldc);

}  // namespace heed
