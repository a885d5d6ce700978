// Gradients of plans: what the traversal does with rows, columns, masks and rules.
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>

#include "heed/exec/mirror.h"
#include "heed/kernel/kernels.h"
#include "support/gradients.h"

using namespace heed;
using namespace heed::test;

TEST_CASE("the reference agrees with central differences") {
  Case c({1, 4, 2, 5, 7, 6, 3});
  const Sample dout = random_dout(c.size);
  const Sees sees = dense_sees(c, true);
  const std::vector<double> sinks{0.3, -1, 0.5, 2};
  Sample bias(DType::f32, 1, 4, 5, 7, Layout::packed, 9);
  const auto loss = [&] {
    NaiveOptions o;
    o.sinks = sinks;
    o.change = [&](Index, Index h, Index t, Index j, double x) {
      return 1.3 * std::tanh(x / 1.3) + 0.2 * static_cast<double>(j - position(c, t)) + bias.get(0, h, t, j);
    };
    const Naive n = naive_attention(c, sees, o);
    double sum = 0;
    for (Index h = 0; h < 4; ++h)
      for (Index t = 0; t < 5; ++t)
        for (Index e = 0; e < 3; ++e) sum += n.o[static_cast<size_t>((h * 5 + t) * 3 + e)] * dout.get(0, h, t, e);
    return sum;
  };
  GradientOptions options;
  options.softcap = 1.3, options.alibi = {0.2, 0.2, 0.2, 0.2}, options.sinks = sinks;
  options.bias = &bias, options.bias_heads = 4;
  const Gradients want = naive_gradients(c, met_keys(c, sees), dout, options);
  CHECK(want.loss == doctest::Approx(loss()).epsilon(1e-10));
  const auto check_all = [&](Sample& x, Index heads, Index tokens, Index width, const std::vector<double>& d) {
    for (Index h = 0; h < heads; ++h)
      for (Index t = 0; t < tokens; ++t)
        for (Index i = 0; i < width; ++i) {
          // Steps that f32 holds exactly, whatever they round to.
          const double before = x.get(0, h, t, i);
          x.set(0, h, t, i, before + 1e-3);
          const double above = x.get(0, h, t, i), more = loss();
          x.set(0, h, t, i, before - 1e-3);
          const double slope = (more - loss()) / (above - x.get(0, h, t, i));
          x.set(0, h, t, i, before);
          CHECK(std::fabs(slope - d[static_cast<size_t>((h * tokens + t) * width + i)]) < 1e-5);
        }
  };
  check_all(c.q, 4, 5, 6, want.dq), check_all(c.k, 2, 7, 6, want.dk), check_all(c.v, 2, 7, 3, want.dv);
  check_all(bias, 4, 5, 7, want.dbias);
}

TEST_CASE("dense gradients equal their definition") {
  for (const std::string& isa : available_isas()) {
    const UseIsa use(isa);
    CAPTURE(isa);
    for (const DType arithmetic : {DType::f32, DType::bf16})
      for (const Sizes& s :
           {Sizes{1, 1, 1, 1, 1, 16, 16}, Sizes{2, 4, 1, 50, 67, 33, 16}, Sizes{1, 1, 1, 131, 131, 64, 64},
            Sizes{1, 4, 4, 5, 300, 24, 40}, Sizes{1, 8, 2, 3, 129, 16, 7}, Sizes{1, 2, 1, 60, 133, 8, 130}})
        for (const bool causal : {false, true}) {
          const Case c(s, DType::f32, arithmetic);
          const Sample dout = random_dout(s);
          const Gradients want = naive_gradients(c, met_keys(c, dense_sees(c, causal)), dout);
          check_gradients(c, gradients("dense", c.input(causal), dout), want);
        }
  }
}

TEST_CASE("soft caps, ALiBi, sinks and biases") {
  for (const std::string& isa : available_isas()) {
    const UseIsa use(isa);
    const Case c({2, 4, 2, 50, 131, 32, 16});
    const AttendInput in = c.input(true);
    const Sample dout = random_dout(c.size);
    const double tolerance = gradient_tolerance(DType::f32);
    for (const std::string call : {"dense", "streaming:sink=5,window=40", "moba:block=16,top_k=3"})
      for (const auto& [batches, heads] : std::vector<std::pair<Index, Index>>{{2, 4}, {1, 4}, {2, 1}, {1, 1}}) {
        CAPTURE(call);
        CAPTURE(batches);
        CAPTURE(heads);
        Plan plan = plan_of(MechanismCall::parse(call), in);
        plan.rule.softcap = 1.2f;
        plan.rule.alibi = {0.5f, 0.25f, 0.03f, 0}, plan.rule.sinks = {1.5f, -2, 0, 6};
        const Sample bias(DType::f32, batches, heads, c.size.N, c.size.M, Layout::tokens, 5);
        plan.rule.bias = bias.view();
        GradientOptions options;
        options.softcap = static_cast<double>(1.2f);
        options.alibi.assign(plan.rule.alibi.begin(), plan.rule.alibi.end());
        options.sinks.assign(plan.rule.sinks.begin(), plan.rule.sinks.end());
        options.bias = &bias, options.bias_batches = batches, options.bias_heads = heads;
        const Gradients want = naive_gradients(c, met_by_plan(plan), dout, options);
        const PlanGradients got = backward(plan, dout.view());
        check_gradients(c, got, want);
        CHECK_GRADIENT("dbias", got.dbias, want.dbias, tolerance);
        CHECK_GRADIENT("dsinks", got.dsinks, want.dsinks, tolerance);
      }
  }
}

