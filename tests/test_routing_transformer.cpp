// routing-transformer against its steps: normalise, gather the nearest to each centroid, attend inside, average.
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "heed/kernel/kernels.h"
#include "support/differences.h"
#include "support/gradients.h"
#include "support/routing.h"

using namespace heed;
using namespace heed::test;

namespace {

/// The front door's output, as `difference` reads it: there is no lse to compare.
Got attended(const std::string& call, const AttendInput& in) {
  const AttendOutput out = attend(call, in);
  CHECK(out.lse.size() == 0);
  Got got;
  got.o.assign(out.o.as<float>(), out.o.as<float>() + out.o.size());
  got.lse.assign(static_cast<size_t>(out.o.size() / out.o.shape().back()), -INFINITY);
  got.stats = out.stats;
  return got;
}

void check_routing(const Case& c, Routing r, Index clusters) {
  for (const bool causal : {true, false}) {
    r.causal = causal;
    const Mu mu(c, clusters);
    const Naive want = naive_routing(c, r, mu);
    const std::string call = r.call();
    CAPTURE(call);
    CAPTURE(causal);
    Index undecided = 0;
    for (const char u : want.undecided) undecided += u;
    CHECK(undecided * 4 <= static_cast<Index>(want.undecided.size()));  // most rows must be judged
    for (const std::string& isa : available_isas()) {
      const UseIsa use(isa);
      const Got got = attended(call, mu.input(c, causal));
      CHECK_AGREES(got, want, c);
      if (undecided == 0) CHECK(got.stats.pairs == want.pairs);
    }
  }
}

}  // namespace

TEST_CASE("routing-transformer equals its steps") {
  for (const DType arithmetic : {DType::f32, DType::bf16}) {
    const double scale = arithmetic == DType::f32 ? 1 : 0.25;  // scores of norm D in bf16 would test rounding alone
    check_routing(Case({1, 4, 1, 130, 130, 33, 16}, DType::f32, arithmetic), {.cluster_size = 20, .scale = scale}, 5);
    check_routing(Case({2, 2, 2, 97, 97, 64, 40}, DType::f32, arithmetic), {.cluster_size = 33, .scale = scale}, 3);
    check_routing(Case({1, 8, 2, 70, 70, 16, 24}, DType::f16, arithmetic), {.cluster_size = 7, .scale = scale}, 12);
    check_routing(Case({1, 1, 1, 1, 1, 16, 16}, DType::f32, arithmetic), {.scale = scale}, 3);
    check_routing(Case({1, 2, 1, 1, 90, 80, 16}, DType::f32, arithmetic), {.scale = scale}, 4);
    check_routing(Case({1, 2, 1, 31, 300, 256, 8}, DType::bf16, arithmetic), {.cluster_size = 70, .scale = scale}, 6);
  }
  check_routing(Case({1, 2, 1, 200, 200, 16, 16}, DType::f32, DType::f32, Layout::scattered), {.eps = 1e-5}, 9);
  check_routing(Case({1, 2, 1, 200, 200, 16, 16}, DType::bf16, DType::f32, Layout::tokens), {.cluster_size = 500}, 2);
  check_routing(Case({1, 1, 1, 1300, 1300, 16, 8}), {.cluster_size = 1100, .eps = 0}, 2);  // clusters cut into blocks
}

TEST_CASE("routing-transformer with more keys than queries, or without causality more queries than keys") {
  check_routing(Case({1, 2, 1, 60, 150, 16, 16}), {.cluster_size = 63}, 4);
  check_routing(Case({1, 2, 1, 60, 170, 16, 16}), {.cluster_size = 30}, 5);
  const Case c({1, 2, 1, 90, 40, 16, 16});
  const Routing r{.cluster_size = 50, .causal = false};
  const Mu mu(c, 3);
  CHECK_AGREES(attended(r.call(), mu.input(c, false)), naive_routing(c, r, mu), c);
}

