// The attention kernel of every instruction set that this machine has, against f64.
#include <cmath>
#include <set>

#include "support/naive.h"
#include "support/tables.h"

using namespace heed;
using namespace heed::test;

namespace {

// What a kernel multiplies, and what its panels hold.
template <class ProductType, class StoredType>
struct Kind {
  using Product = ProductType;
  using Stored = StoredType;
};

/// Calls body(table, Kind{}) with every kind of attention that a table has.
template <class Body>
void for_all(Body body) {
  for_each_table([&](const Kernels& k) {
    body(k, Kind<float, float>{});
    body(k, Kind<float, std::int8_t>{});
    CHECK((k.attend_wide_bf16 == nullptr) == k.bf16_dot);
    if (k.bf16_dot) body(k, Kind<bf16, bf16>{});
    else body(k, Kind<float, bf16>{});
  });
}

// One attention task with its own memory.
template <class K>
struct Bench {
  using T = typename K::Product;
  using Stored = typename K::Stored;
  static constexpr bool coarse = sizeof(T) == 2, paired = sizeof(Stored) == 2, whole = sizeof(Stored) == 1;
  const Kernels& kernel;
  Index d, dv, dp, dvp, block_rows, panels;
  std::vector<float> q, k, v;  // as numbers: [block_rows, d], [columns, d], [columns, dv]
  std::vector<T> q_packed;
  std::vector<Stored> k_packed, v_packed;
  std::vector<float> m, l, acc, key_scale, value_scale;

  Bench(const Kernels& table, Index features, Index value_features, Index rows, Index panel_count, double amplitude = 1)
      : kernel(table), d(features), dv(value_features), dp(paired ? up_to(features, table.key_step) : features),
        dvp(up_to(value_features, 16)), block_rows(rows), panels(panel_count) {
    const Index columns = panels * 64;
    q = normals(rows * d, coarse);
    k = normals(columns * d, paired);
    v = normals(columns * dv, paired);
    for (float& x : q) x = static_cast<float>(coarse ? nearest_bf16(x * amplitude) : x * amplitude);
    std::vector<float> k_whole = k, v_whole = v;
    if (whole) {
      key_scale = make_whole(k, k_whole, d);
      value_scale = make_whole(v, v_whole, dv);
    }
    q_packed.assign(static_cast<size_t>(rows * dp), T{});
    k_packed.assign(static_cast<size_t>(panels * 64 * dp), Stored{});
    v_packed.assign(static_cast<size_t>(columns * dvp), Stored{});
    for (Index i = 0; i < rows; ++i)
      for (Index f = 0; f < d; ++f) put(q_packed, i * dp + f, q[static_cast<size_t>(i * d + f)]);
    for (Index j = 0; j < columns; ++j) {
      const Index p = j / 64, c = j % 64;
      for (Index f = 0; f < d; ++f)
        put(k_packed, paired ? ((p * dp / 2 + f / 2) * 64 + c) * 2 + f % 2 : (p * dp + f) * 64 + c,
            k_whole[static_cast<size_t>(j * d + f)]);
      for (Index e = 0; e < dv; ++e)
        put(v_packed, paired ? (j / 2 * dvp + e) * 2 + j % 2 : j * dvp + e, v_whole[static_cast<size_t>(j * dv + e)]);
    }
    m.assign(static_cast<size_t>(rows), -inf);
    l.assign(static_cast<size_t>(rows), 0);
    acc.assign(static_cast<size_t>(rows * dvp), 0);
  }

  // Whole numbers of random size, and what they stand for: times a scale of the row of `width`, which is returned.
  static std::vector<float> make_whole(std::vector<float>& x, std::vector<float>& whole_numbers, Index width) {
    std::vector<float> scales;
    for (size_t i = 0; i < x.size(); ++i) {
      if (i % static_cast<size_t>(width) == 0) scales.push_back(std::fabs(normal()) / 60);
      whole_numbers[i] = std::fmax(-127.0f, std::fmin(127.0f, std::nearbyint(x[i] * 50)));
      x[i] = whole_numbers[i] * scales.back();
    }
    return scales;
  }