TEST_CASE("log-weights of the input and of derived columns") {
  const Case c({1, 4, 2, 75, 75, 16, 16});
  const Sample dout = random_dout(c.size), noise(DType::f32, 1, 2, 1, 75, Layout::packed, 4);
  const auto* weights = static_cast<const float*>(noise.view().data);
  for (const char* call : {"dense", "moba:block=8,top_k=3"}) {
    Plan plan = plan_of(MechanismCall::parse(call), c.input(true));
    for (size_t view = 0; view < 2; ++view) plan.sources[0].views[view].log_weight = weights + view * 75;
    const MetBy pairs = met_by_plan(plan);
    const MetBy met = [&](Index b, Index h, Index t) {
      std::vector<Met> all = pairs(b, h, t);
      for (Met& m : all) m.weight_of = c.kv_head(h) * 75 + m.tokens[0];
      return all;
    };
    GradientOptions options;
    options.log_weights = 150;
    const Gradients want = naive_gradients(c, met, dout, options);
    const PlanGradients got = backward(plan, dout.view());
    check_gradients(c, got, want);
    CHECK_GRADIENT("dlog_weight", got.sources[0].dlog_weight, want.dlog_weight, gradient_tolerance(DType::f32));
  }
  const Plan pooled = plan_of(MechanismCall::parse("llsa:block=4,top_k=3"), c.input(false));
  CHECK(backward(pooled, dout.view()).sources[1].dlog_weight.shape() == Shape{2, 19});
}

TEST_CASE("a token in several rows or in none, lists of rows and of columns, bits") {
  const Case c({2, 4, 2, 40, 90, 16, 16});
  for (const Lanes lanes : {Lanes::per_kv_head, Lanes::per_query_head}) {
    Plan plan = plan_of(MechanismCall::parse("dense"), c.input(false));
    plan.lanes = lanes;
    // Rows: tokens 0, 3, …, and 1, 3, 5 … once more: some twice, some never.
    std::vector<std::int32_t> tokens;
    for (std::int32_t t = 0; t < 40; t += 3) tokens.push_back(t);
    for (std::int32_t t = 1; t < 40; t += 2) tokens.push_back(t);
    const Index rows = static_cast<Index>(tokens.size());
    plan.row_tokens.assign(lanes == Lanes::per_kv_head ? 4 : 8, tokens);
    plan.output_by_token = false;
    plan.cuts = {0, 14, rows};
    const std::vector<std::int32_t> few{1, 2, 5, 9, 12}, listed{0, 3, 4, 7, 64, 65, 80};
    std::vector<std::uint64_t> bits;
    for (std::uint64_t i = 0; i < 14; ++i) bits.push_back(0x9249249249249249u >> i);
    plan.emit = [&](const RowBlock& block, Tiles& tiles) {
      if (block.first == 0) {
        tiles.add(Set::range(0, 14), Set::range(10, 74), Mask::bits(bits.data(), 1));
        tiles.add(Set::list(few), Set::range(74, 90), Mask::full());
      } else {
        tiles.add(Set::list(few), Set::list(listed), Mask::full());
        tiles.add(Set::range(2, block.rows), Set::range(20, 60), Mask::band(-30, -2));
      }
    };
    // Every row is an output of its own, so the gradient of a token's rows is what the reference has of one row with
    // all that they meet only when they are compared row by row.
    const Sample dout(DType::f32, 2, 4, rows, 16, Layout::packed, 6);
    const PlanGradients got = backward(plan, dout.view());
    Gradients sum;
    for (Index r = 0; r < rows; ++r) {
      const Index token = tokens[static_cast<size_t>(r)], block = r < 14 ? 0 : 1,
                  rank = r - plan.cuts[static_cast<size_t>(block)];
      const MetBy met = [&](Index, Index, Index t) {
        std::vector<Met> all;
        if (t != token) return all;
        const bool listed_row = std::find(few.begin(), few.end(), rank) != few.end();
        for (Index j = 0; j < 90; ++j) {
          bool seen = false;
          if (block == 0)
            seen = j >= 74 ? listed_row : j >= 10 && ((bits[static_cast<size_t>(rank)] >> (j - 10)) & 1) != 0;
          else {
            const Index p = position(c, t);
            if (listed_row && std::find(listed.begin(), listed.end(), j) != listed.end()) all.push_back({{j}});
            seen = rank >= 2 && j >= 20 && j < 60 && j >= p - 30 && j <= p - 2;
          }
          if (seen) all.push_back({{j}});
        }
        return all;
      };
      Sample of_token(DType::f32, 2, 4, 40, 16, Layout::packed, 1);
      for (Index b = 0; b < 2; ++b)
        for (Index h = 0; h < 4; ++h)
          for (Index e = 0; e < 16; ++e) of_token.set(b, h, token, e, dout.get(b, h, r, e));
      const Gradients g = naive_gradients(c, met, of_token);
      const auto add = [](std::vector<double>& a, const std::vector<double>& b) {
        a.resize(b.size());
        for (size_t i = 0; i < b.size(); ++i) a[i] += b[i];
      };
      add(sum.dq, g.dq), add(sum.dk, g.dk), add(sum.dv, g.dv);
    }
    check_gradients(c, got, sum);
  }
}

