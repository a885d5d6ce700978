// heed compare: one document under several mechanisms.

#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <memory>
#include <optional>

#include "cli/commands.h"
#include "cli/comparison.h"
#include "cli/interrupt.h"
#include "cli/models.h"
#include "cli/terminal.h"
#include "heed/base/file.h"
#include "heed/base/threads.h"
#include "heed/kernel/kernels.h"

namespace heed::cli {
namespace {

using model::Token;

// What is compared when nothing is named.
const std::vector<std::string> usual{"dense", "streaming:sink=4,window=512", "moba:block=64,top_k=8,sink=64",
                                     "power:block=64"};

constexpr Index picture_pixels = 320;  // of one side, for a whole document
constexpr Index answer_tokens = 8;     // more than a task ever adds to its prompt
constexpr Index copy_tokens = 500;     // more than the copy task adds to its gap

struct Options {
  ModelOptions model;
  std::string tasks = "perplexity", passkey_length, passkey_depths = "0.1,0.5,0.9", copy_gap = "1000", seeds = "0",
              json, html;
};

// The plans of a few heads, drawn while the document is read.
class PictureBook {
 public:
  PictureBook(const model::ModelInfo& info, const std::vector<model::MechanismUse>& uses, Index tokens)
      : seconds_(uses.size()) {
    for (size_t row = 0; row < uses.size(); ++row) {
      if (uses[row].phase == model::Phase::decode) continue;
      std::vector<Index> layers = uses[row].layers;
      if (layers.empty())
        for (Index i = 0; i < info.layers; ++i)
          if (!info.local[static_cast<size_t>(i)]) layers.push_back(i);
      if (layers.empty()) continue;
      // The first, the middle and the last layer, each with another head.
      const std::vector<std::pair<Index, Index>> places{
          {layers.front(), 0}, {layers[layers.size() / 2], info.heads / 2}, {layers.back(), info.heads - 1}};
      for (const auto& [layer, head] : places)
        if (std::none_of(pages_.begin(), pages_.end(),
                         [&, l = layer](const Page& p) { return p.row == row && p.layer == l; }))
          pages_.push_back({row, layer, head, PairGrid(0, tokens, tokens, picture_pixels)});
    }
  }

  void see(size_t row, Index layer, const Plan& plan) {
    const auto start = std::chrono::steady_clock::now();
    for (Page& page : pages_)
      if (page.row == row && page.layer == layer) page.grid.add(plan, 0, page.head);
    seconds_[row] += std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  }

  /// Seconds spent on drawing while this row's document was read, as part of its attention.
  double seconds(size_t row) const { return seconds_[row]; }

  std::vector<PlanPicture> pictures() const {
    std::vector<PlanPicture> list;
    list.reserve(pages_.size());
    for (const Page& p : pages_)
      list.push_back({p.row, p.layer, p.head, p.grid.picture(),
                      static_cast<double>(p.grid.pairs()) / static_cast<double>(p.grid.dense_pairs())});
    return list;
  }

