// Grids cut into boxes, windows along an axis and the count of tile visits, against their definitions.
#include <doctest/doctest.h>

#include <random>

#include "heed/plan/gram.h"
#include "heed/plan/grid_tiles.h"
#include "support/grids.h"

using namespace heed;
using namespace heed::test;

TEST_CASE("boxes list every token once, near ones together") {
  std::mt19937 random(3);
  const auto between = [&](Index low, Index high) { return std::uniform_int_distribution<Index>(low, high)(random); };
  for (int round = 0; round < 200; ++round) {
    Extents length, dilation, size;
    for (size_t a = 0; a < 3; ++a)
      length[a] = between(1, 13), dilation[a] = between(1, std::min<Index>(4, length[a])), size[a] = between(1, 5);
    const Boxes boxes(length, dilation, size);
    const std::vector<std::int32_t> tokens = boxes.tokens(), slots = boxes.slots();
    REQUIRE(static_cast<Index>(tokens.size()) == volume(length));
    CHECK(static_cast<Index>(slots.size()) == boxes.count() * volume(size));
    std::vector<std::int32_t> sorted = tokens;
    std::sort(sorted.begin(), sorted.end());
    for (size_t t = 0; t < sorted.size(); ++t) REQUIRE(sorted[t] == static_cast<std::int32_t>(t));
    std::vector<std::int32_t> filled;
    for (const std::int32_t t : slots)
      if (t >= 0) filled.push_back(t);
    CHECK(filled == tokens);
    for (Index b = 0; b < boxes.count(); ++b) {
      CHECK(boxes.box(boxes.place(b)) == b);
      const Index begin = boxes.begins()[static_cast<size_t>(b)], end = boxes.begins()[static_cast<size_t>(b) + 1];
      CHECK(boxes.box_at(begin) == b);
      CHECK(boxes.box_at(end - 1) == b);
      const std::vector<Index> grid(length.begin(), length.end());
      const std::vector<Index> first = coordinates(grid, tokens[static_cast<size_t>(begin)]);
      for (Index i = begin; i < end; ++i) {
        const std::vector<Index> x = coordinates(grid, tokens[static_cast<size_t>(i)]);
        for (size_t a = 0; a < 3; ++a) {
          CHECK(x[a] % dilation[a] == first[a] % dilation[a]);
          CHECK((x[a] / dilation[a] - first[a] / dilation[a]) < size[a]);
          CHECK(x[a] >= first[a]);
        }
      }
    }
  }
}

TEST_CASE("windows, their sizes and their inverses for every length up to 21") {
  for (Index length = 2; length <= 21; ++length)
    for (Index k = 2; k <= length; ++k)
      for (Index s = 1; s <= k; ++s)
        for (const bool causal : {false, true}) {
          const AxisWindow w{.length = length, .kernel = k, .stride = s, .dilation = 1, .causal = causal};
          for (Index i = 0; i < length; ++i) {
            const Span keys = w.keys(i, length);
            CHECK(keys.begin <= i);
            CHECK(i < keys.end);
            if (!causal) CHECK(keys.size() == k);
            if (!causal && i / s == (i - 1) / s && i > 0) CHECK(keys == w.keys(i - 1, length));
            const Span queries = w.queries(i, length);
            for (Index j = 0; j < length; ++j) {
              const bool seen = axis_sees(length, k, s, 1, causal, i, j);
              const bool sees_i = axis_sees(length, k, s, 1, causal, j, i);
              if (seen != (keys.begin <= j && j < keys.end))
                FAIL_CHECK("keys of ", i, " in ", length, ", k ", k, ", s ", s);
              if (sees_i != (queries.begin <= j && j < queries.end))
                FAIL_CHECK("queries of ", i, " in ", length, ", k ", k, ", s ", s, ", causal ", causal);
            }
          }
        }
  const AxisWindow seven{.length = 10, .kernel = 7};
  CHECK(seven.keys(0, 10) == Span{0, 7});
  CHECK(seven.keys(3, 10) == Span{0, 7});
  CHECK(seven.keys(6, 10) == Span{3, 10});
  const AxisWindow six{.length = 20, .kernel = 6, .stride = 3, .causal = true};
  CHECK(six.keys(6, 20) == Span{3, 7});
  CHECK(six.keys(8, 20) == Span{3, 9});
}

