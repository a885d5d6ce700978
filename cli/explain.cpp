// heed explain: one mechanism in a page.

#include <fmt/format.h>

#include <memory>

#include "cli/commands.h"
#include "cli/describe.h"
#include "cli/terminal.h"

namespace heed::cli {
namespace {

std::string indented(const std::string& text) {
  std::string out = "  ";
  for (char c : text) {
    out += c;
    if (c == '\n') out += "  ";
  }
  return out + "\n";
}

std::string range_text(const ParamSpec& p) {
  if (!p.choices.empty()) return fmt::format("{}", fmt::join(p.choices, " | "));
  if (p.kind == ParamKind::boolean) return "true | false";
  const bool low = p.least > -1e299, high = p.most < 1e299;
  if (low && high) return fmt::format("{}{} … {}", p.above_least ? "above " : "", p.least, p.most);
  if (low) return fmt::format("{} {}", p.above_least ? ">" : ">=", p.least);
  if (high) return fmt::format("<= {}", p.most);
  return kind_name(p.kind);
}

std::string training_sentence(Training training) {
  switch (training) {
    case Training::none: return "none: works on any trained model";
    case Training::continued: return "meant for models trained or tuned with it; runs on others, and loses something";
    case Training::required: return "needs a model that was trained with it";
  }
  return "?";
}

std::string causality_sentence(Causality causality) {
  switch (causality) {
    case Causality::either: return "as --causal says";
    case Causality::implied: return "always, by its definition";
    case Causality::refused: return "never: --causal is an error";
  }
  return "?";
}

void explain(const std::string& name) {
  const Mechanism& m = find_mechanism(name);
  const auto section = [](const char* title, const std::string& body) {
    print("\n" + toned(title, Tone::bold) + "\n" + body);
  };
  print(toned(m.name, Tone::bold) + ": " + m.title + "\n");
  print(fmt::format("  {}, {}{}\n", m.paper, m.year,
                    arxiv_number(m).empty() ? "" : "  https://arxiv.org/abs/" + arxiv_number(m)));
  section("Idea", indented(m.idea));
  section("Equations", indented(m.equations));

  std::vector<std::vector<Cell>> rows{{{"  parameter"}, {"default"}, {"may be"}, {"what it is"}}};
  for (const ParamSpec& p : m.params)
    rows.push_back({{"  " + p.name},
                    {p.required           ? "(required)"
                     : p.fallback.empty() ? "–"
                                          : p.fallback},
                    {range_text(p)},
                    {p.help}});
  if (m.params.empty()) section("Parameters", "  none\n");
  else print("\n" + table(rows, 4));

  if (!m.extras.empty()) {
    std::vector<std::vector<Cell>> extras{{{"  extra tensor"}, {"shape"}, {""}, {"what it is"}}};
    for (const ExtraSpec& e : m.extras)
      extras.push_back({{"  " + e.name},
                        {fmt::format("[{}]", fmt::join(e.axes, ", "))},
                        {e.required ? "required" : "optional"},
                        {e.help}});
    print("\n" + table(extras, 4));
  }
  section("Cost", indented(m.cost));
  section("Stages", indented(m.stage));
  section("Training", indented(training_sentence(m.training)));
  section("Causal", indented(causality_sentence(m.causality) + (m.square ? "; as many queries as keys" : "")));
  section("On models",
          indented(m.not_on_models.empty() ? "yes: heed run and heed compare take it" : "no: " + m.not_on_models));
}

}  // namespace

void add_explain(CLI::App& app, Job& job) {
  CLI::App* command = app.add_subcommand("explain", "One mechanism: its idea, equations, parameters, cost");
  const auto name = std::make_shared<std::string>();
  command->add_option("NAME", *name, "A mechanism of heed list")->required();
  command->callback([&job, name] { job = [name] { explain(*name); }; });
  command->footer("Example:\n  heed explain moba");
}

}  // namespace heed::cli