 private:
  struct Page {
    size_t row;
    Index layer, head;
    PairGrid grid;
  };
  std::vector<Page> pages_;
  std::vector<double> seconds_;
};

model::CompareOptions asked(const Options& options) {
  model::CompareOptions o;
  o.perplexity = false;
  for (const std::string& task : comma_parts(options.tasks)) {
    if (task == "perplexity") o.perplexity = true;
    else if (task == "passkey") o.passkey = true;
    else if (task == "copy") o.copy = true;
    else fail_usage("--task: {}, expected some of perplexity, passkey, copy", task);
  }
  constexpr Index most = Index{1} << 30;
  if (!options.passkey_length.empty())
    o.passkey_lengths = whole_numbers("--passkey-length", options.passkey_length, 1, most);
  o.passkey_depths = real_numbers("--passkey-depths", options.passkey_depths, 0, 1);
  o.copy_gaps = whole_numbers("--copy-gap", options.copy_gap, 1, most);
  o.seeds.clear();
  for (Index seed : whole_numbers("--seeds", options.seeds, 0, std::numeric_limits<Index>::max()))
    o.seeds.push_back(static_cast<std::uint64_t>(seed));
  o.chunk = options.model.chunk;
  o.kv = dtype_named(options.model.kv);
  return o;
}

// The longest sequence that any part of the job holds; none may exceed the context.
Index longest(const model::CompareOptions& o, Index tokens, Index context) {
  Index most = tokens;
  const auto reach = [&](const char* option, Index value, Index needed) {
    if (needed > context)
      fail("{} = {}, expected at most {}: the context is {}", option, value, context - (needed - value), context);
    most = std::max(most, needed);
  };
  if (o.passkey)
    for (Index length : o.passkey_lengths) reach("--passkey-length", length, length + answer_tokens);
  if (o.copy)
    for (Index gap : o.copy_gaps) reach("--copy-gap", gap, gap + copy_tokens);
  return most;
}

void compare_models(const Options& options) {
  if (options.html == "-") fail_usage("--html: -, expected the name of a file");
  model::CompareOptions o = asked(options);
  const std::vector<MechanismCall> calls = options.model.mechanism.calls(usual);

  const OpenedModel opened(options.model);
  o.uses = options.model.uses(calls, opened.info());
  const std::string document = read_file(options.model.file);
  const std::vector<Token> tokens = opened.read(document);
  const Index count = static_cast<Index>(tokens.size());
  if (count < 2) fail("{}: holds {} tokens, expected at least 2", options.model.file, count);
  const Index held = longest(o, count, opened.context());

  // From here on files may be half written. They are opened first: a report that cannot be written
  // should be known before it is computed.
  const HoldInterrupts hold;
  std::optional<AtomicFile> json, html;
  if (!options.json.empty() && options.json != "-") json.emplace(options.json);
  if (!options.html.empty()) html.emplace(options.html);
  const Index hidden = o.perplexity ? count * opened.info().width * static_cast<Index>(sizeof(float)) : 0;
  const auto loaded = opened.load(held, hidden);
  stop_if_interrupted();

  ProgressLine progress;
  PictureBook book(opened.info(), o.uses, count);
  o.progress = [&](const std::string& mechanism, const std::string& step, Index done, Index total) {
    progress.show(fmt::format("{}: {}", mechanism, step), done, total);
    return interrupted() == 0;
  };
  if (html) o.observe = [&](size_t row, Index, Index layer, const Plan& plan) { book.see(row, layer, plan); };

  Comparison c{.machine = machine_name(),
               .isa = kernels().name,
               .dtype = options.model.dtype,
               .kv = options.model.dtype == "f32" && options.model.kv == "bf16" ? "f32" : options.model.kv,
               .model = options.model.path,
               .model_name = opened.info().name,
               .file = options.model.file,
               .layers = options.model.layers,
               .phase = options.model.phase,
               .threads = threads(),
               .tokens = count,
               .chunk = options.model.chunk,
               .perplexity = o.perplexity,
               .seeds = o.seeds,
               .rows = {},
               .pictures = {}};
  c.rows = model::compare(*loaded, tokens, document, o);
  progress.clear();
  if (html) {
    // Drawing is the report's work, not the mechanism's.
    for (size_t i = 0; i < c.rows.size(); ++i) {
      model::CompareRow& row = c.rows[i];
      row.prefill_s -= book.seconds(i), row.attention_s -= book.seconds(i);
      row.tokens_per_s = static_cast<double>(row.tokens) / row.prefill_s;
    }
    c.pictures = book.pictures();
    const std::string page = comparison_html(c);
    html->write(page.data(), page.size());
  }
  const std::string text = options.json.empty() ? "" : json_text(comparison_json(c));
  if (json) json->write(text.data(), text.size());
  stop_if_interrupted();
  if (html) html->commit();
  if (json) json->commit();
  print(options.json == "-" ? text : comparison_table(c));
}

}  // namespace

void add_compare(CLI::App& app, Job& job) {
  CLI::App* command = app.add_subcommand(
      "compare", "Read one document under several mechanisms: time, work, perplexity, what is forgotten");
  const auto options = std::make_shared<Options>();
  options->model.add(*command, true,
                     fmt::format("NAME or NAME:parameter=value,…; may be repeated [{}]", fmt::join(usual, " ")));
  command->get_option("--file")->required();
  command
      ->add_option("--task", options->tasks,
                   "Some of perplexity, passkey (is a key hidden in the text found?), copy (is a passage that occurs "
                   "twice recognised?)")
      ->type_name("T,…")
      ->capture_default_str();
  command
      ->add_option("--passkey-length", options->passkey_length,
                   "Tokens of the pass key prompt (default: 4000, at most --tokens)")
      ->type_name("N,…");
  command->add_option("--passkey-depths", options->passkey_depths, "How deep the key is hidden, 0 … 1")
      ->type_name("X,…")
      ->capture_default_str();
  command->add_option("--copy-gap", options->copy_gap, "Tokens between the two occurrences")
      ->type_name("N,…")
      ->capture_default_str();
  command->add_option("--seeds,--seed", options->seeds, "Seeds of keys and passages")
      ->type_name("N,…")
      ->capture_default_str();
  command
      ->add_option("--json", options->json,
                   "Write everything as JSON to this file (- for standard output, instead of the table)")
      ->type_name("F");
  command
      ->add_option("--html", options->html,
                   "Write a page with the table, charts and pictures of the plans to this file")
      ->type_name("F");
  command->callback([&job, options] { job = [options] { compare_models(*options); }; });
  command->footer(
      "Columns: seconds and tokens per second of the prefill, speed relative to dense, attention's share of that "
      "time,\n"
      "share of dense attention's pairs that were attended, perplexity and its difference from dense, peak memory\n"
      "without the weights, pass keys found.\n\n"
      "Examples:\n"
      "  heed compare model.gguf --file book.txt --tokens 8000\n"
      "  heed compare model.gguf --file book.txt --tokens 4000 --mechanism dense --mechanism moba:block=64,top_k=8 \\\n"
      "    --layers 5,11,17 --task perplexity,passkey --html report.html");
}

}  // namespace heed::cli
