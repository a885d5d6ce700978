// Sparsifiner: a small low-rank predictor guesses which keys matter to each token; full attention is
// computed on those alone.
// "Sparsifiner: Learning Sparse Instance-Dependent Attention for Efficient Vision Transformers", arXiv:2303.13755.

#include <cmath>
#include <memory>

#include "heed/base/threads.h"
#include "heed/kernel/kernels.h"
#include "heed/mechanism/extra.h"
#include "heed/mechanism/registry.h"
#include "heed/plan/select.h"

namespace heed::mechanism {
namespace {

// The predictor of one call: its logits are linear in a query, so both projections and the keys of a
// head fold into one matrix.
struct Predictor {
  Index rank = 0, columns = 0;               // r, and r rounded up to whole panels
  std::vector<std::vector<float>> panels;    // per KV head: [D, r] as panels
  std::vector<std::vector<float>> offset;    // per KV head: [columns]
  std::vector<float> basis;                  // U [r, N]
};

struct Shape2 {
  Index c, r;
};

Shape2 check_weights(const Params& p, const Inputs& in) {
  const Index c = in.find("p_q")->shape[0], r = in.find("w_dn")->shape[1];
  const auto expect = [&](const char* name, size_t axis, Index extent, const char* like) {
    const Shape& shape = in.find(name)->shape;
    if (shape[axis] != extent)
      fail("{}: shape = {}, expected {} on axis {} as {} has", name, to_string(shape), extent, axis, like);
  };
  if (c < 1) fail("p_q: shape = {}, expected at least one row", to_string(in.find("p_q")->shape));
  if (r < 1) fail("w_dn: shape = {}, expected at least one column", to_string(in.find("w_dn")->shape));
  expect("p_q_b", 0, c, "p_q"), expect("p_k", 0, c, "p_q"), expect("p_k_b", 0, c, "p_q"), expect("w_up", 1, r, "w_dn");
  if (p.integer("coef_top_k") > r)
    fail_usage("sparsifiner: coef_top_k = {}, expected at most {}, the columns of w_dn", p.integer("coef_top_k"), r);
  return {c, r};
}

Predictor make_predictor(const Params& p, const Inputs& in) {
  const auto [c, r] = check_weights(p, in);
  const Problem& problem = in.problem;
  const Index n = problem.N, d = problem.D, heads = problem.B * problem.Hk;
  const std::vector<float> p_q = values_of(*in.find("p_q")), p_q_b = values_of(*in.find("p_q_b"));
  const std::vector<float> p_k = values_of(*in.find("p_k")), p_k_b = values_of(*in.find("p_k_b"));
  const std::vector<float> w_dn = values_of(*in.find("w_dn")), w_up = values_of(*in.find("w_up"));
  const double scale = p.given("pred_scale") ? p.number("pred_scale") : 1 / std::sqrt(static_cast<double>(c));

  Predictor result{.rank = r, .columns = round_up(r, panel_columns), .panels = {}, .offset = {}, .basis = {}};
  result.panels.resize(static_cast<size_t>(heads)), result.offset.resize(static_cast<size_t>(heads));
  parallel_for(heads, [&](Index head, int) {
    // Steps 1 and 2: k'' = (P_k k)^T w_dn [c, r].
    std::vector<double> reduced(static_cast<size_t>(c * r), 0.0);
    std::vector<float> key(static_cast<size_t>(d));
    for (Index j = 0; j < n; ++j) {
      in.kv->read_key(head, j, key.data());
      for (Index i = 0; i < c; ++i) {
        double x = p_k_b[static_cast<size_t>(i)];
        for (Index f = 0; f < d; ++f)
          x += static_cast<double>(p_k[static_cast<size_t>(i * d + f)]) *
               static_cast<double>(key[static_cast<size_t>(f)]);
        for (Index m = 0; m < r; ++m)
          reduced[static_cast<size_t>(i * r + m)] += x * static_cast<double>(w_dn[static_cast<size_t>(j * r + m)]);
      }
    }
    // Step 3: Z = scale·(P_q q + b)·k'' = q·(P_q^T k'')·scale + b·k''·scale.
    std::vector<float>& offset = result.offset[static_cast<size_t>(head)];
    std::vector<float>& panels = result.panels[static_cast<size_t>(head)];
    std::vector<float> folded(static_cast<size_t>(r * d));  // [r, D]
    offset.assign(static_cast<size_t>(result.columns), 0.0f), panels.resize(static_cast<size_t>(result.columns * d));
    for (Index m = 0; m < r; ++m) {
      double constant = 0;
      std::vector<double> row(static_cast<size_t>(d), 0.0);
      for (Index i = 0; i < c; ++i) {
        const double x = scale * reduced[static_cast<size_t>(i * r + m)];
        constant += x * static_cast<double>(p_q_b[static_cast<size_t>(i)]);
        for (Index f = 0; f < d; ++f)
          row[static_cast<size_t>(f)] += x * static_cast<double>(p_q[static_cast<size_t>(i * d + f)]);
      }
      offset[static_cast<size_t>(m)] = static_cast<float>(constant);
      for (Index f = 0; f < d; ++f)
        folded[static_cast<size_t>(m * d + f)] = static_cast<float>(row[static_cast<size_t>(f)]);
    }
    for (Index m = 0; m < r; m += panel_columns)
      kernels().pack_keys_f32(folded.data() + m * d, d, std::min(panel_columns, r - m), d, d, panels.data() + m * d);
  });

  // Step 5: what every query may combine, faint entries dropped.
  const double threshold = p.number("basis_threshold");
  result.basis.resize(static_cast<size_t>(r * n));
  for (Index j = 0; j < n; ++j)
    for (Index m = 0; m < r; ++m) {
      const float x = std::fabs(w_up[static_cast<size_t>(j * r + m)]);
      result.basis[static_cast<size_t>(m * n + j)] = static_cast<double>(x) <= threshold ? 0.0f : x;
    }
  return result;
}

// Per row and head N·coef_top_k multiply-adds and one selection; rows share a tile whose bits say who sees whom.
Plan plan_sparsifiner(const Params& p, const Inputs& in) {
  const Problem problem = in.problem;
  const Queries queries = in.q;
  const Index n = problem.N, d = problem.D, coefficients = p.integer("coef_top_k"), words = ceil_div(n, 64);
  const Index keep = static_cast<Index>(std::ceil(p.number("keep") * static_cast<double>(n) - 1e-9));
  const bool drop_zero = p.boolean("drop_zero");
  const auto predictor = std::make_shared<Predictor>(make_predictor(p, in));
  Plan plan = make_plan(problem, in.q, *in.kv, in.rule, Lanes::per_query_head);
  plan.keep = {predictor};

  plan.emit = [=, predictor = predictor.get()](const RowBlock& rows, Tiles& tiles) {
    const Index r = predictor->rank, stride = predictor->columns, head = rows.b * problem.Hk + rows.kv_head;
    const auto bits = tiles.take<std::uint64_t>(rows.rows * words);
    std::fill(bits.begin(), bits.end(), 0);
    const Scratch::Mark mark(tiles.scratch());
    float* q = tiles.take<float>(rows.rows * d).data();
    float* logits = tiles.take<float>(rows.rows * stride).data();
    float* connectivity = tiles.take<float>(n).data();
    const auto picked = tiles.take<std::int32_t>(coefficients), chosen = tiles.take<std::int32_t>(keep);
    for (Index i = 0; i < rows.rows; ++i) queries.read(rows.b, rows.head, rows.token(i), q + i * d);
    kernels().gemm_f32(rows.rows, r, d, q, d, predictor->panels[static_cast<size_t>(head)].data(), logits, stride,
                       false);
    const float* offset = predictor->offset[static_cast<size_t>(head)].data();

    for (Index i = 0; i < rows.rows; ++i) {
      std::uint64_t* row = bits.data() + i * words;
      const auto see = [row](Index j) { row[j / 64] |= std::uint64_t{1} << (j % 64); };
      if (rows.token(i) == 0) {  // CLS sees everything
        for (Index j = 0; j < n; ++j) see(j);
        continue;
      }
      // Steps 4 and 6. The softmax's denominator scales a whole row and cannot change its ranking.
      float* z = logits + i * stride;
      for (Index m = 0; m < r; ++m) z[m] += offset[m];
      choose_top(z, r, coefficients, Ties::lower, picked.data());
      const float most = *std::max_element(z, z + r);
      std::fill_n(connectivity, n, 0.0f);
      for (const std::int32_t m : picked) {
        const float weight = std::exp(z[m] - most);
        const float* basis = predictor->basis.data() + m * n;
        for (Index j = 0; j < n; ++j) connectivity[j] += weight * basis[j];
      }
      // Step 7.
      choose_top(connectivity, n, keep, Ties::lower, chosen.data());
      for (const std::int32_t j : chosen)
        if (!drop_zero || connectivity[j] > 0) see(j);
    }
    tiles.add(Set::range(0, rows.rows), Set::range(0, n), Mask::bits(bits.data(), words));
  };
  return plan;
}

}  // namespace

const Mechanism& sparsifiner() {
  static const std::vector<DType> real{DType::f32, DType::f16, DType::bf16};
  static const Mechanism m{
      .name = "sparsifiner",
      .title = "Sparsifiner: learned, instance-dependent sparse attention",
      .paper = "arXiv:2303.13755",
      .year = 2023,
      .stage = "summarize, select, attend",
      .training = Training::required,
      .idea =
          "For vision transformers. A predictor with few channels and few learned token patterns guesses each token's\n"
          "connections; the best share of the keys, anywhere in the image, is attended with full precision. The "
          "pattern is\n"
          "unstructured, so a CPU still computes every score and masks: it saves sums, not products.",
      .equations =
          "D = softmax over r of pred_scale·(P_q q + b_q)·((P_k K + b_k)^T w_dn), its coef_top_k largest kept\n"
          "A = D·U, U = |w_up|^T with entries <= basis_threshold dropped;  row i keeps the ceil(keep·N) largest A_ij\n"
          "o_i = softmax over kept j of scale·<q_i, k_j>, times v_j;  token 0 (CLS) sees all",
      .cost = "N·r·D + N·coef_top_k·N multiply-adds to predict, N·N·(D + Dv) to attend (keep·N² pairs count)",
      .causality = Causality::refused,
      .square = true,
      .params = {share("keep", 0.25, "share of the keys that a query keeps"),
                 integer("coef_top_k", 8, 1, "patterns that a query combines; at most the columns of w_dn"),
                 number("basis_threshold", 0.02, 0, 1e300, "smaller entries of |w_up| count as zero"),
                 boolean("drop_zero", false, "keep only keys with a positive guess"),
                 number("pred_scale", 0, -1e300, 1e300, "factor of the predictor's logits; when not given, c^-1/2")},
      .extras = {{"p_q", real, {"*", "D"}, true, "[c, D], the predictor's query projection"},
                 {"p_q_b", real, {"*"}, true, "[c], its bias"},
                 {"p_k", real, {"*", "D"}, true, "[c, D], the predictor's key projection"},
                 {"p_k_b", real, {"*"}, true, "[c], its bias"},
                 {"w_dn", real, {"N", "*"}, true, "[N, r], token patterns of the keys"},
                 {"w_up", real, {"N", "*"}, true, "[N, r], token patterns of the connections"}},
      .not_on_models = "it is made for images: its predictor mixes all tokens, later ones included",
      .plan = plan_sparsifiner,
      // The pattern is a constant: a task's loss gives the predictor no gradient. It is trained before, on the
      // attention of a dense model.
  };
  return m;
}

}  // namespace heed::mechanism
