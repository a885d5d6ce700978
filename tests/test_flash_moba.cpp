// flash-moba against its equations: keys convolved over time, block means, the top of their scores.
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <tuple>

#include "heed/base/scratch.h"
#include "heed/kernel/kernels.h"
#include "support/differences.h"
#include "support/gradients.h"

using namespace heed;
using namespace heed::test;

namespace {

struct Flash {
  Index block = 32, top_k = 3;
  bool causal = true;
  const Sample* conv = nullptr;  // [1, Hk, D, W]
  double margin = 1e-4;          // rows whose choice is nearer to flipping are undecided
  std::string call() const { return fmt::format("flash-moba:block={},top_k={}", block, top_k); }
};

AttendInput input_of(const Case& c, const Flash& o, const Docs& docs = {}) {
  AttendInput in = c.input(o.causal);
  if (!docs.empty()) in.extra["doc"] = {docs.data(), DType::i32, {c.size.B, c.size.M}};
  if (o.conv != nullptr) {
    const TensorView w = o.conv->view();
    in.extra["kconv_w"] =
        TensorView(w.data, w.dtype, {w.shape.begin() + 1, w.shape.end()}, {w.stride.begin() + 1, w.stride.end()});
  }
  return in;
}

Sample taps(Index heads, Index d, Index width, double size = 0.3, DType type = DType::f32) {
  return Sample(type, 1, heads, d, width, Layout::packed, 77, size);
}

// k' in place of k.
Case convolved(const Case& c, const Flash& o, const Docs& docs) {
  Case x = c;
  if (o.conv == nullptr) return x;
  const auto& s = c.size;
  x.k = Sample(DType::f32, s.B, s.Hk, s.M, s.D, Layout::packed, 1);
  for (Index b = 0; b < s.B; ++b)
    for (Index g = 0; g < s.Hk; ++g)
      for (Index t = 0; t < s.M; ++t)
        for (Index i = 0; i < s.D; ++i) {
          double y = 0;
          for (Index l = 0; l < o.conv->features(); ++l)
            if (t - l >= document_start(c, docs, b, t)) y += o.conv->get(0, g, i, l) * c.k_at(b, g, t - l, i);
          x.k.set(b, g, t, i, c.k_at(b, g, t, i) + y / (1 + std::exp(-y)));
        }
  return x;
}

struct Chosen {
  std::vector<std::vector<Index>> first;  // [B, Hq, N]: first tokens of the chosen blocks, ascending, own one included
  std::vector<char> undecided;
};

// Materialised scores, a stable sort, the last ones: equal scores leave the higher block.
Chosen choose(const Case& x, const Flash& o, const Docs& docs) {
  const auto& s = x.size;
  Chosen result;
  std::map<std::tuple<Index, Index, Index>, std::vector<double>> means;  // batch, KV head, first token
  for (Index b = 0; b < s.B; ++b)
    for (Index h = 0; h < s.Hq; ++h)
      for (Index t = 0; t < s.N; ++t) {
        const Index p = docs.empty() && !o.causal ? 0 : position(x, t), start = document_start(x, docs, b, p);
        Index end = start;
        while (end < s.M && same_document(x, docs, b, start, end)) ++end;
        const Index own = start + (p - start) / o.block * o.block;
        std::vector<std::pair<double, Index>> scored;
        for (Index first = start; first < (o.causal ? own : end); first += o.block) {
          const Index last = std::min(first + o.block, end);
          std::vector<double>& mean = means[{b, x.kv_head(h), first}];
          for (Index i = 0; static_cast<Index>(mean.size()) < s.D; ++i) {
            double sum = 0;
            for (Index j = first; j < last; ++j) sum += x.k_at(b, x.kv_head(h), j, i);
            mean.push_back(sum / static_cast<double>(last - first));
          }
          double score = 0;
          for (Index i = 0; i < s.D; ++i) score += x.q_at(b, h, t, i) * mean[static_cast<size_t>(i)];
          scored.emplace_back(score, first);
        }
        std::stable_sort(scored.begin(), scored.end(), [](const auto& l, const auto& r) { return l.first < r.first; });
        const size_t keep = static_cast<size_t>(o.causal ? o.top_k - 1 : o.top_k);
        bool undecided = false;
        if (scored.size() > keep) {
          const size_t from = scored.size() - keep;
          undecided = keep > 0 && scored[from].first - scored[from - 1].first < o.margin;
          scored.erase(scored.begin(), scored.begin() + static_cast<std::ptrdiff_t>(from));
        }
        auto& list = result.first.emplace_back();
        for (const auto& [score, first] : scored) list.push_back(first);
        if (o.causal) list.push_back(own);
        std::sort(list.begin(), list.end());
        result.undecided.push_back(undecided ? 1 : 0);
      }
  return result;
}

Naive naive_flash(const Case& c, const Flash& o, const Docs& docs = {}) {
  const Case x = convolved(c, o, docs);
  Chosen chosen = choose(x, o, docs);
  Naive want = naive_attention(x, [&](Index b, Index h, Index t, Index j) {
    const Index p = position(x, t);
    if (o.causal && j > p) return false;
    if (!docs.empty() && !same_document(x, docs, b, p, j)) return false;
    for (const Index first : chosen.first[static_cast<size_t>((b * x.size.Hq + h) * x.size.N + t)])
      if (j >= first && j < first + o.block) return true;
    return false;
  });
  want.undecided = std::move(chosen.undecided);
  return want;
}

/// On every instruction set.
void check_flash(const Case& c, const Flash& o, const Docs& docs = {}) {
  const std::string call = o.call();
  CAPTURE(call);
  CAPTURE(o.causal);
  const Naive want = naive_flash(c, o, docs);
  Index undecided = 0;
  for (const char u : want.undecided) undecided += u;
  CHECK(undecided * 5 <= static_cast<Index>(want.undecided.size()));  // most rows must be judged
  for (const std::string& isa : available_isas()) {
    const UseIsa use(isa);
    const Got got = run(call, input_of(c, o, docs));
    CHECK_AGREES(got, want, c);
    if (undecided == 0) CHECK(got.stats.pairs == want.pairs);
  }
}

}  // namespace