  PanelTask task() {
    PanelTask t;
    t.rows = block_rows;
    t.q = q_packed.data();
    t.m = m.data(), t.l = l.data(), t.acc = acc.data();
    t.layout = {
        paired ? DType::bf16 : whole ? DType::i8 : DType::f32, d, dv, dp, dvp, coarse ? DType::bf16 : DType::f32};
    if (whole) t.key_scale = key_scale.data(), t.value_scale = value_scale.data();
    t.k = k_packed.data(), t.v = v_packed.data();
    t.panels = panels;
    t.scale = static_cast<float>(1 / std::sqrt(static_cast<double>(d)));
    return t;
  }
  void run(const PanelTask& t) {
    if constexpr (coarse) kernel.attend_bf16(t);
    else if constexpr (paired) kernel.attend_wide_bf16(t);
    else if constexpr (whole) kernel.attend_wide_i8(t);
    else kernel.attend_f32(t);
  }

  /// score(row, column) = -infinity where the pair does not exist.
  using Score = std::function<double(Index row, Index column, double product)>;
  void check(const Score& score) const {
    const double tolerance = coarse ? 1e-2 : 2e-5;
    double worst = 0, worst_lse = 0, largest = 0;
    std::vector<double> want(static_cast<size_t>(dv));
    for (Index i = 0; i < block_rows; ++i) {
      std::vector<double> s(static_cast<size_t>(panels * 64));
      double top = -INFINITY, sum = 0;
      for (Index j = 0; j < panels * 64; ++j) {
        double x = 0;
        for (Index f = 0; f < d; ++f)
          x += double(q[static_cast<size_t>(i * d + f)]) * k[static_cast<size_t>(j * d + f)];
        s[static_cast<size_t>(j)] = score(i, j, x);
        top = std::max(top, s[static_cast<size_t>(j)]);
      }
      const float mi = m[static_cast<size_t>(i)], li = l[static_cast<size_t>(i)];
      if (top == -INFINITY) {
        CHECK(mi == -inf);
        CHECK(li == 0);
        for (Index e = 0; e < dvp; ++e) CHECK(acc[static_cast<size_t>(i * dvp + e)] == 0);
        continue;
      }
      std::fill(want.begin(), want.end(), 0);
      for (Index j = 0; j < panels * 64; ++j) {
        const double p = std::exp(s[static_cast<size_t>(j)] - top);
        sum += p;
        for (Index e = 0; e < dv; ++e) want[static_cast<size_t>(e)] += p * v[static_cast<size_t>(j * dv + e)];
      }
      const double lse = mi * std::log(2.0) + std::log(double(li)), want_lse = top + std::log(sum);
      worst_lse =
          std::max(worst_lse, std::isnan(lse) ? 1e9 : std::fabs(lse - want_lse) / std::max(1.0, std::fabs(want_lse)));
      for (Index e = 0; e < dv; ++e) {
        const double w = want[static_cast<size_t>(e)] / sum, got = double(acc[static_cast<size_t>(i * dvp + e)]) / li;
        largest = std::max(largest, std::fabs(w));
        worst = std::max(worst, std::isnan(got) ? 1e9 : std::fabs(got - w));
      }
    }
    CHECK_MESSAGE(worst <= tolerance * largest, kernel.name, coarse ? " bf16" : " f32", " stored in ", sizeof(Stored),
                  " bytes, d ", d, " dv ", dv, " rows ", block_rows, " panels ", panels, ": o off by ", worst, " of ",
                  largest);
    CHECK_MESSAGE(worst_lse <= (coarse ? 1e-4 : 2e-5), kernel.name, " lse off by ", worst_lse);
  }
};

}  // namespace

TEST_CASE("the instruction sets are distinct and the default is one of them") {
  const auto names = available_isas();
  REQUIRE(!names.empty());
  CHECK(std::set<std::string>(names.begin(), names.end()).size() == names.size());
  CHECK(std::find(names.begin(), names.end(), "portable") != names.end());
  CHECK(std::find(names.begin(), names.end(), kernels().name) != names.end());
  const std::string before = kernels().name;
  CHECK_THROWS_AS(select_isa("sse1"), UsageError);
  CHECK(kernels().name == before);
  for (const std::string& name : names) {
    const UseIsa use(name);
    CHECK(kernels().name == name);
  }
  CHECK(kernels().name == before);
}

