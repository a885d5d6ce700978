// FlexAttention: the caller's own mask, said block by block: nothing, everything, or one of a list of cells.
// "Flex Attention: A Programming Model for Generating Optimized Attention Kernels", arXiv:2412.05496.

#include <memory>

#include "heed/mechanism/registry.h"

namespace heed::mechanism {
namespace {

constexpr std::int32_t nothing = 0, everything = 1, first_cell = 2;

/// `blocks` read once: what query block i of a head sees of key block j, at states[((b·heads + h)·rows + i)·columns +
/// j], and the cells as bits.
struct BlockMask {
  Index block = 0, batches = 1, heads = 1, rows = 0, columns = 0;
  std::vector<std::int32_t> states = {};
  Index words = 0;  // of a cell's row
  std::vector<std::uint64_t> bits = {};

  const std::int32_t* line(Index b, Index h, Index i) const {
    return states.data() + (((batches == 1 ? 0 : b) * heads + (heads == 1 ? 0 : h)) * rows + i) * columns;
  }
  const std::uint64_t* cell(std::int32_t state) const { return bits.data() + (state - first_cell) * block * words; }
};

void read_cells(const TensorView& x, BlockMask& mask) {
  const Index block = mask.block;
  if (x.shape[1] != block || x.shape[2] != block)
    fail("cells: shape = {}, expected [*, {}, {}], as block says", to_string(x.shape), block, block);
  mask.bits.assign(static_cast<size_t>(x.shape[0] * block * mask.words), 0);
  for (Index t = 0; t < x.shape[0]; ++t)
    for (Index i = 0; i < block; ++i)
      for (Index j = 0; j < block; ++j)
        if (*static_cast<const std::uint8_t*>(x.at({t, i, j})) != 0)
          mask.bits[static_cast<size_t>((t * block + i) * mask.words + j / 64)] |= std::uint64_t{1} << (j % 64);
}

BlockMask read_blocks(const Params& p, const Inputs& in) {
  const TensorView &x = *in.find("blocks"), *cells = in.find("cells");
  BlockMask mask{.block = p.integer("block"), .batches = x.shape[0], .heads = x.shape[1]};
  mask.rows = ceil_div(in.problem.N, mask.block), mask.columns = ceil_div(in.problem.M, mask.block);
  mask.words = ceil_div(mask.block, 64);
  if (x.shape[2] != mask.rows || x.shape[3] != mask.columns)
    fail("blocks: shape = {}, expected [B or 1, Hq or 1, {}, {}]: blocks of {} over {} queries and {} keys",
         to_string(x.shape), mask.rows, mask.columns, mask.block, in.problem.N, in.problem.M);
  if (cells != nullptr) read_cells(*cells, mask);
  const Index most = first_cell + (cells == nullptr ? 0 : cells->shape[0]) - 1;
  mask.states.reserve(static_cast<size_t>(elements(x.shape)));
  for (Index b = 0; b < mask.batches; ++b)
    for (Index h = 0; h < mask.heads; ++h)
      for (Index i = 0; i < mask.rows; ++i)
        for (Index j = 0; j < mask.columns; ++j) {
          const std::int32_t state = *static_cast<const std::int32_t*>(x.at({b, h, i, j}));
          if (state < 0 || state > most) fail("blocks: holds {}, expected 0 … {}: 0, 1 or 2 + a cell", state, most);
          mask.states.push_back(state);
        }
  return mask;
}

Plan plan_flex(const Params& p, const Inputs& in) {
  const auto mask = std::make_shared<const BlockMask>(read_blocks(p, in));
  Plan plan =
      make_plan(in.problem, in.q, *in.kv, in.rule, mask->heads == 1 ? Lanes::per_kv_head : Lanes::per_query_head);
  if (const TensorView* bias = in.find("bias")) plan.rule.bias = *bias;
  plan.keep.push_back(mask);
  // Blocks of queries are counted from query 0, wherever it stands.
  plan.cuts.clear();
  for (Index t = 0; t < in.problem.N; t += mask->block) plan.cuts.push_back(t);
  plan.cuts.push_back(in.problem.N);

  const Index keys = in.problem.M;
  plan.emit = [m = mask.get(), keys](const RowBlock& rows, Tiles& tiles) {
    const std::int32_t* line = m->line(rows.b, rows.head, rows.first / m->block);
    const Set all = Set::range(0, rows.rows);
    const auto columns = [&](Index begin, Index end) {
      return Set::range(begin * m->block, std::min(end * m->block, keys));
    };
    for (Index j = 0, end = 0; j < m->columns; j = end) {
      end = j + 1;
      if (line[j] == nothing) continue;
      if (line[j] != everything) {
        tiles.add(all, columns(j, end), Mask::bits(m->cell(line[j]), m->words));
        continue;
      }
      while (end < m->columns && line[end] == everything) ++end;
      tiles.add(all, columns(j, end), Mask::full());
    }
  };
  return plan;
}

}  // namespace

const Mechanism& flex() {
  static const Mechanism m{
      .name = "flex",
      .title = "FlexAttention: a mask of the caller's own",
      .paper = "arXiv:2412.05496",
      .year = 2024,
      .stage = "attend",
      .training = Training::none,
      .idea = "The caller says who sees whom, in blocks: a block of queries sees nothing of a block of keys, all of "
              "it, or\n"
              "the pairs of a cell, which many blocks may share (those on a diagonal are alike). Blocks that nobody "
              "sees cost\n"
              "nothing. heed.flex_attention in Python makes the blocks of a mask function or of torch's BlockMask.",
      .equations =
          "o_i = softmax over j with mask(b, h, i, j) of (scale·<q_i, k_j> + bias_ij), times v_j\n"
          "mask of pair (i, j) of blocks (I, J): blocks_IJ = 0: no; 1: yes; n: cells[n - 2] at (i, j) inside it",
      .cost = "(D + Dv) multiply-adds for each pair of the blocks that are not empty",
      .causality = Causality::refused,
      .square = false,
      .params = {integer("block", 128, 1, 4096, "queries and keys of a block")},
      .extras = {{"blocks",
                  {DType::i32},
                  {"B|1", "Hq|1", "*", "*"},
                  true,
                  "[B or 1, Hq or 1, N / block, M / block], rounded up: 0 nothing, 1 all, n the pairs of cells[n - 2]"},
                 {"cells", {DType::u8}, {"*", "*", "*"}, false, "[*, block, block]: masks of single blocks"},
                 {"bias",
                  {DType::f32, DType::f16, DType::bf16},
                  {"B|1", "Hq|1", "N", "M"},
                  false,
                  "added to the scaled scores; -inf hides a pair",
                  true}},
      .not_on_models = "its mask comes with every call",
      .plan = plan_flex,
  };
  return m;
}

}  // namespace heed::mechanism