TEST_CASE("flash-moba equals its equations, causal or not") {
  for (const DType arithmetic : {DType::f32, DType::bf16})
    for (const bool causal : {true, false}) {
      for (const Index n : {1, 31, 33, 200})
        for (const Index group : {1, 4})
          for (const Index top_k : {1, 3, 99})
            check_flash(Case({1, 4, 4 / group, n, n, 33, 16}, DType::f32, arithmetic),
                        {.block = 32, .top_k = top_k, .causal = causal});
      for (const Index block : {1, 7, 100})
        for (const Index top_k : {2, 5}) {
          const Flash o{.block = block, .top_k = top_k, .causal = causal};
          check_flash(Case({2, 2, 1, 131, 131, 64, 40}, DType::f32, arithmetic), o);
          check_flash(Case({1, 2, 1, 70, 411, 16, 16}, DType::f16, arithmetic), o);
          check_flash(Case({1, 8, 1, 1, 411, 80, 16}, DType::f32, arithmetic), o);
        }
      check_flash(Case({1, 4, 2, 300, 300, 256, 16}, DType::bf16, arithmetic), {.causal = causal});
      check_flash(Case({1, 2, 1, 300, 300, 24, 16}, DType::f32, arithmetic, Layout::scattered), {.causal = causal});
    }
  // More queries than keys, where no position counts.
  check_flash(Case({1, 2, 1, 150, 45, 16, 16}), {.block = 8, .top_k = 2, .causal = false});
  // Several row blocks.
  check_flash(Case({1, 1, 1, 1200, 1200, 16, 8}), {.block = 64, .top_k = 4});
  check_flash(Case({1, 1, 1, 1200, 700, 16, 8}), {.block = 48, .top_k = 4, .causal = false});
}