TEST_CASE("attend: plain scores over any sizes") {
  for_all([](const Kernels& k, auto kind) {
    using B = Bench<decltype(kind)>;
    for (const Index d : {1, 7, 16, 33, 64, 80, 128, 256, 512})
      for (const Index rows : {1, 5, 6, 7, 33, 48}) {
        const Index dv = d == 64 ? 64 : (d * 5 + rows) % 90 + 1, panels = (d + rows) % 4 + 1;
        B b(k, d, dv, rows, panels);
        b.run(b.task());
        const double scale = b.task().scale;
        b.check([&](Index, Index, double x) { return x * scale; });
      }
  });
}

TEST_CASE("attend: masks, row lists and rows that see nothing") {
  for_all([](const Kernels& k, auto kind) {
    using B = Bench<decltype(kind)>;
    for (const Index rows : {1, 4, 13, 40})
      for (const Index panels : {1, 2, 3, 4})
        for (const int pattern : {0, 1, 2, 3, 4, 5}) {
          B b(k, 24, 20, 2 * rows + 3, panels);
          // The task's rows are every other one of the block, from row 1 on; the rest keep their state.
          std::vector<std::int32_t> list;
          for (Index i = 0; i < rows; ++i) list.push_back(static_cast<std::int32_t>(2 * i + 1));
          std::vector<std::uint64_t> words(static_cast<size_t>(rows * 4), ~std::uint64_t{0});
          for (Index r = 0; r < rows; ++r)
            for (Index p = 0; p < panels; ++p) {
              std::uint64_t w = random_bits() & random_bits();
              if (pattern == 1) w = r % 3 == 0 ? 0 : p == 0 ? 0 : w;  // empty rows, empty first panel
              if (pattern == 2) w = p == panels - 1 ? std::uint64_t{1} << (r % 64) : 0;  // one bit at the end
              if (pattern == 3) w = ~std::uint64_t{0};  // a mask that hides nothing
              if (pattern == 4) w = ~std::uint64_t{0} >> (p == panels - 1 ? 32 : 0);  // half a panel for nobody
              if (pattern == 5) w = ~std::uint64_t{0} << (p == 0 ? 32 : 0);
              words[static_cast<size_t>(r * 4 + p)] = w;
            }
          PanelTask t = b.task();
          t.rows = rows;
          t.row_list = list.data();
          t.words = words.data();
          // Hidden columns may hold anything.
          b.run(t);
          b.check([&](Index row, Index column, double x) -> double {
            if (row % 2 == 0 || row / 2 >= rows) return -INFINITY;
            const std::uint64_t w = words[static_cast<size_t>(row / 2 * 4 + column / 64)];
            return ((w >> (column % 64)) & 1) != 0 ? x * t.scale : -INFINITY;
          });
        }
  });
}

TEST_CASE("attend: first_row, and one call after another") {
  for_all([](const Kernels& k, auto kind) {
    using B = Bench<decltype(kind)>;
    B b(k, 48, 40, 20, 4, 6.0);
    // Panel by panel, rows 3 … 16 only; large scores, so the maximum moves between calls.
    for (Index p = 0; p < 4; ++p) {
      PanelTask t = b.task();
      t.first_row = 3, t.rows = 14, t.panels = 1;
      t.k = b.k_packed.data() + p * 64 * b.dp;
      t.v = b.v_packed.data() + p * 64 * b.dvp;
      if (B::whole) t.key_scale += p * 64, t.value_scale += p * 64;
      b.run(t);
    }
    const double scale = b.task().scale;
    b.check([&](Index row, Index, double x) { return row >= 3 && row < 17 ? x * scale : -INFINITY; });
  });
}

