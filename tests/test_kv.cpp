// What keys and values are kept as: bytes with scales, and memory that is given back.

#include <doctest/doctest.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <any>
#include <cmath>
#include <limits>
#include <memory>
#include <numeric>

#include "heed/kernel/kernels.h"
#include "heed/plan/permute.h"
#include "support/naive.h"
#include "support/sparse_calls.h"

using namespace heed;
using namespace heed::test;

namespace {

TensorView tokens_of(const Sample& x, Index heads, Index from, Index to) {
  const TensorView v = x.view();
  return {v.at({0, 0, from, 0}), v.dtype, {heads, to - from, v.shape[3]}, {v.stride[1], v.stride[2], v.stride[3]}};
}

/// The keys and values of a case, one batch.
KeyValues stored(const Case& c, DType type, Index tokens) {
  KeyValues kv(c.size.Hk, c.size.D, c.size.Dv, c.size.M, type);
  kv.append(tokens_of(c.k, c.size.Hk, 0, tokens), tokens_of(c.v, c.size.Hk, 0, tokens));
  return kv;
}

std::vector<float> key(const KeyValues& kv, Index head, Index token) {
  std::vector<float> x(static_cast<size_t>(kv.layout().d));
  kv.read_key(head, token, x.data());
  return x;
}
std::vector<float> value(const KeyValues& kv, Index head, Index token) {
  std::vector<float> x(static_cast<size_t>(kv.layout().dv));
  kv.read_value(head, token, x.data());
  return x;
}

/// The same numbers as f32.
KeyValues widened(const KeyValues& kv, Index capacity) {
  const Index heads = kv.heads(), n = kv.size(), d = kv.layout().d, dv = kv.layout().dv;
  std::vector<float> k, v;
  for (Index head = 0; head < heads; ++head)
    for (Index t = 0; t < n; ++t) {
      const std::vector<float> x = key(kv, head, t), y = value(kv, head, t);
      k.insert(k.end(), x.begin(), x.end()), v.insert(v.end(), y.begin(), y.end());
    }
  KeyValues out(heads, d, dv, capacity, DType::f32);
  out.append({k.data(), DType::f32, {heads, n, d}}, {v.data(), DType::f32, {heads, n, dv}});
  return out;
}

/// A plan of `n` queries, the last of the keys held, as a model would ask for it.
Got run_on(const std::string& call, const Case& c, const KeyValues& kv, Index n) {
  const MechanismCall parsed = MechanismCall::parse(call);
  const Mechanism& m = find_mechanism(parsed.name);
  const auto& s = c.size;
  Inputs in;
  in.problem = {.B = 1, .Hq = s.Hq, .Hk = s.Hk, .N = n, .M = kv.size(), .D = s.D, .Dv = s.Dv, .causal = true};
  in.rule.scale = static_cast<float>(1 / std::sqrt(static_cast<double>(s.D)));
  TensorView q = c.q.view();
  q.data = static_cast<const std::byte*>(q.data) + (kv.size() - n) * q.stride[2] * size_of(q.dtype);
  q.shape[2] = n;
  in.q = Queries(q, kv.arithmetic());
  in.kv = &kv, in.prompt = kv.size();
  std::any memory;
  in.memory = &memory;
  return run(m.plan(Params(m.name, m.params, parsed.params), in));
}

Index resident_pages(const void* from, Index bytes) {
  const Index page = sysconf(_SC_PAGESIZE);
  const auto address =
      reinterpret_cast<std::uintptr_t>(from) / static_cast<std::uintptr_t>(page) * static_cast<std::uintptr_t>(page);
  std::vector<unsigned char> pages(static_cast<size_t>(ceil_div(bytes, page)));
  REQUIRE(mincore(reinterpret_cast<void*>(address), static_cast<size_t>(bytes), pages.data()) == 0);
  return std::count_if(pages.begin(), pages.end(), [](unsigned char p) { return (p & 1) != 0; });
}

}  // namespace

TEST_CASE("bytes and scales are within half a step of what was given, however it came") {
  for (const std::string& isa : available_isas()) {
    const UseIsa use(isa);
    Case c({1, 2, 2, 1, 211, 33, 20}, DType::f32, DType::f32, Layout::scattered);
    for (Index d = 0; d < 33; ++d) c.k.set(0, 1, 100, d, 0);
    c.v.set(0, 0, 7, 3, 500);  // one number much larger than the others of its row
    const KeyValues kv = stored(c, DType::i8, 211);
    CHECK(kv.arithmetic() == DType::f32);
    CHECK(kv.bytes() == 2 * 4 * 64 * (33 + 32 + 8));
    KeyValues parts(2, 33, 20, 211, DType::i8);
    for (const auto& [from, to] : {std::pair<Index, Index>{0, 1}, {1, 63}, {63, 66}, {66, 150}, {150, 211}})
      parts.append(tokens_of(c.k, 2, from, to), tokens_of(c.v, 2, from, to));
    Index wrong = 0;
    for (Index h = 0; h < 2; ++h)
      for (Index t = 0; t < 211; ++t) {
        const auto off = [](const std::vector<float>& got, const auto& want) {
          double most = 0;
          for (size_t i = 0; i < got.size(); ++i) most = std::max(most, std::fabs(want(static_cast<Index>(i))));
          const double step = most / 127;
          Index count = 0;
          for (size_t i = 0; i < got.size(); ++i)
            count += std::fabs(static_cast<double>(got[i]) - want(static_cast<Index>(i))) > step * 0.50001 ? 1 : 0;
          return count;
        };
        wrong += off(key(kv, h, t), [&, h, t](Index i) { return c.k.get(0, h, t, i); });
        wrong += off(value(kv, h, t), [&, h, t](Index i) { return c.v.get(0, h, t, i); });
        wrong += key(kv, h, t) != key(parts, h, t) || value(kv, h, t) != value(parts, h, t) ? 1 : 0;
      }
    CHECK(wrong == 0);
  }
}