TEST_CASE("flash-moba's key convolution reaches the router and attention, and no other document") {
  const Sample three = taps(2, 24, 3), five = taps(2, 24, 5, 0.4, DType::f16);
  Docs docs = documents({1, 99, 2, 144, 54}), second = documents({300});
  docs.insert(docs.end(), second.begin(), second.end());
  for (const bool causal : {true, false})
    for (const Sample* conv : {&three, &five}) {
      const Flash o{.causal = causal, .conv = conv};
      check_flash(Case({2, 4, 2, 300, 300, 24, 16}), o);
      check_flash(Case({2, 4, 2, 260, 300, 24, 16}), o, docs);
      check_flash(Case({1, 4, 2, 1, 300, 24, 16}), o);
      // A bf16 k' may round the other way than the reference's: one unit in 256, over the block.
      check_flash(Case({1, 4, 2, 300, 300, 24, 16}, DType::f32, DType::bf16),
                  {.causal = causal, .conv = conv, .margin = 4e-3});
    }
}

TEST_CASE("flash-moba's blocks restart at each document") {
  const Case c({2, 2, 1, 260, 300, 24, 16});
  Docs docs = documents({1, 99, 16, 130, 54}), second = documents({300});
  docs.insert(docs.end(), second.begin(), second.end());
  for (const bool causal : {true, false})
    for (const Index block : {16, 50})
      for (const Index top_k : {1, 2, 3, 99}) check_flash(c, {.block = block, .top_k = top_k, .causal = causal}, docs);
}

TEST_CASE("flash-moba: the higher of equally scored blocks") {
  // Keys repeat every 32 tokens, so block means are equal to the bit while values are not; then two kinds in turn.
  for (const Index period : {32, 64}) {
    Case c({1, 2, 1, 256, 256, 16, 8});
    for (Index j = period; j < 256; ++j)
      for (Index d = 0; d < 16; ++d) c.k.set(0, 0, j, d, c.k.get(0, 0, j - period, d));
    for (const bool causal : {true, false})
      for (const Index top_k : {1, 2, 3, 5}) check_flash(c, {.top_k = top_k, .causal = causal, .margin = 0});
  }
}

TEST_CASE("flash-moba with as many blocks as there are is dense") {
  const Case c({1, 4, 2, 300, 333, 32, 32});
  for (const bool causal : {true, false}) {
    const Naive dense = naive_attention(c, dense_sees(c, causal));
    for (const Index top_k : {11, 12, 5000}) {  // 333 keys are 11 blocks of 32
      const std::string differs = difference(run(Flash{.top_k = top_k}.call(), c.input(causal)), dense, c, 1e-5);
      CHECK_MESSAGE(differs.empty(), differs);
    }
  }
}

TEST_CASE("flash-moba, causal and without convolution, is moba with the other tie, bit for bit") {
  for (const Sizes& s :
       {Sizes{1, 8, 2, 700, 700, 32, 16}, Sizes{2, 4, 4, 90, 533, 48, 32}, Sizes{1, 8, 1, 1, 533, 16, 16}}) {
    const Case c(s);
    const Got flash = run("flash-moba:block=48,top_k=4", c.input(true));
    const Got moba = run("moba:block=48,top_k=4,tie=higher", c.input());
    CHECK(same_bits(flash.o, moba.o));
    CHECK(same_bits(flash.lse, moba.lse));
    CHECK(flash.stats.pairs == moba.stats.pairs);
  }
}

