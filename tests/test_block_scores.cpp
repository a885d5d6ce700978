// Softmax weights of blocks of keys against their definition, row by row in f64.
#include <cmath>

#include "heed/plan/block_scores.h"
#include "support/naive.h"
#include "support/tables.h"

using namespace heed;
using namespace heed::test;

namespace {

// p_ij of one query over keys 0 … end-1.
std::vector<double> softmax(const Case& c, Index b, Index h, Index t, Index end, double scale) {
  std::vector<double> p(static_cast<size_t>(end));
  double top = -INFINITY, sum = 0;
  for (Index j = 0; j < end; ++j) {
    double x = 0;
    for (Index d = 0; d < c.size.D; ++d) x += c.q_at(b, h, t, d) * c.k_at(b, c.kv_head(h), j, d);
    p[static_cast<size_t>(j)] = x * scale, top = std::max(top, x * scale);
  }
  for (double& x : p) x = std::exp(x - top), sum += x;
  for (double& x : p) x /= sum;
  return p;
}

struct Weights {
  std::vector<double> largest, mass;
};

Weights naive_weights(const Case& c, Index b, Index h, const std::vector<Index>& rows, bool causal, double scale,
                      Index block) {
  const auto blocks = static_cast<size_t>((c.size.M + block - 1) / block);
  Weights w{std::vector<double>(blocks, 0), std::vector<double>(blocks, 0)};
  for (const Index t : rows) {
    const std::vector<double> p = softmax(c, b, h, t, causal ? position(c, t) + 1 : c.size.M, scale);
    for (size_t j = 0; j < p.size(); ++j) {
      double& most = w.largest[j / static_cast<size_t>(block)];
      most = std::max(most, p[j]), w.mass[j / static_cast<size_t>(block)] += p[j];
    }
  }
  return w;
}

// The largest error, relative to what is at stake: the largest weight of all.
double worst(const std::vector<float>& got, const std::vector<double>& want) {
  double most = 0, error = 0;
  for (const double x : want) most = std::max(most, x);
  for (size_t i = 0; i < want.size(); ++i) {
    const double off = std::fabs(static_cast<double>(got[i]) - want[i]) / most;
    error = std::max(error, std::isnan(off) ? 1e9 : off);
  }
  return error;
}

KeyValues packed(const Case& c) {
  KeyValues kv(c.size.B * c.size.Hk, c.size.D, c.size.Dv, c.size.M, c.arithmetic);
  kv.append(c.k.view(), c.v.view());
  return kv;
}

std::vector<float> room(Index columns, Index block) {
  return std::vector<float>(static_cast<size_t>(up_to((columns + block - 1) / block, 16)), 0.0f);
}

RowBlock row_block(const Case& c, Index b, Index h, Index first, Index rows) {
  return {.b = b, .kv_head = c.kv_head(h), .head = h, .first = first, .rows = rows, .position0 = c.size.M - c.size.N};
}

}  // namespace

