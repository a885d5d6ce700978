// Greedy search for the blocks of keys that score highest, down a binary tree over their order.
#pragma once

#include <algorithm>
#include <span>

#include "heed/base/scratch.h"
#include "heed/plan/select.h"

namespace heed {

/// Which of a node's blocks speaks for all of them.
enum class Representative : std::uint8_t { centre, first, last };

/// Cuts blocks [0, blocks) evenly into `beam` nodes, then halves every node and keeps the `beam`
/// halves whose representatives score highest (equal scores: the lower block), until every node is a
/// single block. Returns min(beam, blocks) blocks, ascending, in scratch memory. Scores at most
/// 2·beam·ceil(log2(blocks / beam)) blocks; one that already spoke for its parent is not scored again.
/// score(std::span<const std::int32_t> some_blocks, float* scores) must give finite numbers.
template <class Score>
std::span<const std::int32_t> beam_search(Index blocks, Index beam, Representative representative, Scratch& scratch,
                                          Score score) {
  struct Node {
    std::int32_t begin, size, speaker;
    float score;
  };
  beam = std::min(beam, blocks);
  const auto found = scratch.take<std::int32_t>(beam);
  const Scratch::Mark mark(scratch);
  const auto nodes = scratch.take<Node>(beam), halves = scratch.take<Node>(2 * beam);
  const auto fresh = scratch.take<std::int32_t>(2 * beam), speakers = scratch.take<std::int32_t>(2 * beam);
  const auto scores = scratch.take<float>(2 * beam);

  for (Index j = 0; j < beam; ++j) {
    const Index begin = blocks * j / beam, end = blocks * (j + 1) / beam;
    nodes[static_cast<size_t>(j)] = {static_cast<std::int32_t>(begin), static_cast<std::int32_t>(end - begin), -1, 0};
  }
  while (std::any_of(nodes.begin(), nodes.end(), [](const Node& n) { return n.size > 1; })) {
    size_t count = 0, unscored = 0;
    for (const Node& node : nodes) {
      const auto add = [&](std::int32_t begin, std::int32_t size) {
        if (size == 0) return;  // the left half of a single block
        const std::int32_t offset = representative == Representative::centre  ? size / 2
                                    : representative == Representative::first ? 0
                                                                              : size - 1;
        Node half{begin, size, begin + offset, node.score};
        if (half.speaker != node.speaker) {
          speakers[unscored] = half.speaker;
          fresh[unscored++] = static_cast<std::int32_t>(count);
        }
        halves[count++] = half;
      };
      const std::int32_t left = node.size / 2;
      add(node.begin, left);
      add(node.begin + left, node.size - left);
    }
    score(std::span<const std::int32_t>(speakers.first(unscored)), scores.data());
    for (size_t i = 0; i < unscored; ++i) halves[static_cast<size_t>(fresh[i])].score = scores[i];
    for (size_t i = 0; i < count; ++i) scores[i] = halves[i].score;
    // Halves ascend, and so do those chosen.
    choose_top(scores.data(), static_cast<Index>(count), beam, Ties::lower, found.data());
    for (size_t i = 0; i < nodes.size(); ++i) nodes[i] = halves[static_cast<size_t>(found[i])];
  }
  for (size_t i = 0; i < nodes.size(); ++i) found[i] = nodes[i].begin;
  return found;
}

}  // namespace heed
