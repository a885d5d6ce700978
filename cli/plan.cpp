// heed plan: who attends to whom, and what that costs, without attending.

#include <fmt/format.h>

#include <memory>

#include "cli/commands.h"
#include "cli/interrupt.h"
#include "cli/png.h"
#include "cli/tensors.h"
#include "cli/terminal.h"
#include "heed/base/file.h"
#include "heed/exec/picture.h"

namespace heed::cli {
namespace {

constexpr Index most_pixels = 1024, small_picture = 768, margin = 24;

struct Options {
  TensorOptions tensors;
  std::string png;
  Index batch = 0, head = 0;
  bool json = false;
};

struct Cost {
  Index tiles = 0, pairs = 0, dense_pairs = 0;
};

// Of all batches and heads. Heads that share tiles are counted once for each.
Cost cost_of(const Plan& plan) {
  const Problem& p = plan.problem;
  const Index step = plan.lanes == Lanes::per_query_head ? 1 : p.group();
  PairGrid all(p.position(0), p.N, p.M, 1);
  Cost cost;
  for (Index b = 0; b < p.B; ++b)
    for (Index head = 0; head < p.Hq; head += step) all.add(plan, b, head);
  walk(plan, [&](const RowBlock&, const std::vector<Tile>& tiles) { cost.tiles += static_cast<Index>(tiles.size()); });
  cost.tiles *= step, cost.pairs = all.pairs() * step, cost.dense_pairs = all.dense_pairs() * step;
  return cost;
}

void draw_plan(const Options& options) {
  const MechanismCall call = options.tensors.call();
  const OpenedTensors opened = options.tensors.open();
  const AttendInput& in = opened.input;
  const Plan plan = plan_of(call, in);
  const Problem& p = plan.problem;
  if (options.batch >= p.B) fail_usage("plan: --batch = {}, expected 0 … {}", options.batch, p.B - 1);
  if (options.head >= p.Hq) fail_usage("plan: --head = {}, expected 0 … {}", options.head, p.Hq - 1);

  const Picture picture = draw(plan, options.batch, options.head, most_pixels);
  const Cost cost = cost_of(plan);
  const double density = static_cast<double>(cost.pairs) / static_cast<double>(cost.dense_pairs);
  const Index per_pair = 2 * (p.D + p.Dv);
  {
    const HoldInterrupts hold;
    write_file(options.png, encode_png(picture, {.margin = margin, .least = small_picture}));
  }
  stop_if_interrupted();

  if (options.json) {
    print(json_text(
        {{"mechanism", call.name},
         {"params", params_json(call)},
         {"shapes", {{"q", in.q.shape}, {"k", in.k.shape}, {"v", in.v.shape}}},
         {"causal", p.causal},
         {"density", density},
         {"pairs", cost.pairs},
         {"dense_pairs", cost.dense_pairs},
         {"tiles", cost.tiles},
         {"flops", per_pair * cost.pairs},
         {"dense_flops", per_pair * cost.dense_pairs},
         {"picture", {{"batch", options.batch}, {"head", options.head}, {"tokens_per_pixel", picture.cell}}}}));
    return;
  }
  print(fmt::format("{}: {} queries, {} keys, {} heads{}\n", call.text(), count_text(p.N), count_text(p.M), p.B * p.Hq,
                    p.causal ? ", causal" : ""));
  print(fmt::format("  {:.4g} % of the pairs of dense attention: {} of {}, in {} tiles\n", 100 * density,
                    count_text(cost.pairs), count_text(cost.dense_pairs), count_text(cost.tiles)));
  print(fmt::format("  {:.4g} Gflop instead of {:.4g}; by its own account: {}\n",
                    static_cast<double>(per_pair * cost.pairs) / 1e9,
                    static_cast<double>(per_pair * cost.dense_pairs) / 1e9, find_mechanism(call.name).cost));
  print(fmt::format("  {}: head {}, one pixel for {} x {} tokens\n", options.png, options.head, picture.cell,
                    picture.cell));
}

}  // namespace

void add_plan(CLI::App& app, Job& job) {
  CLI::App* command = app.add_subcommand("plan", "A picture of who attends to whom, and the plan's cost");
  const auto options = std::make_shared<Options>();
  options->tensors.add(*command);
  command->add_option("--png", options->png, "Where to draw the picture: queries downwards, keys to the right")
      ->required()
      ->type_name("F");
  command->add_option("--head", options->head, "The query head to draw")
      ->check(whole_number(0))
      ->type_name("H")
      ->capture_default_str();
  command->add_option("--batch", options->batch, "The batch to draw")
      ->check(whole_number(0))
      ->type_name("B")
      ->capture_default_str();
  command->add_flag("--json", options->json, "Print density, pairs and operations as one object");
  command->callback([&job, options] { job = [options] { draw_plan(*options); }; });
  command->footer("Example:\n  heed plan in.safetensors --mechanism power:block=64 --png power.png");
}

}  // namespace heed::cli
