#include "heed/model/compare.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <numeric>

#include "heed/model/tasks.h"

namespace heed::model {
namespace {

double seconds_of(const auto& work) {
  const auto start = std::chrono::steady_clock::now();
  work();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

// What every mechanism is asked, made once, before the first long computation.
struct Tasks {
  std::vector<PasskeyTask> passkey;
  std::vector<CopyTask> copy;
  Index longest = 0;  // tokens that a session must hold
};

Tasks make_tasks(const Model& model, const std::vector<Token>& tokens, const std::string& document,
                 const CompareOptions& o) {
  Tasks tasks;
  const Index given = static_cast<Index>(tokens.size());
  tasks.longest = given;
  if (o.passkey) {
    std::vector<Index> lengths = o.passkey_lengths;
    if (lengths.empty()) lengths = {std::min<Index>(4000, given)};
    for (Index length : lengths)
      for (double depth : o.passkey_depths)
        for (std::uint64_t seed : o.seeds) {
          tasks.passkey.push_back(make_passkey(model, document, length, depth, seed));
          tasks.longest = std::max<Index>(tasks.longest, tasks.passkey.back().length + 5);
        }
  }
  if (o.copy) {
    const std::vector<Token> ids = model.tokenizer().encode(document, false);
    for (Index gap : o.copy_gaps)
      for (std::uint64_t seed : o.seeds) {
        tasks.copy.push_back(make_copy(model, ids, gap, seed));
        tasks.longest = std::max<Index>(tasks.longest, static_cast<Index>(tasks.copy.back().tokens.size()));
      }
  }
  return tasks;
}

void read_document(const std::vector<Token>& tokens, const CompareOptions& options, Session& session,
                   const Progress& reading, const Progress& scoring, CompareRow& row) {
  row.tokens = static_cast<Index>(tokens.size());
  row.prefill_s = seconds_of([&] {
    if (options.perplexity) session.prefill_keeping_hidden(tokens, reading);
    else session.prefill(tokens, reading);
  });
  const SessionStats& stats = session.stats();
  row.tokens_per_s = static_cast<double>(row.tokens) / row.prefill_s;
  row.attention_s = stats.attention_s, row.linear_s = stats.linear_s, row.plan_s = stats.plan_s;
  if (stats.dense_pairs > 0)
    row.density = static_cast<double>(stats.attend.pairs) / static_cast<double>(stats.dense_pairs);
  row.peak_bytes = stats.peak_bytes;
  if (!options.perplexity) return;
  row.score_s = seconds_of([&] { row.nll_by_position = session.score_hidden(scoring); });
  row.nll = std::accumulate(row.nll_by_position.begin(), row.nll_by_position.end(), 0.0) /
            static_cast<double>(row.nll_by_position.size());
  row.ppl = std::exp(row.nll);
}

}  // namespace

std::vector<CompareRow> compare(const Model& model, const std::vector<Token>& tokens, const std::string& document,
                                const CompareOptions& options) {
  if (tokens.size() < 2) fail("tokens = {}, expected at least 2", tokens.size());
  const Tasks tasks = make_tasks(model, tokens, document, options);
  // Every name, parameter, layer and length is checked before the first long computation.
  std::vector<SessionOptions> sessions;
  for (const MechanismUse& use : options.uses) {
    sessions.push_back({.use = use, .context = tasks.longest, .chunk = options.chunk, .kv = options.kv});
    Session(model, sessions.back());
  }

  std::vector<CompareRow> rows;
  for (size_t i = 0; i < sessions.size(); ++i) {
    CompareRow row;
    row.call = options.uses[i].call;
    const auto during = [&](const char* step) -> Progress {
      if (!options.progress) return {};
      return [&options, step, name = row.call.text()](Index done, Index total) {
        return options.progress(name, step, done, total);
      };
    };
    Session session(model, sessions[i]);
    if (options.observe)
      session.observe_plans(
          [&](Index layer, const Plan& plan) { options.observe(i, plan.problem.position(0), layer, plan); });
    read_document(tokens, options, session, during("reading"), during("scoring"), row);
    session.observe_plans({});

    for (const PasskeyTask& task : tasks.passkey) {
      session.truncate(0);
      row.passkey.push_back(ask(model, task, session, during("passkey")));
    }
    for (const CopyTask& task : tasks.copy) {
      session.truncate(0);
      row.copy.push_back(measure(task, session, during("copy")));
    }
    rows.push_back(std::move(row));
  }
  return rows;
}

}  // namespace heed::model
