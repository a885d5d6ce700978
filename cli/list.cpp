// heed list: every mechanism, as a table, as JSON or for the documentation.

#include <fmt/format.h>

#include <memory>

#include "cli/commands.h"
#include "cli/describe.h"
#include "cli/options.h"
#include "cli/terminal.h"

namespace heed::cli {
namespace {

std::string defaults_of(const Mechanism& m) {
  std::string out;
  for (const ParamSpec& p : m.params)
    out += fmt::format("{}{}={}", out.empty() ? "" : " ", p.name,
                       p.required           ? "(required)"
                       : p.fallback.empty() ? "(none)"
                                            : p.fallback);
  return out;
}

Json param_json(const ParamSpec& p) {
  Json json{{"name", p.name}, {"kind", kind_name(p.kind)}, {"default", nullptr}, {"required", p.required}};
  if (!p.required && !p.fallback.empty()) json["default"] = p.fallback;
  if (p.least > -1e299) json[p.above_least ? "above" : "least"] = p.least;
  if (p.most < 1e299) json["most"] = p.most;
  if (!p.choices.empty()) json["choices"] = p.choices;
  json["help"] = p.help;
  return json;
}

Json mechanism_json(const Mechanism& m) {
  Json params = Json::array(), extras = Json::array();
  for (const ParamSpec& p : m.params) params.push_back(param_json(p));
  for (const ExtraSpec& e : m.extras)
    extras.push_back({{"name", e.name}, {"shape", e.axes}, {"required", e.required}, {"help", e.help}});
  return {{"name", m.name},
          {"title", m.title},
          {"paper", m.paper},
          {"arxiv", arxiv_number(m)},
          {"year", m.year},
          {"kind", "softmax"},
          {"stage", m.stage},
          {"training", training_name(m.training)},
          {"causal", causality_name(m.causality)},
          {"on_models", m.not_on_models.empty()},
          {"params", params},
          {"extras", extras}};
}

void print_json() {
  Json all = Json::array();
  for (const Mechanism* m : mechanisms()) all.push_back(mechanism_json(*m));
  print(json_text(all));
}

void print_markdown() {
  print("| name | title | paper | year | kind | training | causal | parameters (default) "
        "|\n|---|---|---|---|---|---|---|---|\n");
  for (const Mechanism* m : mechanisms()) {
    const std::string defaults = defaults_of(*m), arxiv = arxiv_number(*m);
    print(fmt::format("| `{}` | {} | {} | {} | softmax: {} | {} | {} | {} |\n", m->name, m->title,
                      arxiv.empty() ? m->paper : fmt::format("[{}](https://arxiv.org/abs/{})", m->paper, arxiv),
                      m->year, m->stage, training_name(m->training), causality_name(m->causality),
                      defaults.empty() ? "–" : "`" + defaults + "`"));
  }
}

void print_table() {
  std::vector<std::vector<Cell>> rows{{{"name"}, {"what it is"}, {"year"}, {"paper"}, {"kind"}, {"training"}}};
  for (const Mechanism* m : mechanisms())
    rows.push_back({{m->name, Tone::bold},
                    {m->title},
                    {fmt::format("{}", m->year)},
                    {m->paper},
                    {"softmax"},
                    {training_name(m->training)}});
  // A mechanism's parameters stand beneath it.
  const std::string lines = table(rows, rows.front().size());
  size_t at = lines.find('\n') + 1;
  print(lines.substr(0, at));
  for (const Mechanism* m : mechanisms()) {
    const size_t end = lines.find('\n', at) + 1;
    print(lines.substr(at, end - at));
    if (!m->params.empty()) print("  " + toned(defaults_of(*m), Tone::dim) + "\n");
    at = end;
  }
  print("\nheed explain NAME tells how one works and what its parameters mean.\n");
}

}  // namespace

void add_list(CLI::App& app, Job& job) {
  CLI::App* command = app.add_subcommand("list", "Every mechanism: name, paper, year, kind, training, parameters");
  struct Format {
    bool json = false, markdown = false;
  };
  const auto format = std::make_shared<Format>();
  CLI::Option* json = command->add_flag("--json", format->json, "An array of objects");
  command->add_flag("--markdown", format->markdown, "A table for documentation")->excludes(json);
  command->callback([&job, format] {
    job = [format] { format->json ? print_json() : format->markdown ? print_markdown() : print_table(); };
  });
}

}  // namespace heed::cli
