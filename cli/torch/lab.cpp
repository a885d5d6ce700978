// heed lab: a paper's claim, measured again.

#include <ATen/Parallel.h>
#include <fmt/format.h>

#include <memory>
#include <optional>

#include "cli/charts.h"
#include "cli/interrupt.h"
#include "cli/options.h"
#include "cli/page.h"
#include "cli/terminal.h"
#include "cli/torch/commands.h"
#include "heed/base/file.h"
#include "heed/base/threads.h"
#include "lab/experiment.h"

namespace heed::cli {
namespace {

using lab::Experiment;
using lab::Report;

struct Options {
  std::string name, text, model, json, html;
  std::vector<std::string> settings;
};

void list_experiments() {
  std::vector<std::vector<Cell>> rows{{{"experiment", Tone::dim}, {"question", Tone::dim}}};
  for (const Experiment* e : lab::experiments()) rows.push_back({{e->name, Tone::bold}, {e->question}});
  print(table(rows, 2));
  print("heed lab NAME --file TEXT runs one; heed lab NAME --params lists what it can be told.\n");
}

void list_params(const Experiment& e) {
  print(fmt::format("{} ({})\n{}\n", e.title, e.paper, e.question));
  std::vector<std::vector<Cell>> rows{{{"parameter", Tone::dim}, {"default", Tone::dim}, {"meaning", Tone::dim}}};
  for (const ParamSpec& s : e.params) rows.push_back({{s.name, Tone::bold}, {s.fallback}, {s.help}});
  print(table(rows, 3));
}

Json json_of(const Experiment& e, const Params& p, const Options& options, const Report& report) {
  Json params = Json::object(), rows = Json::array(), findings = Json::array(), charts = Json::array();
  for (const auto& [name, value] : p.values()) params[name] = value;
  for (const auto& row : report.rows) {
    Json cells = Json::array();
    for (const std::string& cell : row) cells.push_back(cell);
    rows.push_back(cells);
  }
  for (const lab::Finding& f : report.findings)
    findings.push_back({{"claim", f.claim}, {"measured", f.measured}, {"holds", f.holds}});
  for (const lab::Chart& c : report.charts) {
    Json lines = Json::object();
    for (const auto& line : c.lines) lines[line.name] = line.y;
    charts.push_back({{"title", c.title}, {"x", c.x_title}, {"x_end", c.x_end}, {"y", c.y_title}, {"lines", lines}});
  }
  return {{"experiment", e.name}, {"paper", e.paper},       {"machine", machine_name()}, {"threads", threads()},
          {"text", options.text}, {"model", options.model}, {"params", params},          {"columns", report.columns},
          {"rows", rows},         {"findings", findings},   {"charts", charts},          {"note", report.note}};
}

std::string html_of(const Experiment& e, const Params& p, const Report& report) {
  std::string page = page_head(e.title, fmt::format("heed lab · {} · {}", e.title, e.paper), e.question);
  page += "<p class=\"lead\">" + escape_html(report.note) + "</p>\n";
  for (const lab::Finding& f : report.findings)
    page += fmt::format("<p><b class=\"{}\">{}</b> {}: {}.</p>\n", f.holds ? "good" : "bad",
                        f.holds ? "Holds." : "Does not hold.", escape_html(f.claim), escape_html(f.measured));
  page += "<div class=\"card scroll\"><table><thead><tr>";
  for (const std::string& c : report.columns) page += "<th>" + escape_html(c) + "</th>";
  page += "</tr></thead><tbody>\n";
  for (const auto& row : report.rows) {
    page += "<tr>";
    for (const std::string& cell : row) page += "<td>" + escape_html(cell) + "</td>";
    page += "</tr>\n";
  }
  page += "</tbody></table></div>\n";
  for (const lab::Chart& c : report.charts) {
    page += "<h2>" + escape_html(c.title) + "</h2>\n<div class=\"card\"><div class=\"legend\">";
    std::vector<Line> lines;
    for (size_t i = 0; i < c.lines.size(); ++i) {
      page += "<span>" + chip(i) + escape_html(c.lines[i].name) + "</span>";
      lines.push_back({i, c.lines[i].y});
    }
    page += "</div>\n" + line_chart(lines, c.x_end, c.x_title, c.y_title, false) + "</div>\n";
  }
  page += "<footer><dl>\n";
  for (const auto& [name, value] : p.values())
    page += fmt::format("<dt>{}</dt><dd>{}</dd>\n", escape_html(name), escape_html(value));
  page += fmt::format("<dt>machine</dt><dd>{}, {} threads</dd>\n", escape_html(machine_name()), threads());
  return page + "</dl></footer>\n</main></body></html>\n";
}

void run_experiment(const Options& options) {
  const Experiment& e = lab::find_experiment(options.name);
  ParamTexts given;
  for (const std::string& text : options.settings) given.push_back(setting_of(text));
  const Params params("lab " + e.name, e.params, given);
  if (options.text.empty()) fail_usage("lab: --file is missing, expected a text to learn from");
  if (e.needs_model && options.model.empty())
    fail_usage("lab: --model is missing, expected a GGUF model: {} trains one", e.name);
  if (!e.needs_model && !options.model.empty()) fail_usage("lab: --model, expected none: {} makes its own", e.name);
  at::set_num_threads(threads());
  // A report that cannot be written should be known before it is computed.
  const HoldInterrupts hold;
  std::optional<AtomicFile> json_file, html_file;
  if (!options.json.empty() && options.json != "-") json_file.emplace(options.json);
  if (!options.html.empty()) html_file.emplace(options.html);
  ProgressLine progress;
  Report report;
  try {
    report = e.run({params, options.text, options.model, [&](const std::string& what, Index done, Index total) {
                      progress.show(what, done, total);
                      return interrupted() == 0;
                    }});
  } catch (const lab::Stopped&) {
    progress.clear();
    stop_if_interrupted();
  }
  progress.clear();
  const std::string page = html_of(e, params, report), json = json_text(json_of(e, params, options, report));
  if (html_file) html_file->write(page.data(), page.size()), html_file->commit();
  if (json_file) json_file->write(json.data(), json.size()), json_file->commit();
  if (options.json == "-") return print(json);
  std::vector<std::vector<Cell>> rows(1);
  for (const std::string& c : report.columns) rows[0].push_back({c, Tone::dim});
  for (const auto& row : report.rows) {
    rows.emplace_back();
    for (const std::string& cell : row) rows.back().push_back({cell});
  }
  print(table(rows));
  for (const lab::Finding& f : report.findings)
    print(fmt::format("{} {}: {}\n", toned(f.holds ? "holds:" : "does not hold:", f.holds ? Tone::good : Tone::bad),
                      f.claim, f.measured));
  print(report.note + "\n");
}

}  // namespace

void add_lab(CLI::App& app, Job& job) {
  CLI::App* command = app.add_subcommand("lab", "Measure a paper's claim again: a table, a verdict, a picture");
  const auto options = std::make_shared<Options>();
  const auto params = std::make_shared<bool>(false);
  command->add_option("NAME", options->name, "The experiment; without one, they are listed");
  command->add_option("--file", options->text, "The text to learn from")->type_name("F");
  command->add_option("--model", options->model, "The GGUF model, for experiments that begin with one")
      ->type_name("MODEL");
  command->add_option("--set", options->settings, "A parameter of the experiment; may be repeated")
      ->type_name("P=V")
      ->allow_extra_args(false)
      ->take_all();
  command->add_flag("--params", *params, "List the experiment's parameters instead of running it");
  command
      ->add_option("--json", options->json,
                   "Write everything as JSON to this file (- for standard output, instead of the table)")
      ->type_name("F");
  command->add_option("--html", options->html, "Write a page with the table and charts to this file")->type_name("F");
  command->callback([&job, options, params] {
    job = [options, params] {
      if (options->name.empty()) list_experiments();
      else if (*params) list_params(lab::find_experiment(options->name));
      else run_experiment(*options);
    };
  });
  command->footer("Examples:\n"
                  "  heed lab\n"
                  "  heed lab moba --file book.txt --html moba.html\n"
                  "  heed lab gate --file book.txt --set steps=2000 --set seeds=3 --html gate.html\n"
                  "  heed lab moba-continued --model model.gguf --file book.txt --set steps=24 --html curve.html");
}

}  // namespace heed::cli