TEST_CASE("flash-moba's lists hold every row's blocks once, ascending") {
  const Case c({1, 4, 2, 1100, 1170, 32, 16});
  for (const bool causal : {true, false}) {
    const Flash o{.block = 48, .top_k = 4, .causal = causal};
    const Chosen want = choose(c, o, {});
    std::vector<std::vector<Index>> got(want.first.size());
    Index tiles_planned = 0, entries = 0, expected = 0;
    const Plan plan = plan_of(MechanismCall::parse(o.call()), c.input(causal));
    walk(plan, [&](const RowBlock& rows, const std::vector<Tile>& tiles) {
      tiles_planned += static_cast<Index>(tiles.size());
      for (const Tile& tile : tiles)
        for (Index i = 0; i < tile.rows.count; ++i) {
          if (i > 0) CHECK(tile.rows[i] > tile.rows[i - 1]);
          const Index row = (rows.b * c.size.Hq + rows.head) * c.size.N + rows.token(tile.rows[i]);
          got[static_cast<size_t>(row)].push_back(tile.columns.first);
          ++entries;
        }
    });
    Index judged = 0;
    for (size_t row = 0; row < got.size(); ++row) {
      expected += static_cast<Index>(want.first[row].size());
      if (want.undecided[row] != 0) continue;
      std::sort(got[row].begin(), got[row].end());
      CHECK(got[row] == want.first[row]);
      ++judged;
    }
    CHECK(judged * 100 > static_cast<Index>(got.size()) * 95);
    CHECK(entries == expected);
    const Got result = run(plan);
    CHECK(result.stats.tiles_planned == tiles_planned);
    CHECK(result.stats.tiles_visited == tiles_planned);
  }
}

TEST_CASE("flash-moba keeps no score of every query and block") {
  const Case c({1, 1, 1, 8192, 8192, 16, 16});  // 512 blocks of 16
  const UseThreads one(1);
  for (const bool causal : {true, false}) {
    const Plan plan = plan_of(MechanismCall::parse("flash-moba:block=16"), c.input(causal));
    reset_scratch_peak();
    const Got got = run(plan);
    // One row block at a time: 1024 rows, as a head alone leaves eight of them.
    const Index lists = 1024 * 8 * 4, state = 1024 * (16 + 16 + 2) * 4, scores = 48 * 512 * 4;  // bytes
    CHECK(got.stats.scratch_bytes < 3 * (lists + state + scores));
    CHECK(got.stats.scratch_bytes < 8192 * 512 * 4 / 10);
  }
}

TEST_CASE("flash-moba: a convolution of zeros is none, bit for bit") {
  const Sample zero = taps(2, 24, 3, 0);
  for (const DType arithmetic : {DType::f32, DType::bf16})
    for (const bool causal : {true, false}) {
      const Case c({2, 4, 2, 250, 250, 24, 16}, DType::f32, arithmetic);
      const Got with = run("flash-moba:block=32,top_k=3", input_of(c, {.causal = causal, .conv = &zero}));
      const Got without = run("flash-moba:block=32,top_k=3", input_of(c, {.causal = causal}));
      CHECK(same_bits(with.o, without.o));
      CHECK(same_bits(with.lse, without.lse));
    }
}

TEST_CASE("flash-moba: queries that come one at a time, or in chunks, get the rows of the whole") {
  const Sample conv = taps(1, 32, 5);
  const Case c({1, 2, 1, 300, 300, 32, 16});
  for (const Sample* w : {static_cast<const Sample*>(nullptr), &conv}) {
    const Flash o{.block = 16, .conv = w};
    const Got whole = run(o.call(), input_of(c, o));
    for (const Index rows : {1, 37})
      for (const Index end : {37, 38, 64, 150, 300}) {
        AttendInput in = input_of(c, o);
        in.q.shape[2] = rows, in.k.shape[2] = end, in.v.shape[2] = end;
        in.q.data = static_cast<const float*>(in.q.data) + (end - rows) * in.q.stride[2];
        const Got part = run(o.call(), in);
        float most = 0;
        for (Index h = 0; h < 2; ++h)
          for (Index i = 0; i < rows; ++i)
            for (Index e = 0; e < 16; ++e)
              most = std::max(most, std::fabs(part.o[static_cast<size_t>(((h * rows) + i) * 16 + e)] -
                                              whole.o[static_cast<size_t>((h * 300 + end - rows + i) * 16 + e)]));
        CHECK(most < 1e-6f);
      }
  }
}

