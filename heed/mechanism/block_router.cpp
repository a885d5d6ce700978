#include "heed/mechanism/block_router.h"

#include <algorithm>
#include <bit>
#include <memory>

#include "heed/plan/choice.h"
#include "heed/plan/summary.h"

namespace heed::mechanism {
namespace {

using Blocks = std::vector<std::vector<BlockRange>>;  // per batch

// Blocks of `block` tokens, starting anew at every document.
Blocks cut_blocks(const Documents& documents, Index block) {
  Blocks blocks;
  for (const std::vector<Document>& batch : documents.of) {
    std::vector<BlockRange>& list = blocks.emplace_back();
    for (const Document& d : batch)
      for (Index begin = d.begin; begin < d.end; begin += block)
        list.push_back({begin, std::min(begin + block, d.end)});
  }
  return blocks;
}

Summary mean_of_blocks(const BlockRouter& router, const Inputs& in, const Blocks& blocks) {
  // When causal, a block that is not complete is only ever a query's own, which is not scored: the sums
  // that a cache keeps from call to call will do.
  if (in.problem.causal && in.find("doc") == nullptr) return mean_blocks(*router.keys, in.problem, router.block);
  return mean_keys(*router.keys, in.problem, blocks);
}

}  // namespace

// Scoring takes N · M / block · D multiply-adds (half of it when causal); an emitted block holds O(rows · top_k)
// indices.
void route_blocks(const BlockRouter& router, const Inputs& in, const Documents& documents, Plan& plan) {
  const auto blocks = std::make_shared<Blocks>(cut_blocks(documents, router.block));
  Index most = 0;  // nobody can choose more blocks than there are
  for (const std::vector<BlockRange>& batch : *blocks) most = std::max(most, static_cast<Index>(batch.size()));

  const Problem problem = in.problem;
  const bool causal = problem.causal;
  const Index k = std::min(causal ? router.top_k - 1 : router.top_k, most);
  // Rows that chose a block share its panels: about rows · k / most of them. Fewer than a hundred cost more than rows
  // whose state leaves the second-level cache; but few heads leave some row blocks to share among threads.
  const Index sharing = 128 * most / std::max<Index>(1, k), spread = problem.B * problem.Hq * problem.N / 8;
  const Index rows_at_once = std::clamp<Index>(std::min(sharing, spread), 1024, 4096);
  plan.cut_rows_every(static_cast<Index>(std::bit_floor(static_cast<std::uint64_t>(rows_at_once))));
  const auto means = std::make_shared<Summary>(k == 0 ? Summary{} : mean_of_blocks(router, in, *blocks));
  plan.keep.push_back(blocks), plan.keep.push_back(means);

  plan.emit = [=, ties = router.ties, sink = router.sink, source = router.source, queries = in.q, blocks = blocks.get(),
               means = means.get()](const RowBlock& rows, Tiles& tiles) {
    const std::vector<BlockRange>& all = (*blocks)[static_cast<size_t>(rows.b)];
    // When causal, a query's own block is never scored, as its mean holds keys that the query must
    // not see; candidates are the past blocks of its document.
    Choice choice(rows, all, k, tiles.scratch());
    for (const OwnRows& own : choice.own_blocks()) {
      const Document& document = documents.at(rows.b, all[static_cast<size_t>(own.block)].begin);
      const Index first = choice.block_at(document.begin);
      const Index end = causal ? own.block : choice.block_at(document.end - 1) + 1;
      choice.choose(own, first, end, ties, [&](Index row, Index count, Index ranks, float* scores, Index stride) {
        score_rows(queries, rows, row, count, *means, rows.b * problem.Hk + rows.kv_head, ranks, scores, stride,
                   tiles.scratch());
      });
    }
    // Key-major: the rows that chose a block share its panels, and see all of it.
    for (Index b = 0; b < choice.end(); ++b) {
      const BlockRange& range = all[static_cast<size_t>(b)];
      tiles.add(Set::list(choice.rows_of(b)), Set::range(range.begin, range.end), Mask::full(), source);
      const Document& document = documents.at(rows.b, range.begin);
      const Index sinks_end = std::min(range.end, document.begin + sink);
      if (range.begin < sinks_end)
        tiles.add(Set::list(choice.rows_past_without(b, document.end)), Set::range(range.begin, sinks_end),
                  Mask::full(), source);
    }
    if (causal)
      for (const OwnRows& own : choice.own_blocks()) {
        const Index begin = all[static_cast<size_t>(own.block)].begin, end = rows.position(own.end - 1) + 1;
        tiles.add(Set::range(own.begin, own.end), Set::range(begin, end), Mask::causal(), source);
      }
  };
}

}  // namespace heed::mechanism