TEST_CASE("attend: scores that rise and fall by far") {
  for_all([](const Kernels& k, auto kind) {
    using B = Bench<decltype(kind)>;
    for (const Index rows : {3, 32, 70})
      for (const int pattern : {0, 1, 2, 3, 4}) {
        B b(k, 64, 48, rows, 4, 3);
        // What each row's panels are lifted by: some steps fit a weight's range, some do not.
        const auto lift = [&](Index row, Index panel) -> double {
          const double step = row % 2 == 0 ? 30 : 90;
          switch (pattern) {
            case 0: return step * (static_cast<double>(panel) - 1.5);
            case 1: return step * (1.5 - static_cast<double>(panel));
            case 2: return panel % 2 == 0 ? 0 : step;
            case 3: return panel == 0 ? -INFINITY : 100 * (static_cast<double>(panel) - 2);
            default: return panel < row % 4 ? -INFINITY : 50 * (static_cast<double>((row + panel) % 5) - 2);
          }
        };
        std::vector<float> add;
        for (Index i = 0; i < rows; ++i)
          for (Index j = 0; j < 256; ++j) add.push_back(static_cast<float>(lift(i, j / 64)));
        for (const Index at_once : {1, 2, 4}) {  // panels a call
          std::fill(b.m.begin(), b.m.end(), -inf), std::fill(b.l.begin(), b.l.end(), 0.0f);
          std::fill(b.acc.begin(), b.acc.end(), 0.0f);
          for (Index p = 0; p < 4; p += at_once) {
            PanelTask t = b.task();
            t.panels = at_once;
            t.k = b.k_packed.data() + p * 64 * b.dp, t.v = b.v_packed.data() + p * 64 * b.dvp;
            if (B::whole) t.key_scale += p * 64, t.value_scale += p * 64;
            t.add = add.data() + p * 64, t.add_stride = 256;
            b.run(t);
          }
          const double scale = b.task().scale;
          b.check([&](Index row, Index column, double x) { return x * scale + lift(row, column / 64); });
        }
      }
  });
}

TEST_CASE("attend: soft caps and addends") {
  for_all([](const Kernels& k, auto kind) {
    using B = Bench<decltype(kind)>;
    for (const Index rows : {1, 7, 20})
      for (const float softcap : {0.0f, 1.5f, 30.0f})
        for (const int addend : {0, 1, 2})
          for (const bool masked : {false, true}) {
            B b(k, 33, 17, rows, 3, 3.0);
            PanelTask t = b.task();
            t.softcap = softcap;
            std::vector<float> add = normals(rows * 3 * 64);
            for (size_t i = 0; i < add.size(); i += 5) add[i] = -inf;
            if (addend > 0) t.add = add.data(), t.add_stride = addend == 1 ? 0 : 3 * 64;
            std::vector<std::uint64_t> words(static_cast<size_t>(rows * 4));
            for (size_t i = 0; i < words.size(); ++i) words[i] = i % 4 == 0 ? 0 : random_bits();  // first panel hidden
            if (masked) t.words = words.data();
            b.run(t);
            b.check([&](Index row, Index column, double x) -> double {
              if (masked && ((words[static_cast<size_t>(row * 4 + column / 64)] >> (column % 64)) & 1) == 0)
                return -INFINITY;
              x *= t.scale;
              if (softcap > 0) x = softcap * std::tanh(x / softcap);
              if (addend > 0) x += add[static_cast<size_t>(row * t.add_stride + column)];
              return x;
            });
          }
  });
}