TEST_CASE("routing-transformer: shared queries and keys, own key masked") {
  for (const bool shared : {true, false})
    for (const bool mask_self : {true, false}) {
      check_routing(Case({1, 4, 2, 120, 120, 24, 16}), {.cluster_size = 30, .mask_self = mask_self, .shared = shared},
                    5);
      check_routing(Case({1, 2, 1, 40, 40, 16, 16}), {.cluster_size = 1, .mask_self = mask_self, .shared = shared}, 7);
    }
  check_routing(Case({1, 2, 1, 90, 90, 16, 16}), {.cluster_size = 90, .mask_self = true, .shared = true}, 2);
  check_routing(Case({1, 2, 1, 50, 90, 16, 16}), {.cluster_size = 20, .mask_self = true}, 4);
}

TEST_CASE("routing-transformer with one cluster of all is dense attention on normalised q and k") {
  for (const bool causal : {true, false}) {
    Case c({1, 4, 2, 210, 210, 32, 16});
    const Mu mu(c, 1);
    const Got got = attended("routing-transformer:cluster_size=210", mu.input(c, causal));
    CHECK(got.stats.pairs == (causal ? 4 * 210 * 211 / 2 : 4 * 210 * 210));
    const auto normalise = [](Sample& x, Index heads, Index tokens) {
      for (Index h = 0; h < heads; ++h)
        for (Index t = 0; t < tokens; ++t) {
          std::vector<double> row;
          for (Index d = 0; d < x.features(); ++d) row.push_back(x.get(0, h, t, d));
          row = normalised(row);
          for (Index d = 0; d < x.features(); ++d) x.set(0, h, t, d, row[static_cast<size_t>(d)]);
        }
    };
    normalise(c.q, 4, 210), normalise(c.k, 2, 210);
    Naive want = naive_attention(c, dense_sees(c, causal), {.scale = 1});
    for (double& x : want.o) x /= 1.01;
    std::fill(want.lse.begin(), want.lse.end(), -INFINITY);
    const std::string differs = difference(got, want, c, 1e-5);
    CHECK_MESSAGE(differs.empty(), differs);
  }
}

TEST_CASE("routing-transformer: every list has cluster_size distinct tokens; rotating q, k and mu changes nothing") {
  Case c({1, 4, 2, 150, 150, 16, 16});
  Mu mu(c, 6);
  const Routing r{.cluster_size = 40};
  const auto lists = [&] {
    const AttendInput in = mu.input(c, true);
    const Plan plan = plan_of(MechanismCall::parse(r.call()), in);
    CHECK(plan.rows_per_head() == 6 * 40);
    return plan.row_tokens;
  };
  const auto before = lists();
  REQUIRE(before.size() == 4);
  for (const auto& list : before)
    for (size_t cluster = 0; cluster < 6; ++cluster)
      for (size_t i = cluster * 40 + 1; i < (cluster + 1) * 40; ++i) CHECK(list[i - 1] < list[i]);
  const Got got = attended(r.call(), mu.input(c, true));
  // A rotation that keeps the mean of a row: feature 0 to 1, 1 to 2, …, and pairs turned by the reflection of
  // (1, 1)'s complement, which swaps two features.
  const auto turn = [](std::vector<double> x) {
    std::rotate(x.begin(), x.begin() + 5, x.end());
    double mean = 0;
    for (size_t i = 0; i < 4; ++i) mean += x[i] / 4;
    for (size_t i = 0; i < 4; ++i) x[i] = 2 * mean - x[i];  // a reflection that leaves the ones fixed
    return x;
  };
  for (Sample* x : {&c.q, &c.k})
    for (Index h = 0; h < (x == &c.q ? 4 : 2); ++h)
      for (Index t = 0; t < 150; ++t) {
        std::vector<double> row;
        for (Index d = 0; d < 16; ++d) row.push_back(x->get(0, h, t, d));
        row = turn(row);
        for (Index d = 0; d < 16; ++d) x->set(0, h, t, d, row[static_cast<size_t>(d)]);
      }
  for (size_t at = 0; at < mu.at.size(); at += 16) {
    const std::vector<double> row =
        turn({mu.at.begin() + static_cast<std::ptrdiff_t>(at), mu.at.begin() + static_cast<std::ptrdiff_t>(at) + 16});
    std::copy(row.begin(), row.end(), mu.at.begin() + static_cast<std::ptrdiff_t>(at));
  }
  CHECK(lists() == before);
  const Got after = attended(r.call(), mu.input(c, true));
  double worst = 0;
  for (size_t i = 0; i < got.o.size(); ++i)
    worst = std::max(worst, std::fabs(static_cast<double>(got.o[i] - after.o[i])));
  CHECK(worst < 1e-4);
}