TEST_CASE("what is made of keys as bytes is made of the numbers they stand for") {
  const Case c({1, 2, 2, 1, 190, 24, 20});
  const KeyValues kv = stored(c, DType::i8, 190);
  std::vector<std::int32_t> order;
  for (Index t = 0; t < 190; ++t) order.push_back(static_cast<std::int32_t>(t * 37 % 190));
  const auto permuted = permute(kv, order);
  const KeyRows rows = kv.key_rows();
  for (Index h = 0; h < 2; ++h) {
    std::vector<double> sum(24), sum_v(20), most(24, -INFINITY), least(24, INFINITY);
    for (Index t = 30; t < 170; ++t) {
      const std::vector<float> k = key(kv, h, t), v = value(kv, h, t);
      for (size_t i = 0; i < 24; ++i) {
        const double x = static_cast<double>(k[i]);
        sum[i] += x, most[i] = std::max(most[i], x), least[i] = std::min(least[i], x);
      }
      for (size_t i = 0; i < 20; ++i) sum_v[i] += static_cast<double>(v[i]);
      CHECK(std::equal(k.begin(), k.end(), reinterpret_cast<const float*>(rows.row(h, t))));
    }
    std::vector<float> got(24), got_v(20), high(24, -INFINITY), low(24, INFINITY), panel(24 * 64);
    kv.sum_keys(h, 30, 170, got.data()), kv.sum_values(h, 30, 170, got_v.data());
    kv.bound_keys(h, 30, 170, high.data(), low.data());
    kv.add_panel(h, 2, panel.data());
    for (size_t i = 0; i < 24; ++i) {
      CHECK(std::fabs(static_cast<double>(got[i]) - sum[i]) < 1e-4);
      CHECK(static_cast<double>(high[i]) == most[i]);
      CHECK(static_cast<double>(low[i]) == least[i]);
      CHECK(panel[i * 64 + 9] == key(kv, h, 2 * 64 + 9)[i]);
    }
    for (size_t i = 0; i < 20; ++i) CHECK(std::fabs(static_cast<double>(got_v[i]) - sum_v[i]) < 1e-4);
    const PanelLayout& layout = permuted->source.layout;
    CHECK(layout.dtype == DType::f32);
    for (Index column = 0; column < 190; ++column) {
      const SourceView& view = permuted->source.views[static_cast<size_t>(h)];
      const Index token = order[static_cast<size_t>(column)];
      CHECK(static_cast<const float*>(view.keys)[layout.key_offset(column, 5)] == key(kv, h, token)[5]);
      CHECK(static_cast<const float*>(view.values)[layout.value_offset(column, 6)] == value(kv, h, token)[6]);
    }
  }
}

TEST_CASE("scores of stored keys are products with the numbers they stand for") {
  for (const std::string& isa : available_isas()) {
    const UseIsa use(isa);
    for (const DType type : {DType::f32, DType::bf16, DType::i8}) {
      const Case c({1, 2, 2, 9, 150, 33, 1}, DType::bf16);
      const KeyValues kv = stored(c, type, 150);
      const PanelLayout& layout = kv.layout();
      const Queries queries(c.q.view(), kv.arithmetic());
      std::vector<std::byte> q(static_cast<size_t>(9 * layout.dp * 4));
      for (Index i = 0; i < 9; ++i)
        queries.read_packed(layout, 0, 1, i, q.data() + i * layout.dp * size_of(layout.product));
      std::vector<float> got(9 * 96, NAN);
      multiply_keys({layout, kv.keys(1), kv.key_scales(1)}, 64, 86, q.data(), 9, got.data(), 96);
      double worst = 0;
      for (Index i = 0; i < 9; ++i)
        for (Index j = 0; j < 86; ++j) {
          const std::vector<float> k = key(kv, 1, 64 + j);
          double want = 0;
          for (Index f = 0; f < 33; ++f) want += c.q.get(0, 1, i, f) * static_cast<double>(k[static_cast<size_t>(f)]);
          worst = std::max(worst, std::fabs(static_cast<double>(got[static_cast<size_t>(i * 96 + j)]) - want));
        }
      CHECK(worst < 1e-4);
    }
  }
}

