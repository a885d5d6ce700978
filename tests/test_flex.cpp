// The caller's own mask, in blocks.
#include <doctest/doctest.h>

#include <algorithm>

#include "heed/kernel/kernels.h"
#include "support/gradients.h"

using namespace heed;
using namespace heed::test;

namespace {

// A mask as heed takes it; blocks that are alike share a cell.
struct Blocks {
  Index block;
  Tensor states, cells;

  Blocks(const Sizes& s, Index size, bool by_head, bool by_batch, const Sees& sees) : block(size) {
    const Index rows = ceil_div(s.N, size), columns = ceil_div(s.M, size);
    states = Tensor(DType::i32, {by_batch ? s.B : 1, by_head ? s.Hq : 1, rows, columns});
    std::vector<std::vector<std::uint8_t>> list;
    auto* state = states.as<std::int32_t>();
    for (Index b = 0; b < states.shape()[0]; ++b)
      for (Index h = 0; h < states.shape()[1]; ++h)
        for (Index i = 0; i < rows; ++i)
          for (Index j = 0; j < columns; ++j) *state++ = state_of(s, b, h, i, j, sees, list);
    cells = Tensor(DType::u8, {static_cast<Index>(list.size()), size, size});
    for (size_t t = 0; t < list.size(); ++t)
      std::copy(list[t].begin(), list[t].end(), cells.as<std::uint8_t>() + static_cast<Index>(t) * size * size);
  }

  void give(AttendInput& in) const {
    in.extra["blocks"] = states.view();
    if (cells.size() > 0) in.extra["cells"] = cells.view();
  }
  std::string call() const { return "flex:block=" + std::to_string(block); }

 private:
  std::int32_t state_of(const Sizes& s, Index b, Index h, Index i, Index j, const Sees& sees,
                        std::vector<std::vector<std::uint8_t>>& list) const {
    std::vector<std::uint8_t> cell(static_cast<size_t>(block * block), 0);
    Index seen = 0, all = 0;
    for (Index t = i * block; t < std::min(s.N, (i + 1) * block); ++t)
      for (Index c = j * block; c < std::min(s.M, (j + 1) * block); ++c, ++all)
        if (sees(b, h, t, c)) ++seen, cell[static_cast<size_t>((t - i * block) * block + c - j * block)] = 1;
    if (seen == 0) return 0;
    if (seen == all) return 1;
    const auto place = std::find(list.begin(), list.end(), cell) - list.begin();
    if (place == static_cast<Index>(list.size())) list.push_back(cell);
    return static_cast<std::int32_t>(2 + place);
  }
};

}  // namespace

TEST_CASE("flex equals the mask that its blocks say, forward and backward") {
  // Diagonals, far blocks that are whole, rows that see nothing (t % 41 == 40), differences by head.
  const Sees sees = [](Index b, Index h, Index t, Index j) {
    if (t % 41 == 40) return false;
    return (j <= t + 3 * h && j + 30 > t) || j / 50 == (t + b) / 90;
  };
  for (const std::string& isa : available_isas()) {
    const UseIsa use(isa);
    for (const Index block : {1, 16, 50, 64, 128, 300})
      for (const auto& [by_head, by_batch] : {std::pair(true, true), std::pair(false, true), std::pair(false, false)}) {
        if (block == 1 && by_head) continue;  // one is enough of these
        CAPTURE(block);
        const Case c({2, 4, 2, block == 1 ? 45 : 130, block == 1 ? 60 : 201, 16, 24});
        const Sees held = [&, by_h = by_head, by_b = by_batch](Index b, Index h, Index t, Index j) {
          return sees(by_b ? b : 0, by_h ? h : 0, t, j);
        };
        const Blocks blocks(c.size, block, by_head, by_batch, held);
        AttendInput in = c.input();
        blocks.give(in);
        CHECK_AGREES(run(blocks.call(), in), naive_attention(c, held), c);
        const Sample dout = random_dout(c.size);
        check_gradients(c, gradients(blocks.call(), in, dout), naive_gradients(c, met_keys(c, held), dout));
      }
  }
}

TEST_CASE("flex has a bias, and its gradient") {
  const Case c({1, 4, 2, 70, 130, 16, 16});
  const Sees causal = dense_sees(c, true);
  const Blocks blocks(c.size, 32, false, false, causal);
  const Sample bias(DType::f32, 1, 4, 70, 130, Layout::packed, 8), dout = random_dout(c.size);
  AttendInput in = c.input();
  blocks.give(in);
  in.extra["bias"] = bias.view();
  GradientOptions options;
  options.bias = &bias, options.bias_heads = 4;
  const AttendGradients got = gradients(blocks.call(), in, dout);
  const Gradients want = naive_gradients(c, met_keys(c, causal), dout, options);
  check_gradients(c, got, want);
  CHECK_GRADIENT("dbias", got.extra.at("bias"), want.dbias, gradient_tolerance(DType::f32));
}

TEST_CASE("blocks that nobody sees cost nothing, and neighbours that are whole are one tile") {
  const Case c({1, 1, 1, 256, 256, 16, 16});
  const Blocks blocks(c.size, 64, false, false, [](Index, Index, Index t, Index j) { return j / 64 <= t / 64; });
  AttendInput in = c.input();
  blocks.give(in);
  const AttendOutput out = attend(blocks.call(), in);
  CHECK(blocks.cells.size() == 0);
  CHECK(out.stats.tiles_planned == 4);
  CHECK(out.stats.pairs == 64 * 64 * 10);
  CHECK(out.stats.pairs_computed == out.stats.pairs);
}

TEST_CASE("flex refuses blocks that do not fit") {
  const Case c({1, 2, 1, 40, 60, 8, 8});
  AttendInput in = c.input();
  CHECK_FAILS(
      attend("flex", in), Error,
      "flex: tensor blocks is missing, expected [B or 1, Hq or 1, N / block, M / block], rounded up: 0 nothing, "
      "1 all, n the pairs of cells[n - 2]");
  Tensor states(DType::i32, {1, 1, 3, 4}), cells(DType::u8, {2, 16, 16}), wrong(DType::u8, {2, 16, 8});
  in.extra["blocks"] = states.view();
  CHECK_FAILS(
      attend("flex:block=20", in), Error,
      "blocks: shape = [1, 1, 3, 4], expected [B or 1, Hq or 1, 2, 3]: blocks of 20 over 40 queries and 60 keys");
  states.as<std::int32_t>()[5] = 4;
  CHECK_FAILS(attend("flex:block=16", in), Error, "blocks: holds 4, expected 0 … 1: 0, 1 or 2 + a cell");
  in.extra["cells"] = cells.view();
  CHECK_FAILS(attend("flex:block=16", in), Error, "blocks: holds 4, expected 0 … 3: 0, 1 or 2 + a cell");
  in.extra["cells"] = wrong.view();
  CHECK_FAILS(attend("flex:block=16", in), Error, "cells: shape = [2, 16, 8], expected [*, 16, 16], as block says");
  in.causal = true;
  CHECK_FAILS(attend("flex:block=16", in), UsageError,
              "flex: causal = true, expected false: it is not causal by definition");
}