namespace {

GridWindow windows(const std::vector<Index>& length, const std::vector<Index>& kernel,
                   const std::vector<Index>& stride) {
  GridWindow w;
  for (size_t a = 0; a < length.size(); ++a)
    w[3 - length.size() + a] = {.length = length[a], .kernel = kernel[a], .stride = stride[a]};
  return w;
}

}  // namespace

TEST_CASE("tile visits of known settings") {
  SUBCASE("video") {
    const TileShape tile{{4, 8, 8}, {2, 8, 8}};
    const std::vector<Index> length{30, 48, 80}, kernel{18, 24, 24};
    const TileVisits sliding = count_tile_visits(windows(length, kernel, {1, 1, 1}), tile);
    CHECK(sliding.dense == 432000);
    CHECK(sliding.visited == 82368);
    CHECK(sliding.speedup() == doctest::Approx(5.24).epsilon(1e-3));
    CHECK_FALSE(sliding.perfectly_sparse);
    CHECK(count_tile_visits(windows(length, kernel, {1, 1, 1}), tile, Tiling::moving).visited == 65208);
    const TileVisits strided = count_tile_visits(windows(length, kernel, {16, 8, 8}), tile);
    CHECK(strided.visited == 38880);
    CHECK(strided.perfectly_sparse);
    CHECK(strided.speedup() == doctest::Approx(strided.flop_bound));
  }
  SUBCASE("image") {
    const TileShape tile{{1, 16, 16}, {1, 16, 8}};
    const TileVisits sliding = count_tile_visits(windows({256, 256}, {80, 80}, {1, 1}), tile);
    CHECK(sliding.dense == 131072);
    CHECK(sliding.visited == 18564);
    const TileVisits strided = count_tile_visits(windows({256, 256}, {80, 80}, {16, 16}), tile);
    CHECK(strided.visited == 12800);
    CHECK(strided.speedup() == doctest::Approx(strided.flop_bound));
  }
  SUBCASE("line") {
    const TileShape tile{{1, 1, 256}, {1, 1, 128}};
    CHECK(count_tile_visits(windows({32768}, {2048}, {1}), tile).visited == 2288);
    CHECK(count_tile_visits(windows({32768}, {2048}, {256}), tile).visited == 2048);
  }
  SUBCASE("a larger stride is not always better") {
    const TileShape tile{{1, 8, 8}, {1, 8, 8}};
    const Index visits[] = {1156, 576, 576, 784};
    const Index strides[] = {1, 4, 8, 16};
    for (size_t i = 0; i < 4; ++i)
      CHECK(count_tile_visits(windows({64, 64}, {20, 20}, {strides[i], strides[i]}), tile).visited == visits[i]);
    for (const Index s : {1, 2, 4, 8})
      CHECK(count_tile_visits(windows({64, 64}, {16, 16}, {s, s}), tile).visited == 484);
    // Strides that do not divide the tiles cost more (the count of pairs below says so as well).
    CHECK(count_tile_visits(windows({64, 64}, {16, 16}, {3, 3}), tile).visited == 576);
    CHECK(count_tile_visits(windows({64, 64}, {16, 16}, {16, 16}), tile).visited == 256);
    CHECK(count_tile_visits(windows({64, 64}, {16, 16}, {8, 8}), tile, Tiling::moving).visited == 256);
    CHECK(count_line_tile_visits(windows({64, 64}, {16, 16}, {1, 1}), 64, 64) == 1024);
  }
}