TEST_CASE("flash-moba, causal: no output depends on a later token") {
  const Sizes s{1, 2, 1, 280, 300, 16, 16};
  const Sample conv = taps(1, 16, 3);
  for (const std::string& isa : available_isas()) {
    const UseIsa use(isa);
    for (const DType arithmetic : {DType::f32, DType::bf16}) {
      const Case c(s, DType::f32, arithmetic);
      const Flash o{.conv = &conv};
      const Got before = run(o.call(), input_of(c, o));
      for (const Index t : {0, 11, 12, 50, 130, 270}) {
        Case changed = c;
        for (Index h = 0; h < 2; ++h)
          for (Index later = t + 1; later < s.N; ++later) changed.q.set(0, h, later, 2, -7);
        for (Index j = position(c, t) + 1; j < s.M; ++j)
          for (Index d = 0; d < 16; ++d) changed.k.set(0, 0, j, d, 20), changed.v.set(0, 0, j, d, 500);
        const Got after = run(o.call(), input_of(changed, o));
        Index differing = 0;
        for (Index h = 0; h < 2; ++h)
          for (Index i = 0; i <= t; ++i) {
            const size_t row = static_cast<size_t>(h * s.N + i);
            differing +=
                std::memcmp(&before.o[row * 16], &after.o[row * 16], 64) != 0 || before.lse[row] != after.lse[row];
          }
        CHECK_MESSAGE(differing == 0, c.describe(), ": ", differing, " rows at or before ", t, " changed");
        CHECK_FALSE(same_bits(before.o, after.o));
      }
    }
  }
}

TEST_CASE("flash-moba: the same bits for any number of threads") {
  const Sample conv = taps(2, 16, 3);
  for (const bool causal : {true, false})
    for (const Index n : {1, 600, 1500}) {
      const Case c({2, 4, 2, n, 1500, 16, 16});
      const Flash o{.top_k = 5, .causal = causal, .conv = &conv};
      Got first;
      for (const int count : {1, 2, 3}) {
        const UseThreads use(count);
        const Got got = run(o.call(), input_of(c, o));
        if (count == 1) first = got;
        CHECK(same_bits(got.o, first.o));
        CHECK(same_bits(got.lse, first.lse));
      }
    }
}

TEST_CASE("flash-moba refuses what it cannot mean") {
  const Case c({1, 1, 1, 8, 8, 16, 16});
  CHECK_FAILS(run("flash-moba:top_k=0", c.input()), UsageError, "flash-moba: top_k = 0, expected >= 1");
  CHECK_FAILS(run("flash-moba:block=0", c.input()), UsageError, "flash-moba: block = 0, expected >= 1");
  CHECK_THROWS_AS(run("flash-moba:tie=lower", c.input()), UsageError);
  const Sample even = taps(1, 16, 4), wide = taps(1, 17, 3);
  CHECK_FAILS(run("flash-moba", input_of(c, {.conv = &even})), Error,
              "kconv_w: shape = [1, 16, 4], expected [Hk, D, 3|5]");
  CHECK_FAILS(run("flash-moba", input_of(c, {.conv = &wide})), Error,
              "kconv_w: shape = [1, 17, 3], expected [Hk, D, 3|5]");
  Sample broken = taps(1, 16, 3);
  broken.set(0, 0, 3, 1, INFINITY);
  CHECK_FAILS(run("flash-moba", input_of(c, {.conv = &broken})), Error, "kconv_w: holds inf, expected finite values");
  const Case more({1, 1, 1, 9, 8, 16, 16});
  CHECK_FAILS(run("flash-moba", more.input(true)), Error, "q: 9 queries, expected at most the 8 keys when causal");
  CHECK_FAILS(run("flash-moba", input_of(more, {.causal = false}, documents({3, 5}))), Error,
              "doc: 9 queries and 8 keys, expected at most as many queries as documents have tokens");
}