TEST_CASE("routing-transformer: equal scores, the lower tokens win") {
  Case c({1, 1, 1, 60, 60, 16, 8});
  for (Index t = 4; t < 60; ++t)
    for (Index d = 0; d < 16; ++d) {
      c.q.set(0, 0, t, d, c.q.get(0, 0, t - 4, d));
      c.k.set(0, 0, t, d, c.k.get(0, 0, t - 4, d));
    }
  const Mu mu(c, 3);
  const Routing r{.cluster_size = 22};
  Naive want = naive_routing(c, r, mu);
  want.undecided.clear();
  CHECK_AGREES(attended(r.call(), mu.input(c, true)), want, c);
}

TEST_CASE("routing-transformer: no output depends on a later value while the clusters stand") {
  for (const bool shared : {false, true})
    for (const std::string& isa : available_isas()) {
      const UseIsa use(isa);
      const Case c({1, 2, 1, 200, shared ? 200 : 230, 16, 16});
      const Mu mu(c, 6);
      const Routing r{.cluster_size = 50, .shared = shared};
      const Got before = attended(r.call(), mu.input(c, true));
      for (const Index t : {0, 50, 131, 198}) {
        Case changed = c;
        for (Index j = position(c, t) + 1; j < c.size.M; ++j)
          for (Index e = 0; e < 16; ++e) changed.v.set(0, 0, j, e, 500);
        const Got after = attended(r.call(), mu.input(changed, true));
        for (size_t h = 0; h < 2; ++h)
          CHECK(std::memcmp(&before.o[h * 200 * 16], &after.o[h * 200 * 16], static_cast<size_t>(t + 1) * 64) == 0);
        CHECK(before.o != after.o);
      }
    }
}

TEST_CASE("routing-transformer: the same bits for any number of threads, with and without centroids") {
  for (const std::string& isa : available_isas()) {
    const UseIsa use(isa);
    const Case c({2, 4, 2, 600, 600, 16, 16});
    const Mu mu(c, 7);
    for (const bool given : {true, false}) {
      Got first;
      for (const int n : {1, 2, 3}) {
        const UseThreads threads(n);
        const Got got = attended("routing-transformer:cluster_size=90", given ? mu.input(c, true) : c.input(true));
        if (n == 1) first = got;
        CHECK(same_bits(got.o, first.o));
      }
    }
  }
}

TEST_CASE("routing-transformer finds its own centroids, the same for the same seed") {
  // Four bumps of queries and keys, each its own direction. With as many clusters as bumps and room for one bump, the
  // clusters are the bumps, so that attention stays inside them.
  Case c({1, 2, 1, 256, 256, 16, 16});
  for (Sample* x : {&c.q, &c.k})
    for (Index h = 0; h < (x == &c.q ? 2 : 1); ++h)
      for (Index t = 0; t < 256; ++t)
        for (Index d = 0; d < 16; ++d) x->set(0, h, t, d, 0.1 * x->get(0, h, t, d) + (d / 4 == t % 4 ? 3 : 0));
  const AttendInput in = c.input(true);
  Index found = 0;
  for (Index seed = 0; seed < 8; ++seed) {
    const std::string call = fmt::format("routing-transformer:cluster_size=64,seed={}", seed);
    const Plan plan = plan_of(MechanismCall::parse(call), in), again = plan_of(MechanismCall::parse(call), in);
    CHECK(plan.row_tokens == again.row_tokens);
    Index pure = 0;
    for (const auto& list : plan.row_tokens)
      for (size_t i = 0; i < list.size(); ++i) pure += list[i] % 4 == list[i / 64 * 64] % 4 ? 1 : 0;
    found += pure == 2 * 256 ? 1 : 0;
  }
  CHECK(found >= 1);  // k-means from random tokens may start with two of one bump
}