TEST_CASE("rows without keys give nothing, padding and documents neither") {
  const Sizes s{2, 2, 1, 60, 90, 16, 8};
  const Case c(s);
  const Sample dout = random_dout(s);
  std::vector<std::uint8_t> mask(180);
  for (size_t i = 0; i < 180; ++i) mask[i] = i < 90 ? i % 4 != 0 : i >= 90 + 70;  // batch 1: nothing for early rows
  Docs docs = documents({50, 40});
  const Docs second = documents({90});
  docs.insert(docs.end(), second.begin(), second.end());
  AttendInput in = c.input(true);
  in.extra["key_mask"] = {mask.data(), DType::u8, {2, 90}};
  in.extra["doc"] = {docs.data(), DType::i32, {2, 90}};
  const Sees sees = [&](Index b, Index, Index t, Index j) {
    return mask[static_cast<size_t>(b * 90 + j)] != 0 && j <= position(c, t) &&
           same_document(c, docs, b, position(c, t), j);
  };
  check_gradients(c, gradients("dense", in, dout), naive_gradients(c, met_keys(c, sees), dout));
}

// No machine at hand may multiply bf16 as such, so the layout of those that do is made by hand.
TEST_CASE("sources of bf16 pairs are mirrored in f32") {
  const Index d = 5, dv = 3, columns = 70;
  const PanelLayout pairs{DType::bf16, d, dv, 32, 16};
  std::vector<bf16> keys(static_cast<size_t>(pairs.key_elements(columns)));
  std::vector<bf16> values(static_cast<size_t>(pairs.value_elements(columns)));
  const auto key = [](Index j, Index f) { return static_cast<float>(j) - 8 * static_cast<float>(f); };
  const auto value = [](Index j, Index e) { return static_cast<float>(e) + 4 * static_cast<float>(j % 40); };
  for (Index j = 0; j < columns; ++j) {
    for (Index f = 0; f < d; ++f) keys[static_cast<size_t>(pairs.key_offset(j, f))] = to_bf16(key(j, f));
    for (Index e = 0; e < dv; ++e) values[static_cast<size_t>(pairs.value_offset(j, e))] = to_bf16(value(j, e));
  }
  Plan plan;
  plan.problem = {.B = 1, .Hq = 1, .Hk = 1, .N = 1, .M = columns, .D = d, .Dv = dv};
  Source source;
  source.layout = pairs;
  source.views.push_back({.keys = keys.data(), .values = values.data(), .columns = columns});
  plan.sources.push_back(source);
  const Mirrors mirrors = mirror_sources(plan);
  const SourceView &own = plan.sources[0].views[0], &mirror = mirrors.views[0][0];
  const auto at = [](const void* data, Index i) { return static_cast<const float*>(data)[i]; };
  for (Index j = 0; j < columns; ++j) {
    for (Index f = 0; f < d; ++f) {
      CHECK(at(own.keys, mirrors.scores.key_offset(j, f)) == key(j, f));
      CHECK(at(mirror.values, mirrors.layout.value_offset(j, f)) == key(j, f));
    }
    for (Index f = d; f < mirrors.qp(); ++f) CHECK(at(mirror.values, mirrors.layout.value_offset(j, f)) == 0);
    for (Index e = 0; e < dv; ++e) CHECK(at(mirror.keys, mirrors.layout.key_offset(j, e)) == value(j, e));
  }
}