TEST_CASE("attend: gates spread the weights of landmarks over their groups") {
  struct Layout {
    Index begin;
    std::vector<Index> gates;
  };
  for_all([](const Kernels& k, auto kind) {
    using B = Bench<decltype(kind)>;
    for (const Layout& groups : {Layout{0, {50, 101, 152}}, Layout{13, {64, 130, 191}}, Layout{40, {95}},
                                 Layout{0, {191}}, Layout{64, {66, 70, 75, 81, 98, 113, 114}}, Layout{3, {64, 65}}})
      for (const int mask : {0, 1, 2})  // none; random tokens, all landmarks; random, landmarks too
        for (const float softcap : {0.0f, 2.0f}) {
          const Index rows = 9;
          B b(k, 32, 16, rows, 3);
          PanelTask t = b.task();
          t.softcap = softcap;
          std::uint64_t gates[3] = {};
          for (const Index gate : groups.gates) gates[gate / 64] |= std::uint64_t{1} << (gate % 64);
          t.gates = gates, t.gates_begin = groups.begin;
          std::vector<std::uint64_t> words(static_cast<size_t>(rows * 4));
          for (std::uint64_t& w : words) w = random_bits();
          for (size_t i = 0; mask == 1 && i < words.size(); ++i) words[i] |= i % 4 < 3 ? gates[i % 4] : 0;
          if (mask != 0) t.words = words.data();
          const auto sees = [&](Index row, Index c) {
            return mask == 0 || ((words[static_cast<size_t>(row * 4 + c / 64)] >> (c % 64)) & 1) != 0;
          };
          b.run(t);
          const auto score = [&](double x) {
            return softcap > 0 ? softcap * std::tanh(x * t.scale / softcap) : x * t.scale;
          };
          const auto product = [&](Index r, Index c) {
            double x = 0;
            for (Index f = 0; f < 32; ++f)
              x += double(b.q[static_cast<size_t>(r * 32 + f)]) * b.k[static_cast<size_t>(c * 32 + f)];
            return x;
          };
          // Per row and column: what is added to a score, -inf where it is not attended.
          std::vector<double> shift(static_cast<size_t>(rows * 192), -INFINITY);
          for (Index r = 0; r < rows; ++r) {
            Index begin = groups.begin;
            for (const Index gate : groups.gates) {
              double sum = 0;
              for (Index c = begin; c < gate; ++c) sum += sees(r, c) ? std::exp(score(product(r, c))) : 0;
              for (Index c = begin; c < gate && sees(r, gate); ++c)
                if (sees(r, c)) shift[static_cast<size_t>(r * 192 + c)] = score(product(r, gate)) - std::log(sum);
              begin = gate + 1;
            }
          }
          b.check([&](Index row, Index column, double x) -> double {
            return score(x) + shift[static_cast<size_t>(row * 192 + column)];
          });
        }
  });
}

TEST_CASE("attend: a row's bits do not depend on its company") {
  for_all([](const Kernels& k, auto kind) {
    using B = Bench<decltype(kind)>;
    B all(k, 40, 24, 29, 4);
    std::vector<std::uint64_t> words(29 * 4);
    for (std::uint64_t& w : words) w = random_bits();
    B one = all;
    PanelTask t = all.task();
    t.words = words.data();
    all.run(t);
    for (Index i = 0; i < 29; ++i) {
      PanelTask single = one.task();
      single.words = words.data() + i * 4, single.first_row = i, single.rows = 1;
      one.run(single);
    }
    CHECK(same_bits(all.m, one.m));
    CHECK(same_bits(all.l, one.l));
    CHECK(same_bits(all.acc, one.acc));
  });
}

TEST_CASE("attend: panels of bf16 give the bits that their numbers give as f32") {
  for_each_table([](const Kernels& k) {
    if (k.bf16_dot) return;
    for (const Index rows : {1, 2, 3, 4, 5, 6, 9, 48})
      for (const auto& [d, dv] : {std::pair<Index, Index>{64, 64}, {33, 20}, {128, 80}})
        for (const bool masked : {false, true}) {
          Bench<Kind<float, bf16>> narrow(k, d, dv, rows, 4);
          Bench<Kind<float, float>> wide(k, d, dv, rows, 4);
          std::vector<std::uint64_t> words(static_cast<size_t>(rows * 4));
          for (std::uint64_t& w : words) w = random_bits();
          wide.q_packed.assign(wide.q_packed.size(), 0);
          for (Index i = 0; i < rows; ++i)
            for (Index f = 0; f < d; ++f) put(wide.q_packed, i * wide.dp + f, narrow.q[static_cast<size_t>(i * d + f)]);
          for (Index j = 0; j < 256; ++j) {
            for (Index f = 0; f < d; ++f)
              put(wide.k_packed, (j / 64 * wide.dp + f) * 64 + j % 64, narrow.k[static_cast<size_t>(j * d + f)]);
            for (Index e = 0; e < dv; ++e)
              put(wide.v_packed, j * wide.dvp + e, narrow.v[static_cast<size_t>(j * dv + e)]);
          }
          PanelTask a = narrow.task(), b = wide.task();
          if (masked) a.words = b.words = words.data();
          narrow.run(a), wide.run(b);
          CHECK(same_bits(narrow.m, wide.m));
          CHECK(same_bits(narrow.l, wide.l));
          CHECK(same_bits(narrow.acc, wide.acc));
        }
  });
}