TEST_CASE("tile visits against a count of pairs") {
  const Neighborhood third{{64}, {16}, {3}, {1}, {0}};
  std::vector<bool> visited(64);
  for (Index i = 0; i < 64; ++i)
    for (Index j = 0; j < 64; ++j)
      if (sees(third, i, j)) visited[static_cast<size_t>(i / 8 * 8 + j / 8)] = true;
  CHECK(std::count(visited.begin(), visited.end(), true) == 24);  // squared: 576
  std::mt19937 random(5);
  const auto between = [&](Index low, Index high) { return std::uniform_int_distribution<Index>(low, high)(random); };
  for (int round = 0; round < 60; ++round) {
    Neighborhood n;
    GridWindow window;
    for (size_t a = 0; a < 2; ++a) {
      const Index length = between(4, 14), d = between(1, length / 2), k = between(2, length / d), s = between(1, k),
                  c = between(0, 1);
      n.grid.push_back(length), n.dilation.push_back(d), n.kernel.push_back(k), n.stride.push_back(s),
          n.causal.push_back(c);
      window[a + 1] = {.length = length, .kernel = k, .stride = s, .dilation = d, .causal = c != 0};
    }
    const TileShape tile{{1, between(1, 4), between(1, 4)}, {1, between(1, 4), between(1, 4)}};
    // A tile is told by its group and its place in the group, on both axes.
    const auto tile_of = [&](Index token, const Extents& size) {
      const std::vector<Index> x = coordinates(n.grid, token);
      std::vector<Index> id;
      for (size_t a = 0; a < 2; ++a)
        id.push_back(x[a] % n.dilation[a]), id.push_back(x[a] / n.dilation[a] / size[a + 1]);
      return id;
    };
    struct Counts {
      std::vector<std::pair<std::vector<Index>, std::vector<Index>>> visited;
    } counts;
    bool masks = false;
    std::vector<std::vector<Index>> query_tile, key_tile;
    for (Index t = 0; t < n.tokens(); ++t)
      query_tile.push_back(tile_of(t, tile.query)), key_tile.push_back(tile_of(t, tile.key));
    for (Index i = 0; i < n.tokens(); ++i)
      for (Index j = 0; j < n.tokens(); ++j)
        if (sees(n, i, j))
          counts.visited.emplace_back(query_tile[static_cast<size_t>(i)], key_tile[static_cast<size_t>(j)]);
    std::sort(counts.visited.begin(), counts.visited.end());
    counts.visited.erase(std::unique(counts.visited.begin(), counts.visited.end()), counts.visited.end());
    for (Index i = 0; i < n.tokens(); ++i)
      for (Index j = 0; j < n.tokens(); ++j)
        masks = masks || (!sees(n, i, j) && std::binary_search(counts.visited.begin(), counts.visited.end(),
                                                               std::make_pair(query_tile[static_cast<size_t>(i)],
                                                                              key_tile[static_cast<size_t>(j)])));
    const TileVisits got = count_tile_visits(window, tile);
    CHECK(got.visited == static_cast<Index>(counts.visited.size()));
    // Whole tiles by this count may still have been missed where a causal window has one query.
    if (got.perfectly_sparse) CHECK_FALSE(masks);
    if (!masks && n.causal[0] == 0 && n.causal[1] == 0) CHECK(got.perfectly_sparse);
  }
}

TEST_CASE("permuted columns hold the same bits") {
  for (const DType arithmetic : {DType::f32, DType::bf16})
    for (const auto& [d, dv] : {std::pair<Index, Index>{33, 20}, {64, 64}}) {
      const Case c({2, 2, 2, 150, 150, d, dv}, DType::f32, arithmetic);
      KeyValues kv(4, d, dv, 150, arithmetic);
      kv.append(c.k.view(), c.v.view());
      std::vector<std::int32_t> order;
      for (Index t = 0; t < 150; ++t) {
        order.push_back(static_cast<std::int32_t>(t * 37 % 150));
        if (t % 40 == 7) order.push_back(-1);
      }
      const auto permuted = permute(kv, order);
      const Source& source = permuted->source;
      std::vector<float> key(static_cast<size_t>(d)), value(static_cast<size_t>(dv));
      const auto element = [&](const void* data, Index i) {
        return source.layout.dtype == DType::f32 ? static_cast<const float*>(data)[i]
                                                 : to_f32(static_cast<const bf16*>(data)[i]);
      };
      for (Index head = 0; head < 4; ++head) {
        const SourceView& view = source.views[static_cast<size_t>(head)];
        CHECK(view.columns == static_cast<Index>(order.size()));
        for (Index column = 0; column < view.columns; ++column) {
          const Index token = order[static_cast<size_t>(column)];
          if (token >= 0) kv.read_key(head, token, key.data()), kv.read_value(head, token, value.data());
          if (token >= 0) CHECK(view.position[column] == token);
          Index wrong = 0;
          for (Index i = 0; i < d; ++i)
            wrong += element(view.keys, source.layout.key_offset(column, i)) !=
                     (token < 0 ? 0 : key[static_cast<size_t>(i)]);
          for (Index e = 0; e < dv; ++e)
            wrong += element(view.values, source.layout.value_offset(column, e)) !=
                     (token < 0 ? 0 : value[static_cast<size_t>(e)]);
          CHECK(wrong == 0);
        }
      }
    }
}