TEST_CASE("attention over bytes equals its definition") {
  for (const std::string& isa : available_isas()) {
    const UseIsa use(isa);
    for (const Sizes& s : {Sizes{1, 4, 2, 1, 700, 64, 64}, Sizes{1, 6, 1, 3, 300, 40, 24},
                           Sizes{1, 2, 2, 200, 333, 64, 80}, Sizes{1, 1, 1, 1, 5000, 16, 16}}) {
      Case c(s);
      const KeyValues kv = stored(c, DType::i8, s.M);
      for (Index h = 0; h < s.Hk; ++h)  // the reference sees what the bytes stand for
        for (Index t = 0; t < s.M; ++t) {
          const std::vector<float> k = key(kv, h, t), v = value(kv, h, t);
          for (Index i = 0; i < s.D; ++i) c.k.set(0, h, t, i, static_cast<double>(k[static_cast<size_t>(i)]));
          for (Index i = 0; i < s.Dv; ++i) c.v.set(0, h, t, i, static_cast<double>(v[static_cast<size_t>(i)]));
        }
      Case shifted = c;  // run_on takes the queries that stand at the last positions
      shifted.q = Sample(DType::f32, 1, s.Hq, s.M, s.D, Layout::packed, 9);
      for (Index h = 0; h < s.Hq; ++h)
        for (Index t = 0; t < s.N; ++t)
          for (Index i = 0; i < s.D; ++i) shifted.q.set(0, h, s.M - s.N + t, i, c.q.get(0, h, t, i));
      CHECK_AGREES(run_on("dense", shifted, kv, s.N), naive_attention(c, dense_sees(c, true)), c);
    }
  }
}

// Scales belong to sums and weights instead of numbers, which only rounds otherwise.
TEST_CASE("every mechanism sees in bytes the numbers they stand for") {
  const Case c({1, 4, 2, 300, 300, 16, 16});
  for (const auto& [name, call] : sparse_calls()) {
    const Mechanism& m = find_mechanism(name);
    const KeyValues bytes = stored(c, DType::i8, 300), numbers = widened(bytes, 300);
    for (const Index n : {300, 70, 1}) {
      if (m.square && n == 70) continue;
      if (m.square && n == 1 &&
          (m.decodes == nullptr || !m.decodes(Params(m.name, m.params, MechanismCall::parse(call).params))))
        continue;
      CAPTURE(call);
      CAPTURE(n);
      const Got got = run_on(call, c, bytes, n), want = run_on(call, c, numbers, n);
      REQUIRE(got.o.size() == want.o.size());
      double worst = 0;
      for (size_t i = 0; i < got.o.size(); ++i)
        worst = std::max(worst, static_cast<double>(std::fabs(got.o[i] - want.o[i])));
      CHECK(worst < 1e-4);
    }
  }
}

TEST_CASE("released panels give their memory back, pages that they share with the last of them") {
  for (const auto& [type, d] : {std::pair<DType, Index>{DType::bf16, 12}, {DType::bf16, 64}, {DType::i8, 33}}) {
    constexpr Index panels = 40;
    const Case c({1, 2, 2, 1, panels * 64, d, d});
    KeyValues kv = stored(c, type, panels * 64);
    const Index whole = kv.bytes(), panel = kv.layout().panel_bytes(), keys = kv.layout().key_elements(panels * 64);
    const KeyValues before = stored(c, type, panels * 64);
    // Every other one, then those between them: of panels 4 … 35 of head 1.
    for (Index p = 4; p < 36; p += 2) kv.release(1, p, p + 1);
    CHECK(kv.released_panels() == 16);
    for (Index p = 7; p < 36; p += 2) kv.release(1, p, p + 1);
    kv.release(1, 5, 6), kv.release(1, 5, 6);
    CHECK(kv.released_panels() == 32);
    CHECK(kv.bytes() == whole - 32 * panel);
    CHECK(!kv.released(0, 5));
    CHECK(kv.released(1, 5));
    Index lost = 0, changed = 0;
    for (Index h = 0; h < 2; ++h)
      for (Index t = 0; t < panels * 64; ++t) {
        const bool same = key(kv, h, t) == key(before, h, t) && value(kv, h, t) == value(before, h, t);
        if (kv.released(h, t / 64)) lost += same ? 0 : 1;
        else changed += same ? 0 : 1;
      }
    CHECK(changed == 0);
    CHECK(lost > 24 * 64);
    const KeyValues fresh = stored(c, type, panels * 64);
    KeyValues gone = stored(c, type, panels * 64);
    gone.release(0, 0, panels);
    const Index bytes = keys * size_of(type), page = sysconf(_SC_PAGESIZE);
    CHECK(resident_pages(fresh.keys(0), bytes) >= bytes / page);
    CHECK(resident_pages(gone.keys(0), bytes) <= 1);  // shared with the other head
    // Forgotten and written anew.
    kv.truncate(0);
    CHECK(kv.released_panels() == 0);
    kv.append(tokens_of(c.k, 2, 0, panels * 64), tokens_of(c.v, 2, 0, panels * 64));
    CHECK(kv.bytes() == whole);
    CHECK(key(kv, 1, 400) == key(before, 1, 400));
    CHECK(value(kv, 1, 401) == value(before, 1, 401));
  }
}
