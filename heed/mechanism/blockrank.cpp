// BlockRank: documents in a prompt see the instruction and themselves, the query at the end sees
// everything; how much its last tokens look at a document ranks it.
// "Scalable In-context Ranking with Generative Models", arXiv:2510.05396.

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>

#include "heed/base/threads.h"
#include "heed/mechanism/registry.h"
#include "heed/plan/row_scores.h"

namespace heed::mechanism {
namespace {

// Where segments begin, and N: instruction, documents, query section.
using Begins = std::vector<Index>;

Begins read_lengths(const Params& p, const Problem& problem, const TensorView& lengths) {
  if (p.integer("segment") > 0)
    fail_usage("blockrank: segment = {}, expected 0 beside the tensor seg_lens", p.integer("segment"));
  const Index segments = lengths.shape[0];
  if (segments < 3)
    fail("seg_lens: {} segments, expected at least 3: instruction, documents and query section", segments);
  Begins begins{0};
  for (Index s = 0; s < segments; ++s) {
    const Index length = *static_cast<const std::int32_t*>(lengths.at({s}));
    if (s == 0 && length < 0) fail("seg_lens: the instruction holds {} tokens, expected at least 0", length);
    if (s > 0 && length < 1 && s < segments - 1)
      fail("seg_lens: document {} holds {} tokens, expected at least 1", s - 1, length);
    if (s == segments - 1 && length < p.integer("signal_tokens"))
      fail("seg_lens: the query section holds {} tokens, expected at least signal_tokens = {}", length,
           p.integer("signal_tokens"));
    begins.push_back(begins.back() + length);
  }
  if (begins.back() != problem.N) fail("seg_lens: {} tokens in all, expected the {} of q", begins.back(), problem.N);
  return begins;
}

// Our addition, for prompts whose segments nobody names: they all have the same length, but for the last.
Begins read_segments(const Params& p, const Inputs& in) {
  const TensorView* lengths = in.find("seg_lens");
  if (lengths != nullptr) return read_lengths(p, in.problem, *lengths);
  const Index segment = p.integer("segment");
  if (segment == 0)
    fail("blockrank: tensor seg_lens is missing, expected [S], tokens of each segment, or segment >= 1");
  Begins begins;
  for (Index begin = 0; begin < in.problem.N; begin += segment) begins.push_back(begin);
  begins.push_back(in.problem.N);
  if (begins.size() < 4) return {0, 0, in.problem.N};  // no documents: all is query section
  return begins;
}

Plan plan_blockrank(const Params& p, const Inputs& in) {
  const auto begins = std::make_shared<const Begins>(read_segments(p, in));
  Plan plan = make_plan(in.problem, in.q, *in.kv, in.rule, Lanes::per_kv_head);
  plan.keep = {begins};
  // Row blocks end where segments do, with 256 rows or more; a long segment is cut by itself.
  plan.cuts = {0};
  for (const Index end : *begins) {
    while (end - plan.cuts.back() > 512) plan.cuts.push_back(plan.cuts.back() + 256);
    if (end - plan.cuts.back() >= 256 || end == in.problem.N) plan.cuts.push_back(end);
  }
  plan.emit = [begins = begins.get()](const RowBlock& rows, Tiles& tiles) {
    const Index instruction = (*begins)[1], query = (*begins)[begins->size() - 2];
    const Index first = rows.position(0), end = rows.position(rows.rows - 1) + 1;
    const auto ranks = [&](Index from, Index to) {  // of the rows between two positions
      return Set::range(std::max(from, first) - first, std::min(to, end) - first);
    };
    // The documents share the instruction's columns; each has its own beside them.
    tiles.add(ranks(0, instruction), Set::range(0, std::min(instruction, end)), Mask::causal());
    tiles.add(ranks(instruction, query), Set::range(0, instruction), Mask::full());
    auto next = std::upper_bound(begins->begin() + 1, begins->end() - 2, first);
    for (; next != begins->end() - 1; ++next) {
      const Index begin = *(next - 1);
      if (begin >= end) break;
      if (begin >= instruction) tiles.add(ranks(begin, *next), Set::range(begin, std::min(*next, end)), Mask::causal());
    }
    tiles.add(ranks(query, end), Set::range(0, end), Mask::causal());
  };
  return plan;
}

// S(c) = sum over j in c of the mean over heads and signal tokens of a softmax over document tokens alone.
void finish_blockrank(const Params& p, const Inputs& in, const Plan&, AttendOutput& out) {
  const Begins begins = read_segments(p, in);
  const Problem& problem = in.problem;
  const auto documents = static_cast<Index>(begins.size()) - 3;
  if (documents < 1) return;
  const Index first = begins[1], end = begins[begins.size() - 2];
  const Index signals = std::min(p.integer("signal_tokens"), problem.N - end);
  std::vector<double> mass(static_cast<size_t>(problem.B * problem.Hq * documents));  // [B, Hq, documents]
  parallel_for(problem.B * problem.Hq, [&](Index unit, int) {
    Scratch& scratch = thread_scratch();
    const Scratch::Mark mark(scratch);
    const Index stride = round_up(end, 64);
    float* scores = scratch.take<float>(signals * stride).data();
    score_keys(in.q, *in.kv, problem, unit / problem.Hq, unit % problem.Hq, problem.N - signals, signals, end, scores,
               stride);
    double* sums = mass.data() + unit * documents;
    const std::span<double> weight = scratch.take<double>(documents);
    for (Index t = 0; t < signals; ++t) {
      float* z = scores + t * stride;
      for (Index j = first; j < end; ++j) z[j] *= in.rule.scale;
      const double most = *std::max_element(z + first, z + end);
      double all = 0;
      for (Index c = 0; c < documents; ++c) {
        double& w = weight[static_cast<size_t>(c)] = 0;
        for (Index j = begins[static_cast<size_t>(c) + 1]; j < begins[static_cast<size_t>(c) + 2]; ++j)
          w += std::exp(static_cast<double>(z[j]) - most);
        all += w;
      }
      for (Index c = 0; c < documents; ++c) sums[c] += weight[static_cast<size_t>(c)] / all;
    }
  });
  Tensor scores(DType::f32, {problem.B, documents});
  for (Index b = 0; b < problem.B; ++b)
    for (Index c = 0; c < documents; ++c) {
      double sum = 0;
      for (Index h = 0; h < problem.Hq; ++h) sum += mass[static_cast<size_t>((b * problem.Hq + h) * documents + c)];
      scores.as<float>()[b * documents + c] = static_cast<float>(sum / static_cast<double>(problem.Hq * signals));
    }
  out.extra.emplace("scores", std::move(scores));
}

}  // namespace

const Mechanism& blockrank() {
  static const Mechanism m{
      .name = "blockrank",
      .title = "BlockRank: ranking in context",
      .paper = "arXiv:2510.05396",
      .year = 2025,
      .stage = "layout, attend, probe",
      .training = Training::continued,
      .idea =
          "A prompt to rank documents by has an instruction, the documents and a query section. A document sees the\n"
          "instruction and itself, so that cost grows linearly with their number and their order does not matter; the\n"
          "query section sees everything. Some middle layer's attention from its last tokens to each document is the\n"
          "document's score. Positions belong to whoever turns q and k: in training all documents begin at the same "
          "one\n"
          "and the query section at a fixed large one; a model that runs with it here has ordinary positions. There a\n"
          "prompt is cut into segments of equal length, an addition; the last of them is the query section.",
      .equations =
          "visible to i: j <= i, and j in the instruction, or j in the segment of i, or i in the query section\n"
          "a_tj = softmax over document tokens j of scale·<q_t, k_j>, t a signal token\n"
          "score(c) = sum over j in document c of the mean over heads and signal tokens of a_tj; they sum to 1",
      .cost = "(documents·(instruction + length / 2) + query section)·tokens of each·(D + Dv) multiply-adds: linear in "
              "documents",
      .causality = Causality::implied,
      .square = true,
      .params = {integer("signal_tokens", 2, 1, "last tokens, whose attention ranks the documents"),
                 integer("segment", 0, 0,
                         "tokens per segment where no tensor gives them: instruction, documents, and what is left "
                         "for the query section; fewer than three are dense; 0 = none")},
      .extras = {{"seg_lens", {DType::i32}, {"*"}, false, "[S], tokens of instruction, documents and query section"}},
      .not_on_models = "",
      .plan = plan_blockrank,
      .finish = finish_blockrank,
  };
  return m;
}

}  // namespace heed::mechanism