TEST_CASE("routing-transformer refuses what it cannot mean") {
  const Case c({1, 1, 1, 8, 8, 16, 16});
  const Mu mu(c, 2);
  CHECK_FAILS(run("routing-transformer:cluster_size=0", c.input()), UsageError,
              "routing-transformer: cluster_size = 0, expected >= 1");
  CHECK_FAILS(run("routing-transformer:clusters=17", c.input()), UsageError,
              "routing-transformer: clusters = 17, expected at most 16, the vectors there are");
  CHECK_FAILS(run("routing-transformer:clusters=3", mu.input(c, false)), UsageError,
              "routing-transformer: clusters = 3, expected 2 as mu says, or 0");
  AttendInput in = mu.input(c, false);
  in.extra["mu"].shape = {1, 0, 16};
  CHECK_FAILS(run("routing-transformer", in), Error,
              "mu: shape = [1, 0, 16], expected [Hk, C, D] with at least one centroid");
  in.extra["mu"].shape = {1, 2, 8};
  CHECK_FAILS(run("routing-transformer", in), Error, "mu: shape = [1, 2, 8], expected [Hk, *, D]");
  Mu holed = mu;
  holed.at[5] = NAN;
  CHECK_THROWS_AS(run("routing-transformer", holed.input(c, false)), Error);
  const Case wide({1, 1, 1, 4, 8, 16, 16});
  CHECK_FAILS(
      run("routing-transformer:shared_qk=true", wide.input()), UsageError,
      "routing-transformer: shared_qk = true with 4 queries and 8 keys, expected as many of one as of the other");
  in = mu.input(c, false);
  in.scale = 0.5f;
  CHECK_FAILS(run("routing-transformer:scale=2", in), UsageError,
              "routing-transformer: scale = 2 beside the call's own scale 0.5, expected one of them");
}

TEST_CASE("routing-transformer's gradients, lists constant, agree with central differences") {
  for (const DType arithmetic : {DType::f32, DType::bf16})
    for (const bool shared : {false, true})
      for (const Sizes& s : {Sizes{1, 4, 2, 11, 11, 6, 3}, Sizes{2, 2, 2, 7, 7, 5, 4}, Sizes{1, 1, 1, 1, 1, 4, 3},
                             Sizes{1, 4, 1, 5, 12, 6, 4}}) {
        if (shared && s.N != s.M) continue;
        for (const bool causal : {true, false}) {
          const Case given(s, DType::f32, arithmetic);
          const Routing r{
              .cluster_size = 5, .scale = 0.4, .mask_self = shared && causal, .shared = shared, .causal = causal};
          const std::string call = r.call();
          CAPTURE(call);
          CAPTURE(given.describe());
          Case c = widened(given);
          const Mu mu(c, 3);
          const Sample dout = random_dout(s);
          const Naive base = naive_routing(c, r, mu);
          CHECK(std::count(base.undecided.begin(), base.undecided.end(), 1) == 0);
          const auto loss = [&] { return loss_of(naive_routing(c, r, mu).o, dout); };
          const double tolerance = gradient_tolerance(arithmetic);
          const AttendGradients got = gradients(call, mu.input(given, causal), dout);
          CHECK_GRADIENT("dq", got.dq, differences(c.q, loss), tolerance);
          CHECK_GRADIENT("dk", got.dk, differences(c.k, loss), tolerance);
          CHECK_GRADIENT("dv", got.dv, differences(c.v, loss), tolerance);
          CHECK(got.extra.empty());
        }
      }
}

