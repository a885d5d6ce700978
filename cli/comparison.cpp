#include "cli/comparison.h"

#include <fmt/format.h>

#include <algorithm>

#include "cli/terminal.h"
#include "cli/utf8.h"

namespace heed::cli {

using model::CompareRow;

const CompareRow* Comparison::dense() const {
  const auto it = std::find_if(rows.begin(), rows.end(), [](const CompareRow& r) { return r.call.name == "dense"; });
  return it == rows.end() ? nullptr : &*it;
}

Index keys_found(const CompareRow& row) {
  return std::count_if(row.passkey.begin(), row.passkey.end(), [](const model::PasskeyResult& r) { return r.found; });
}

std::optional<double> speedup(const Comparison& c, const CompareRow& row) {
  const CompareRow* dense = c.dense();
  if (dense == nullptr || row.prefill_s <= 0) return std::nullopt;
  return dense->prefill_s / row.prefill_s;
}

double attention_share(const CompareRow& row) { return row.prefill_s > 0 ? row.attention_s / row.prefill_s : 0; }

std::string comparison_table(const Comparison& c) {
  const CompareRow* dense = c.dense();
  const bool passkey =
      std::any_of(c.rows.begin(), c.rows.end(), [](const CompareRow& r) { return !r.passkey.empty(); });
  const bool copy = std::any_of(c.rows.begin(), c.rows.end(), [](const CompareRow& r) { return !r.copy.empty(); });
  std::vector<Cell> head{{"mechanism"}, {"prefill"}, {"tokens/s"}, {"vs dense"}, {"attention"}, {"density"}};
  if (c.perplexity) head.insert(head.end(), {{"perplexity"}, {"change"}});
  head.push_back({"memory"});
  if (passkey) head.push_back({"pass key"});
  if (copy) head.push_back({"copy, nats"});

  std::vector<std::vector<Cell>> rows{head};
  for (const CompareRow& r : c.rows) {
    const auto ratio = speedup(c, r);
    std::vector<Cell> row{{r.call.text()}, {seconds_text(r.prefill_s)}, {fmt::format("{:.0f}", r.tokens_per_s)}};
    row.push_back(!ratio ? Cell{"-"}
                         : Cell{fmt::format("{:.2f}x", *ratio), *ratio > 1.02   ? Tone::good
                                                                : *ratio < 0.98 ? Tone::bad
                                                                                : Tone::plain});
    row.push_back({fmt::format("{:.0f} %", 100 * attention_share(r))});
    row.push_back({fmt::format("{:.1f} %", 100 * r.density)});
    if (c.perplexity) {
      row.push_back({fmt::format("{:.3f}", r.ppl)});
      const double more = dense == nullptr ? 0 : r.ppl - dense->ppl;
      row.push_back(dense == nullptr || dense == &r
                        ? Cell{"-"}
                        : Cell{fmt::format("{:+.3f}", more), more > 0.05 * dense->ppl ? Tone::bad : Tone::plain});
    }
    row.push_back({bytes_text(r.peak_bytes)});
    if (passkey) {
      const Index found = keys_found(r), asked = static_cast<Index>(r.passkey.size());
      row.push_back({fmt::format("{}/{}", found, asked), found == asked ? Tone::good
                                                         : found == 0   ? Tone::bad
                                                                        : Tone::plain});
    }
    if (copy) {
      double first = 0, second = 0;
      for (const model::CopyResult& x : r.copy) first += x.nll_first, second += x.nll_second;
      const double n = static_cast<double>(std::max<size_t>(1, r.copy.size()));
      row.push_back({fmt::format("{:.2f} → {:.2f}", first / n, second / n)});
    }
    rows.push_back(std::move(row));
  }
  return table(rows);
}

Json comparison_json(const Comparison& c) {
  Json mechanisms = Json::array();
  for (const CompareRow& r : c.rows) {
    Json passkey = Json::array(), copy = Json::array();
    for (const model::PasskeyResult& x : r.passkey)
      passkey.push_back({{"length", x.length},
                         {"depth", x.depth},
                         {"seed", x.seed},
                         {"key", x.key},
                         {"answer", valid_utf8(x.answer)},
                         {"found", x.found}});
    for (const model::CopyResult& x : r.copy)
      copy.push_back({{"gap", x.gap}, {"seed", x.seed}, {"nll_first", x.nll_first}, {"nll_second", x.nll_second}});
    Json row{{"name", r.call.name},
             {"params", params_json(r.call)},
             {"tokens", r.tokens},
             {"nll", nullptr},
             {"ppl", nullptr}};
    if (c.perplexity) row["nll"] = r.nll, row["ppl"] = r.ppl;
    row.update({{"prefill_s", r.prefill_s},
                {"score_s", r.score_s},
                {"tokens_per_s", r.tokens_per_s},
                {"attention_s", r.attention_s},
                {"linear_s", r.linear_s},
                {"plan_s", r.plan_s},
                {"density", r.density},
                {"peak_bytes", r.peak_bytes},
                {"tasks", {{"passkey", passkey}, {"copy", copy}}}});
    mechanisms.push_back(std::move(row));
  }
  return {{"machine", c.machine}, {"isa", c.isa},   {"threads", c.threads}, {"dtype", c.dtype},
          {"model", c.model},     {"file", c.file}, {"tokens", c.tokens},   {"mechanisms", mechanisms}};
}

}  // namespace heed::cli
