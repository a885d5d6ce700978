// Streaming attention: a few first tokens, which models use as attention sinks, and a window.
// "Efficient Streaming Language Models with Attention Sinks", arXiv:2309.17453.

#include "heed/mechanism/documents.h"
#include "heed/mechanism/registry.h"

namespace heed::mechanism {
namespace {

Plan plan_streaming(const Params& p, const Inputs& in) {
  const Index sink = p.integer("sink"), window = p.integer("window");
  Plan plan = make_plan(in.problem, in.q, *in.kv, in.rule, Lanes::per_kv_head);
  const Documents documents = apply_documents(in, plan);
  apply_key_mask(in, plan);

  // Sinks of other documents than the first stand anywhere.
  if (in.extra.empty())
    plan.reaches = [=](Index, Index position, Index begin, Index end) {
      return begin < sink || end > position - window + 1;
    };
  plan.emit = [=](const RowBlock& rows, Tiles& tiles) {
    const Index first = rows.position(0), last = rows.position(rows.rows - 1);
    // The window of query p is (p - window, p]; sinks inside it are counted there. Every document
    // has sinks of its own.
    const Index window_begin = std::max<Index>(0, first - window + 1);
    for (const Document& d : documents.meeting(rows.b, first, last + 1)) {
      const Index sinks_end = std::min({d.begin + sink, d.end, last - window + 1});
      tiles.add(Set::range(0, rows.rows), Set::range(d.begin, sinks_end), Mask::band(-Mask::unbounded, -window));
    }
    tiles.add(Set::range(0, rows.rows), Set::range(window_begin, last + 1), Mask::band(-window + 1, 0));
  };
  return plan;
}

}  // namespace

const Mechanism& streaming() {
  static const Mechanism m{
      .name = "streaming",
      .title = "Attention sinks and a sliding window",
      .paper = "arXiv:2309.17453",
      .year = 2023,
      .stage = "attend",
      .training = Training::none,
      .idea =
          "A query attends to the first `sink` tokens and to the last `window` ones, its own included. Trained models\n"
          "put much weight on their first tokens whatever they say; keeping them keeps the softmax in balance.",
      .equations = "visible(i) = { j <= i : j < sink or j > i - window }",
      .cost = "N·(sink + window)·(D + Dv) multiply-adds",
      .causality = Causality::implied,
      .square = false,
      .params = {integer("sink", 4, 0, "first tokens that every query sees"),
                 integer("window", 512, 1, "latest tokens that a query sees, its own included")},
      .extras = {document_spec(), key_mask_spec()},
      .not_on_models = "",
      .plan = plan_streaming,
  };
  return m;
}

}  // namespace heed::mechanism