TEST_CASE("fold_blocks and weigh_blocks are a softmax over blocks, in pieces") {
  for_each_table([](const Kernels& k) {
    CAPTURE(k.name);
    for (const Index block : {1, 2, 3, 16, 50, 64, 300})
      for (const Index n : {1, 15, 64, 100, 577}) {
        CAPTURE(block);
        CAPTURE(n);
        const Index blocks = (n + block - 1) / block, room = up_to(blocks, 16);
        std::vector<float> s = normals(n), maximum(static_cast<size_t>(room), -inf), sum(static_cast<size_t>(room), 0);
        for (float& x : s) x *= 20;
        const float factor = n == 100 ? -0.7f : 0.7f;
        for (Index first = 0, piece; first < n; first += piece) {
          piece = std::min<Index>(n - first, 41);
          std::vector<float> copy(static_cast<size_t>(piece) + 16, std::numeric_limits<float>::quiet_NaN());
          std::copy_n(s.begin() + first, piece, copy.begin());
          k.fold_blocks(copy.data(), piece, first, block, factor, maximum.data(), block == 1 ? nullptr : sum.data());
        }
        std::vector<double> largest(static_cast<size_t>(blocks), 0), mass(largest);
        double top = -INFINITY, total = 0;
        for (const float x : s) top = std::max(top, static_cast<double>(factor) * static_cast<double>(x));
        for (const float x : s) total += std::exp2(static_cast<double>(factor) * static_cast<double>(x) - top);
        for (size_t j = 0; j < s.size(); ++j) {
          const double p = std::exp2(static_cast<double>(factor) * static_cast<double>(s[j]) - top) / total;
          const size_t b = j / static_cast<size_t>(block);
          largest[b] = std::max(largest[b], p), mass[b] += p;
        }
        // Folded into what stands there.
        std::vector<float> got_largest(static_cast<size_t>(room), 0), got_mass(static_cast<size_t>(room), 2);
        std::vector<float> again = maximum;
        got_largest[0] = 0.75f, largest[0] = std::max(largest[0], 0.75);
        for (double& x : mass) x += 2;
        k.weigh_blocks(maximum.data(), block == 1 ? nullptr : sum.data(), room, got_largest.data(), got_mass.data());
        CHECK(worst(got_largest, largest) < 4e-6);
        CHECK(worst(got_mass, mass) < 4e-6);
        for (Index b = blocks; b < room; ++b) {
          CHECK(got_largest[static_cast<size_t>(b)] == 0);
          CHECK(got_mass[static_cast<size_t>(b)] == 2);
        }
        k.weigh_blocks(again.data(), block == 1 ? nullptr : sum.data(), room, nullptr, nullptr);
      }
    std::vector<float> nothing(16, -inf), zeros(16, 0), largest(16, 0.5f), mass(16, 3);
    k.weigh_blocks(nothing.data(), zeros.data(), 16, largest.data(), mass.data());
    CHECK(largest == std::vector<float>(16, 0.5f));
    CHECK(mass == std::vector<float>(16, 3));
  });
}

TEST_CASE("block scores equal the softmax they stand for") {
  Scratch scratch;
  for (const std::string& isa : available_isas()) {
    const UseIsa use(isa);
    for (const DType arithmetic : {DType::f32, DType::bf16})
      for (const Sizes& s : {Sizes{1, 4, 2, 100, 333, 33, 16}, Sizes{2, 2, 2, 130, 130, 64, 16},
                             Sizes{1, 1, 1, 1, 1, 16, 16}, Sizes{1, 3, 1, 70, 600, 80, 16}}) {
        const Case c(s, DType::f32, arithmetic, Layout::scattered, 5, 1.5);
        const KeyValues kv = packed(c);
        const Queries queries(c.q.view(), arithmetic);
        for (const Index block : {1, 7, 64, 128, 1000})
          for (const bool causal : {true, false})
            for (const Index stride : {1, 4}) {
              CAPTURE(c.describe());
              CAPTURE(block);
              CAPTURE(stride);
              const Index b = s.B - 1, h = s.Hq - 1, first = s.N / 3;
              const BlockScores scores{ScoreKeys::of(kv, b * s.Hk + c.kv_head(h)), 0.3f, block};
              std::vector<float> largest = room(s.M, block), mass = largest;
              scores.weigh(queries, row_block(c, b, h, first, s.N - first), stride, causal, largest.data(), mass.data(),
                           scratch);
              std::vector<Index> rows;
              for (Index t = first; t < s.N; t += stride) rows.push_back(t);
              const Weights want = naive_weights(c, b, h, rows, causal, static_cast<double>(0.3f), block);
              CHECK(worst(largest, want.largest) < 2e-5);
              CHECK(worst(mass, want.mass) < 2e-5);
              double sum = 0;
              for (const float x : mass) sum += static_cast<double>(x);
              CHECK(sum == doctest::Approx(static_cast<double>(rows.size())).epsilon(1e-5));
            }
      }
  }
}