TEST_CASE("routing-transformer's gradients across panels: dense ones of normalised q and k, taken home by hand") {
  // One cluster of all tokens.
  for (const std::string& isa : available_isas()) {
    const UseIsa use(isa);
    const Sizes s{1, 4, 2, 150, 300, 24, 16};
    const Case c(s);
    const Mu mu(c, 1);
    Sample dout = random_dout(s);
    Case x = c;
    const auto normalise = [&](Sample& to, auto at, Index heads, Index tokens) {
      for (Index h = 0; h < heads; ++h)
        for (Index t = 0; t < tokens; ++t) {
          std::vector<double> row;
          for (Index d = 0; d < s.D; ++d) row.push_back(at(h, t, d));
          row = normalised(row);
          for (Index d = 0; d < s.D; ++d) to.set(0, h, t, d, row[static_cast<size_t>(d)]);
        }
    };
    normalise(x.q, [&](Index h, Index t, Index d) { return c.q_at(0, h, t, d); }, 4, 150);
    normalise(x.k, [&](Index h, Index t, Index d) { return c.k_at(0, h, t, d); }, 2, 300);
    Sample shared = dout;
    for (Index h = 0; h < 4; ++h)
      for (Index t = 0; t < 150; ++t)
        for (Index e = 0; e < 16; ++e) shared.set(0, h, t, e, dout.get(0, h, t, e) / 1.01);
    GradientOptions options;
    options.scale = 0.3;
    Gradients want = naive_gradients(x, met_keys(x, dense_sees(x, true)), shared, options);
    // d of the row's feature i through all normalised ones.
    const auto home = [&](std::vector<double>& d, auto at, Index rows, Index tokens) {
      for (Index r = 0; r < rows; ++r) {
        std::vector<double> row, into(static_cast<size_t>(s.D));
        for (Index i = 0; i < s.D; ++i) row.push_back(at(r / tokens, r % tokens, i));
        for (size_t i = 0; i < row.size(); ++i) {
          std::vector<double> more = row, less = row;
          more[i] += 1e-5, less[i] -= 1e-5;
          more = normalised(more), less = normalised(less);
          for (size_t j = 0; j < row.size(); ++j)
            into[i] += (more[j] - less[j]) / 2e-5 * d[static_cast<size_t>(r * s.D) + j];
        }
        std::copy(into.begin(), into.end(), d.begin() + r * s.D);
      }
    };
    home(want.dq, [&](Index h, Index t, Index d) { return c.q_at(0, h, t, d); }, 600, 150);
    home(want.dk, [&](Index h, Index t, Index d) { return c.k_at(0, h, t, d); }, 600, 300);
    check_gradients(c, gradients("routing-transformer:cluster_size=300,scale=0.3", mu.input(c, true), dout), want);
  }
}

TEST_CASE("routing-transformer's gradients: what attend() gave is enough, and threads change no bit") {
  const Case c({1, 4, 2, 300, 300, 16, 16});
  const Mu mu(c, 6);
  const Sample dout = random_dout(c.size);
  for (const char* call :
       {"routing-transformer:cluster_size=70", "routing-transformer:cluster_size=70,shared_qk=true"}) {
    AttendGradients first;
    for (const int n : {1, 2, 3}) {
      const UseThreads threads(n);
      AttendOutput forward;
      AttendGradients got = attend_backward(MechanismCall::parse(call), mu.input(c, true), dout.view(), &forward);
      CHECK(forward.lse.size() == 0);
      const AttendGradients again = attend_backward(MechanismCall::parse(call), mu.input(c, true), dout.view(),
                                                    forward.o.view(), forward.lse.view());
      if (n == 1) first = std::move(got);
      for (const AttendGradients* other : std::initializer_list<const AttendGradients*>{n == 1 ? &first : &got, &again})
        for (const auto& [a, b] :
             {std::pair(&other->dq, &first.dq), std::pair(&other->dk, &first.dk), std::pair(&other->dv, &first.dv)})
          CHECK(std::memcmp(a->data(), b->data(), static_cast<size_t>(a->bytes())) == 0);
    }
  }
}