TEST_CASE("flash-moba's gradients through the convolution of keys agree with central differences") {
  for (const DType arithmetic : {DType::f32, DType::bf16})
    for (const bool causal : {true, false})
      for (const bool packed : {false, true})
        for (const Sizes& s : {Sizes{1, 4, 2, 13, 13, 4, 3}, Sizes{2, 2, 2, 6, 9, 3, 4}, Sizes{1, 2, 1, 1, 7, 4, 5}}) {
          const Case given(s, DType::f32, arithmetic);
          CAPTURE(given.describe());
          CAPTURE(causal);
          Case c = widened(given);
          Docs docs;
          for (Index b = 0; b < s.B && packed; ++b)
            for (Index j = 0; j < s.M; ++j) docs.push_back(j < 4 ? 0 : 1);
          Sample w = taps(s.Hk, s.D, 3);
          const Flash o{.block = 3, .top_k = 2, .causal = causal, .conv = &w};
          const Chosen fixed = choose(convolved(c, o, docs), o, docs);
          CHECK(std::count(fixed.undecided.begin(), fixed.undecided.end(), 1) == 0);
          const Sample dout = random_dout(s);
          const double step = 4e-3;  // convolved keys are kept in f32
          const auto loss = [&] { return loss_of(naive_flash(c, o, docs).o, dout); };
          const double tolerance = gradient_tolerance(arithmetic);
          const AttendGradients got = gradients(o.call(), input_of(given, o, docs), dout);
          CHECK_GRADIENT("dq", got.dq, differences(c.q, loss, step), tolerance);
          CHECK_GRADIENT("dk", got.dk, differences(c.k, loss, step), tolerance);
          CHECK_GRADIENT("dv", got.dv, differences(c.v, loss, step), tolerance);
          CHECK(got.extra.at("kconv_w").shape() == Shape{s.Hk, s.D, 3});
          CHECK_GRADIENT("dkconv_w", got.extra.at("kconv_w"), differences(w, loss, step), tolerance);
        }
}

TEST_CASE("flash-moba's gradients across panels: those of convolved keys, taken home by hand") {
  for (const std::string& isa : available_isas()) {
    const UseIsa use(isa);
    const Sizes s{1, 4, 2, 500, 560, 8, 16};
    const Case c(s);
    const Sample w = taps(2, 8, 5), dout = random_dout(s);
    const Flash o{.block = 16, .top_k = 4, .conv = &w};
    const Case x = convolved(c, o, {});
    const AttendInput in = input_of(c, o);
    // Pairs as the plan names them; its source of convolved keys has the input's columns.
    const MetBy met = met_by_plan(plan_of(MechanismCall::parse(o.call()), in));
    Gradients want = naive_gradients(
        x,
        [&](Index b, Index h, Index t) {
          std::vector<Met> all = met(b, h, t);
          for (Met& m : all) m.tokens = {m.other}, m.other = -1;
          return all;
        },
        dout);
    std::vector<double> dk = want.dk, dw(2 * 8 * 5);
    for (Index g = 0; g < 2; ++g)
      for (Index t = 0; t < 560; ++t)
        for (Index i = 0; i < 8; ++i) {
          double y = 0;
          for (Index l = 0; l < 5 && l <= t; ++l) y += w.get(0, g, i, l) * c.k_at(0, g, t - l, i);
          const double open = 1 / (1 + std::exp(-y)), slope = open * (1 + y * (1 - open));
          const double d = want.dk[static_cast<size_t>((g * 560 + t) * 8 + i)] * slope;
          for (Index l = 0; l < 5 && l <= t; ++l) {
            dk[static_cast<size_t>((g * 560 + t - l) * 8 + i)] += d * w.get(0, g, i, l);
            dw[static_cast<size_t>((g * 8 + i) * 5 + l)] += d * c.k_at(0, g, t - l, i);
          }
        }
    want.dk = dk;
    for (const int n : {1, 3}) {
      const UseThreads threads(n);
      const AttendGradients got = gradients(o.call(), in, dout);
      check_gradients(c, got, want);
      CHECK_GRADIENT("dkconv_w", got.extra.at("kconv_w"), dw, gradient_tolerance(DType::f32));
    }
  }
}