TEST_CASE("block scores: rows may come in several calls, some of them seeing nothing") {
  Scratch scratch;
  const Case c({1, 1, 1, 120, 900, 32, 16});
  const KeyValues kv = packed(c);
  std::vector<float> q(120 * 32);
  const Queries queries(c.q.view(), DType::f32);
  for (Index t = 0; t < 120; ++t) queries.read(0, 0, t, q.data() + t * 32);
  std::vector<std::int32_t> ends;
  for (std::int32_t t = 0; t < 120; ++t) ends.push_back(t % 5 == 0 ? 0 : t * 7 + 1);
  for (const Index block : {1, 50, 64}) {
    const BlockScores scores{ScoreKeys::of(kv, 0), 0.2f, block};
    std::vector<float> largest = room(900, block), mass = largest, parts = largest, parts_mass = mass;
    scores.weigh(q.data(), 120, ends.data(), largest.data(), mass.data(), scratch);
    for (const auto& [from, to] : {std::pair<Index, Index>{0, 1}, {1, 50}, {50, 51}, {51, 120}})
      scores.weigh(q.data() + from * 32, to - from, ends.data() + from, parts.data(), parts_mass.data(), scratch);
    CHECK(same_bits(largest, parts));
    CHECK(same_bits(mass, parts_mass));
    double sum = 0;
    for (const float x : mass) sum += static_cast<double>(x);
    CHECK(sum == doctest::Approx(96).epsilon(1e-5));
  }
}

TEST_CASE("the targets of a gate are block maxima, each row summing to one") {
  Scratch scratch;
  for (const std::string& isa : available_isas()) {
    const UseIsa use(isa);
    for (const Index n : {1, 63, 64, 65, 230, 401}) {
      const Case c({1, 4, 2, n, n, 32, 16}, DType::f32, DType::f32, Layout::packed, 3, 1.5);
      const KeyValues kv = packed(c);
      const Queries queries(c.q.view(), DType::f32);
      for (const Index block : {16, 64})
        for (Index h = 0; h < 4; ++h)
          for (Index a = 0; a * block < n; ++a) {
            const BlockScores scores{ScoreKeys::of(kv, c.kv_head(h)), 0.4f, block};
            std::vector<float> got(static_cast<size_t>(up_to(a + 1, 16)), 9);
            block_targets(scores, queries, row_block(c, 0, h, a * block, std::min(block, n - a * block)), got.data(),
                          scratch);
            std::vector<Index> rows;
            for (Index t = a * block; t < std::min(n, (a + 1) * block); ++t) rows.push_back(t);
            Weights want = naive_weights(c, 0, h, rows, true, static_cast<double>(0.4f), block);
            double sum = 0, got_sum = 0;
            for (const double x : want.largest) sum += x;
            want.largest.resize(static_cast<size_t>(a + 1));
            for (double& x : want.largest) x /= sum;
            CHECK(worst(got, want.largest) < 1e-5);
            for (Index b = 0; b <= a; ++b) got_sum += static_cast<double>(got[static_cast<size_t>(b)]);
            CHECK(got_sum == doctest::Approx(1).epsilon(1e-6));
          }
    }
  }
}

TEST_CASE("mean panels hold the mean of heads") {
  for (const std::string& isa : available_isas()) {
    const UseIsa use(isa);
    for (const DType arithmetic : {DType::f32, DType::bf16}) {
      const Case c({1, 6, 6, 1, 130, 19, 16}, DType::f32, arithmetic);
      const KeyValues kv = packed(c);
      const std::vector<float> panels = mean_head_panels(kv, 2, 3);
      for (const Index j : {0, 63, 64, 129})
        for (Index d = 0; d < 19; ++d) {
          const double want = (c.k_at(0, 2, j, d) + c.k_at(0, 3, j, d) + c.k_at(0, 4, j, d)) / 3;
          const float got = panels[static_cast<size_t>((j / 64 * 19 + d) * 64 + j % 64)];
          CHECK(std::fabs(static_cast<double>(got) - want) < 1e-6);
        }
    }
  }
}

TEST_CASE("with a stride every row has its own masses") {
  const Case c({1, 2, 1, 130, 200, 24, 16});
  const KeyValues kv = packed(c);
  const Queries queries(c.q.view(), DType::f32);
  const Index stride = 208;
  for (const Index block : {1, 9}) {
    BlockScores scores{ScoreKeys::of(kv, 0), 0.3f, block};
    scores.mass_stride = stride;
    std::vector<float> mass(static_cast<size_t>(60 * stride), 0.0f);
    scores.weigh(queries, row_block(c, 0, 1, 11, 60), 1, true, nullptr, mass.data(), thread_scratch());
    for (Index i = 0; i < 60; ++i) {
      const Weights want = naive_weights(c, 0, 1, {11 + i}, true, 0.3f, block);
      const auto row = mass.begin() + i * stride;
      CHECK(worst({row, row + stride}, want.mass) < 4e-6);
    }
  }
}
