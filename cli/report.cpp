// The report of heed compare as one HTML page.

#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "cli/charts.h"
#include "cli/comparison.h"
#include "cli/page.h"
#include "cli/png.h"
#include "cli/terminal.h"

namespace heed::cli {
namespace {

using model::CompareRow;

constexpr size_t curve_bins = 60;

std::string base64(const std::string& bytes) {
  static constexpr char digits[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
  std::string out;
  for (size_t i = 0; i < bytes.size(); i += 3) {
    const size_t n = std::min<size_t>(3, bytes.size() - i);
    unsigned bits = 0;
    for (size_t j = 0; j < 3; ++j) bits = bits << 8 | (j < n ? static_cast<unsigned char>(bytes[i + j]) : 0u);
    for (size_t j = 0; j < 4; ++j) out += j <= n ? digits[bits >> (18 - 6 * j) & 63u] : '=';
  }
  return out;
}

std::string file_name(const std::string& path) {
  const size_t slash = path.rfind('/');
  return path == "-" ? "standard input" : slash == std::string::npos ? path : path.substr(slash + 1);
}

std::string model_title(const Comparison& c) { return c.model_name.empty() ? file_name(c.model) : c.model_name; }

std::string params_text(const MechanismCall& call) {
  std::string out;
  for (const auto& [name, value] : call.params) out += fmt::format("{}{} {}", out.empty() ? "" : ", ", name, value);
  return out;
}

// "moba (block 64, top_k 8)".
std::string spoken(const MechanismCall& call) {
  return call.params.empty() ? call.name : fmt::format("{} ({})", call.name, params_text(call));
}

std::string ppl_change(const Comparison& c, const CompareRow& row) {
  const double share = row.ppl / c.dense()->ppl - 1;
  if (std::abs(share) < 0.005) return fmt::format("perplexity stays at {:.2f}", row.ppl);
  return fmt::format("perplexity goes from {:.2f} to {:.2f}", c.dense()->ppl, row.ppl);
}

// Whether a row forgot nothing that was asked: it finds as many keys as dense attention does.
bool remembers(const CompareRow& row, const CompareRow& dense) { return keys_found(row) >= keys_found(dense); }

// The finding: the fastest mechanism among those that remember what dense attention remembers and
// stay close to its perplexity; if there is none, the fastest, with what it lost.
std::string headline(const Comparison& c) {
  const CompareRow* dense = c.dense();
  if (dense == nullptr || c.rows.size() < 2) {
    const auto best = std::min_element(c.rows.begin(), c.rows.end(), [](const CompareRow& a, const CompareRow& b) {
      return a.prefill_s < b.prefill_s;
    });
    return fmt::format("{} reads {} tokens in {}, {} tokens a second", spoken(best->call), count_text(best->tokens),
                       seconds_text(best->prefill_s), count_text(std::llround(best->tokens_per_s)));
  }
  const auto close = [&](const CompareRow& r) {
    return remembers(r, *dense) && (!c.perplexity || r.ppl <= 1.1 * dense->ppl);
  };
  const CompareRow *best = nullptr, *fastest = nullptr;
  for (const CompareRow& r : c.rows) {
    if (&r == dense) continue;
    if (fastest == nullptr || r.prefill_s < fastest->prefill_s) fastest = &r;
    if (close(r) && (best == nullptr || r.prefill_s < best->prefill_s)) best = &r;
  }
  const CompareRow& r = best != nullptr && speedup(c, *best).value_or(0) > 1.02 ? *best : *fastest;
  const double ratio = speedup(c, r).value_or(0);
  std::string text =
      ratio > 1.02
          ? fmt::format("{} reads {} tokens {:.2f} times as fast as dense attention", spoken(r.call),
                        count_text(r.tokens), ratio)
          : fmt::format(
                "At {} tokens nothing is faster than dense attention; {} comes closest, at {:.2f} times its speed",
                count_text(r.tokens), spoken(r.call), ratio);
  text += fmt::format(", computing {:.1f} % of its attention", 100 * r.density);
  if (c.perplexity) text += "; " + ppl_change(c, r);
  if (!r.passkey.empty())
    text += remembers(r, *dense) ? fmt::format("{} it finds {} of {} hidden keys", c.perplexity ? ", and" : ";",
                                               keys_found(r), r.passkey.size())
                                 : fmt::format(", but it finds {} of {} hidden keys where dense attention finds {}",
                                               keys_found(r), r.passkey.size(), keys_found(*dense));
  return text;
}

std::string summary_table(const Comparison& c) {
  const CompareRow* dense = c.dense();
  const bool passkey =
      std::any_of(c.rows.begin(), c.rows.end(), [](const CompareRow& r) { return !r.passkey.empty(); });
  std::string out = "<table><thead><tr><th>mechanism</th><th>prefill</th><th>tokens/s</th><th>speed<br>vs "
                    "dense</th><th>attention,<br>share of time</th>"
                    "<th>density</th>";
  if (c.perplexity) out += "<th>perplexity</th><th>change</th>";
  out += "<th>peak memory</th>";
  if (passkey) out += "<th>keys<br>found</th>";
  out += "</tr></thead><tbody>\n";
  for (size_t i = 0; i < c.rows.size(); ++i) {
    const CompareRow& r = c.rows[i];
    const auto cell = [&](const std::string& text, const char* tone = "") {
      out += fmt::format("<td class=\"{}\">{}</td>", tone, text);
    };
    out += fmt::format("<tr><td class=\"name\">{}{}<small>{}</small></td>", chip(i), escape_html(r.call.name),
                       escape_html(params_text(r.call)));
    cell(seconds_text(r.prefill_s));
    cell(count_text(std::llround(r.tokens_per_s)));
    const auto ratio = speedup(c, r);
    if (ratio) cell(fmt::format("{:.2f}×", *ratio), *ratio > 1.02 ? "good" : *ratio < 0.98 ? "bad" : "");
    else cell("–");
    cell(fmt::format("{:.0f} %", 100 * attention_share(r)));
    cell(fmt::format("{:.1f} %", 100 * r.density));
    if (c.perplexity) {
      cell(fmt::format("{:.3f}", r.ppl));
      if (dense == nullptr || dense == &r) cell("–");
      else cell(fmt::format("{:+.3f}", r.ppl - dense->ppl), r.ppl > 1.05 * dense->ppl ? "bad" : "");
    }
    cell(bytes_text(r.peak_bytes));
    if (passkey) {
      const Index found = keys_found(r), total = static_cast<Index>(r.passkey.size());
      cell(fmt::format("{} of {}", found, total), found == total ? "good" : found == 0 ? "bad" : "");
    }
    out += "</tr>\n";
  }
  return out + "</tbody></table>";
}

std::string bar_charts(const Comparison& c) {
  std::vector<Bar> times, perplexities;
  for (size_t i = 0; i < c.rows.size(); ++i) {
    const CompareRow& r = c.rows[i];
    times.push_back({r.call.text(),
                     seconds_text(r.prefill_s),
                     i,
                     {r.attention_s, r.linear_s, std::max(0.0, r.prefill_s - r.attention_s - r.linear_s)}});
    perplexities.push_back({r.call.text(), fmt::format("{:.3f}", r.ppl), i, {r.ppl}});
  }
  std::string out = "<div class=\"two\"><div class=\"card\"><h3>Prefill time</h3>" + bar_chart(times) +
                    "<p class=\"note\" style=\"margin:12px 0 0\">Full colour: attention, planning included. Fainter: "
                    "linear layers. Faintest: the rest.</p></div>\n";
  if (c.perplexity)
    out += "<div class=\"card\"><h3>Perplexity of the document</h3>" + bar_chart(perplexities) +
           "<p class=\"note\" style=\"margin:12px 0 0\">Lower is better. Bars start at 0.</p></div>\n";
  return out + "</div>\n";
}

// Means over equal stretches of the document.
std::vector<double> binned(const std::vector<double>& nll) {
  const size_t bins = std::min(curve_bins, nll.size());
  std::vector<double> means(bins);
  for (size_t b = 0; b < bins; ++b) {
    const size_t begin = b * nll.size() / bins, end = (b + 1) * nll.size() / bins;
    for (size_t i = begin; i < end; ++i) means[b] += nll[i] / static_cast<double>(end - begin);
  }
  return means;
}

std::string curves(const Comparison& c) {
  if (!c.perplexity) return "";
  const CompareRow* dense = c.dense();
  const std::vector<double> base = dense == nullptr ? std::vector<double>{} : binned(dense->nll_by_position);
  std::vector<Line> levels, losses;
  std::string legend = "<div class=\"legend\">";
  for (size_t i = 0; i < c.rows.size(); ++i) {
    const std::vector<double> nats = binned(c.rows[i].nll_by_position);
    Line& level = levels.emplace_back(Line{i, nats});
    for (double& y : level.y) y = std::exp(y);
    legend += fmt::format("<span>{}{}</span>", chip(i), escape_html(c.rows[i].call.text()));
    if (base.empty() || &c.rows[i] == dense) continue;
    Line& loss = losses.emplace_back(Line{i, nats});
    for (size_t b = 0; b < base.size(); ++b) loss.y[b] -= base[b];
  }
  legend += "</div>\n";
  const double end = static_cast<double>(c.tokens);
  std::string out = fmt::format("<h2>Perplexity along the document</h2><p class=\"note\">Means over {} stretches of "
                                "the text. A mechanism that forgets falls behind as the "
                                "text grows longer.</p><div class=\"card\">{}{}</div>\n",
                                levels.front().y.size(), legend,
                                line_chart(levels, end, "position in the document, tokens", "perplexity", false));
  if (!losses.empty())
    out += "<div class=\"card\" style=\"margin-top:20px\"><h3>What each loses against dense attention</h3>" +
           line_chart(losses, end, "position in the document, tokens", "nats a token", true) + "</div>\n";
  return out;
}

std::string tasks(const Comparison& c) {
  std::string out;
  const std::vector<model::PasskeyResult>& asked = c.rows.front().passkey;
  if (!asked.empty()) {
    const size_t seeds = std::max<size_t>(1, c.seeds.size());
    out += "<h2>Is a hidden key found?</h2><p class=\"note\">A five-digit key stands in a sentence of its own "
           "somewhere in the text; after the text the model is asked for "
           "it. What it said instead is written beside a miss.</p><div class=\"card scroll\"><table "
           "class=\"keys\"><thead><tr><th>mechanism</th>";
    for (size_t i = 0; i < asked.size(); i += seeds)
      out += fmt::format("<th>{:.0f} % deep<br>in {} tokens</th>", 100 * asked[i].depth, count_text(asked[i].length));
    out += "</tr></thead><tbody>\n";
    for (size_t row = 0; row < c.rows.size(); ++row) {
      const CompareRow& r = c.rows[row];
      out += fmt::format("<tr><td class=\"name\">{}{}<small>{}</small></td>", chip(row), escape_html(r.call.name),
                         escape_html(params_text(r.call)));
      for (size_t i = 0; i < r.passkey.size(); ++i) {
        const model::PasskeyResult& x = r.passkey[i];
        out += i % seeds == 0 ? "<td>" : "<br>";
        out += x.found ? fmt::format("<span class=\"good key\">✓ {}</span>", x.key)
                       : fmt::format("<span class=\"bad key\" title=\"the key was {}\">✗ {}</span>", x.key,
                                     escape_html(x.answer));
        if (i % seeds == seeds - 1) out += "</td>";
      }
      out += "</tr>\n";
    }
    out += "</tbody></table></div>\n";
  }
  if (!c.rows.front().copy.empty()) {
    out += "<h2>Is a passage recognised when it comes again?</h2><p class=\"note\">Nats a token over a passage of 200 "
           "tokens where it first occurs, and where it comes "
           "again after a gap.</p><div class=\"card scroll\"><table><thead><tr><th>mechanism</th><th>gap, "
           "tokens</th><th>first time</th><th>second time</th></tr></thead><tbody>\n";
    for (size_t row = 0; row < c.rows.size(); ++row)
      for (const model::CopyResult& x : c.rows[row].copy)
        out += fmt::format(
            "<tr><td class=\"name\">{}{}<small>{}</small></td><td>{}</td><td>{:.3f}</td><td>{:.3f}</td></tr>\n",
            chip(row), escape_html(c.rows[row].call.name), escape_html(params_text(c.rows[row].call)),
            count_text(x.gap), x.nll_first, x.nll_second);
    out += "</tbody></table></div>\n";
  }
  return out;
}

bool same_picture(const Picture& a, const Picture& b) {
  return a.share.size() == b.share.size() &&
         std::equal(a.share.begin(), a.share.end(), b.share.begin(),
                    [](float x, float y) { return x == y || (std::isnan(x) && std::isnan(y)); });
}

std::string plans(const Comparison& c) {
  if (c.pictures.empty()) return "";
  const Index cell = c.pictures.front().picture.cell;
  std::string out = fmt::format("<h2>Who attends to whom</h2><p class=\"note\">Queries go down, keys to the right; a "
                                "pixel stands for {} × {} tokens and shows the share of "
                                "its pairs that are attended:<span class=\"ramp\"></span>from few to all. White: "
                                "skipped. Grey: the future.</p><div class=\"plans\">\n",
                                cell, cell);
  for (size_t i = 0; i < c.pictures.size(); ++i) {
    const PlanPicture& p = c.pictures[i];
    const auto of_row = [&](const PlanPicture& x) { return x.row == p.row; };
    const auto first = std::find_if(c.pictures.begin(), c.pictures.end(), of_row);
    const bool alike = std::all_of(c.pictures.begin(), c.pictures.end(), [&](const PlanPicture& x) {
      return !of_row(x) || same_picture(x.picture, p.picture);
    });
    if (alike && &*first != &p) continue;  // a static pattern is shown once
    const std::string where = alike ? std::string("the same in every layer and head looked at")
                                    : fmt::format("layer {}, head {}", p.layer, p.head);
    out += fmt::format("<figure><img alt=\"plan of {}\" src=\"data:image/png;base64,{}\"><figcaption><b>{}</b>{}: "
                       "{:.1f} % of the pairs</figcaption></figure>\n",
                       escape_html(c.rows[p.row].call.text()), base64(encode_png(p.picture, {.margin = 0, .least = 0})),
                       escape_html(c.rows[p.row].call.text()), where, 100 * p.density);
  }
  return out + "</div>\n";
}

std::string foot(const Comparison& c) {
  std::string out = "<footer><dl>\n";
  const auto item = [&](const char* name, const std::string& text) {
    out += fmt::format("<dt>{}</dt><dd>{}</dd>\n", name, escape_html(text));
  };
  item("Machine", fmt::format("{}, {} threads, instruction set {}", c.machine, c.threads, c.isa));
  item("Model", fmt::format("{} ({})", model_title(c), file_name(c.model)));
  item("Document", fmt::format("{}, the first {} tokens", file_name(c.file), count_text(c.tokens)));
  item("Arithmetic", fmt::format("{}; KV cache in {}; {} tokens per step", c.dtype, c.kv, c.chunk));
  item("Mechanisms apply to",
       fmt::format("{}; {}", c.layers.empty() ? "every layer with global attention" : "layers " + c.layers,
                   c.phase == "both" ? "prefill and decode" : c.phase + " only"));
  item("Prefill",
       "computes the logits of the last position only; scoring all others for perplexity is not part of its time");
  item("Density",
       "attended (row, key) pairs over those of causal dense attention, counted, over the heads and layers replaced");
  item("Made with", "heed " HEED_VERSION);
  return out + "</dl></footer>\n";
}

}  // namespace

std::string comparison_html(const Comparison& c) {
  std::string page =
      page_head(fmt::format("heed: {} on {}", model_title(c), file_name(c.file)),
                fmt::format("heed compare · {} · {}", model_title(c), file_name(c.file)), headline(c) + ".");
  page += fmt::format("<p class=\"lead\">{} read the first {} tokens of {} under {} attention mechanism{}, {} with the "
                      "same weights, on {} threads of {}.</p>\n",
                      escape_html(model_title(c)), count_text(c.tokens), escape_html(file_name(c.file)), c.rows.size(),
                      c.rows.size() == 1 ? "" : "s",
                      c.rows.size() == 2   ? "both"
                      : c.rows.size() == 1 ? ""
                                           : "all",
                      c.threads, escape_html(c.machine));
  page += "<div class=\"card scroll\">" + summary_table(c) + "</div>\n<div style=\"height:20px\"></div>\n";
  page += bar_charts(c) + curves(c) + tasks(c) + plans(c) + foot(c);
  return page + "</main></body></html>\n";
}

}  // namespace heed::cli
