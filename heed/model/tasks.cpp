#include "heed/model/tasks.h"

#include <algorithm>
#include <numeric>

#include "heed/base/random.h"
#include "heed/model/chat.h"
#include "heed/model/sampler.h"

namespace heed::model {
namespace {

constexpr Index lead_in = 50, passage = 200;  // tokens of the copy task
constexpr int key_digits = 5;

// Lines of the text that are not blank. Very long ones are cut, at a space where there is one, so
// that a prompt's length and a key's depth can be met.
std::vector<std::string> paragraphs(const std::string& text) {
  constexpr size_t longest = 1000;
  std::vector<std::string> list;
  for (size_t at = 0; at < text.size();) {
    size_t end = std::min(text.find('\n', at), text.size());
    if (end - at > longest) {
      size_t cut = text.rfind(' ', at + longest);
      if (cut == text.npos || cut <= at) {
        cut = at + longest;
        while (cut < end && (static_cast<unsigned char>(text[cut]) & 0xc0u) == 0x80u) ++cut;
      }
      end = cut;
    }
    std::string line = text.substr(at, end - at);
    while (!line.empty() && (line.back() == '\r' || line.back() == ' ' || line.back() == '\t')) line.pop_back();
    line.erase(0, std::min(line.find_first_not_of(" \t"), line.size()));
    if (!line.empty()) list.push_back(std::move(line));
    at = end < text.size() && (text[end] == '\n' || text[end] == ' ') ? end + 1 : end;
  }
  return list;
}

// The one token that stands for this text.
Token single(const Model& model, const std::string& text) {
  const std::vector<Token> ids = model.tokenizer().encode(text, false);
  if (ids.size() != 1) fail("passkey: \"{}\" is {} tokens in this vocabulary, expected one", text, ids.size());
  return ids.front();
}

std::vector<Token> with_bos(const Model& model) {
  std::vector<Token> ids;
  if (const auto bos = model.tokenizer().bos()) ids.push_back(*bos);
  return ids;
}

// The question around the filler, as the model is asked it, up to "The pass key is".
std::vector<Token> question(const Model& model, const std::string& filler) {
  const std::string text = "There is a pass key hidden in the text below. Find it and remember it.\n\n" + filler +
                           "\n\nWhat is the pass key?";
  const std::string answer = "The pass key is";
  std::vector<Token> ids;
  if (const ChatTemplate chat = ChatTemplate::from(model.chat_template()); chat.known()) {
    ids = chat.encode(model.tokenizer(), text, answer);
  } else {
    ids = with_bos(model);
    const std::vector<Token> rest = model.tokenizer().encode(text + " " + answer, false);
    ids.insert(ids.end(), rest.begin(), rest.end());
  }
  return ids;
}

std::string hiding(const std::string& key) { return "The pass key is " + key + ". Remember it."; }

}  // namespace

std::vector<Token> passkey_prompt(const Model& model, const std::string& document, Index length, double depth,
                                  const std::string& key) {
  if (!(depth >= 0 && depth <= 1)) fail_usage("passkey: depth = {}, expected 0 … 1", depth);
  const std::vector<std::string> lines = paragraphs(document);
  if (lines.empty()) fail("passkey: the document holds no text, expected at least one line of filler");
  const Index least = static_cast<Index>(question(model, hiding(key)).size());
  if (length < least) fail_usage("passkey: length = {} tokens, expected at least {}", length, least);

  // Every key has filler of its own: it starts at another line and goes round.
  Random random(std::accumulate(key.begin(), key.end(), std::uint64_t{0},
                                [](std::uint64_t sum, char c) { return sum * 257 + static_cast<unsigned char>(c); }));
  const Index count = static_cast<Index>(lines.size()), start = random.below(count);
  std::vector<std::string> chosen;
  std::vector<Index> ends;  // tokens up to and with each line
  for (Index used = 0;;) {
    const std::string& line = lines[static_cast<size_t>((start + static_cast<Index>(chosen.size())) % count)];
    used += static_cast<Index>(model.tokenizer().encode(line + "\n", false).size());
    if (used > length - least) break;
    chosen.push_back(line);
    ends.push_back(used);
  }
  const double wanted = depth * (ends.empty() ? 0.0 : static_cast<double>(ends.back()));
  const size_t at = static_cast<size_t>(
      std::count_if(ends.begin(), ends.end(), [&](Index end) { return static_cast<double>(end) <= wanted; }));
  chosen.insert(chosen.begin() + static_cast<std::ptrdiff_t>(at), hiding(key));
  std::string filler;
  for (const std::string& line : chosen) filler += (filler.empty() ? "" : "\n") + line;
  return question(model, filler);
}

PasskeyTask make_passkey(const Model& model, const std::string& document, Index length, double depth,
                         std::uint64_t seed) {
  PasskeyTask task{.length = 0, .depth = depth, .seed = seed, .key = {}, .prompt = {}};
  Random random(seed);
  task.key = std::to_string(10000 + random.below(90000));
  task.prompt = passkey_prompt(model, document, length - 1, depth, task.key);
  task.length = static_cast<Index>(task.prompt.size()) + 1;
  return task;
}

PasskeyResult ask(const Model& model, const PasskeyTask& task, Session& session, const Progress& progress) {
  PasskeyResult result{
      .length = task.length, .depth = task.depth, .seed = task.seed, .key = task.key, .answer = {}, .found = true};
  session.prefill(task.prompt, progress);
  Token next = single(model, " ");
  for (int i = 0; i < key_digits; ++i) {
    next = top_logits(session.decode(next), 1).front().first;
    result.answer += model.tokenizer().decode(next, true);
    result.found = result.found && next == single(model, task.key.substr(static_cast<size_t>(i), 1));
  }
  return result;
}

CopyTask make_copy(const Model& model, const std::vector<Token>& document, Index gap, std::uint64_t seed) {
  if (gap < 1) fail_usage("copy: gap = {} tokens, expected >= 1", gap);
  const Index held = static_cast<Index>(document.size()), text = lead_in + gap;
  if (held < text + passage) fail("copy: the document holds {} tokens, expected at least {}", held, text + passage);
  Random random(seed);
  const Index start = random.below(held - text - passage + 1);
  const Index elsewhere = start + text + random.below(held - start - text - passage + 1);
  CopyTask task{.gap = gap, .seed = seed, .tokens = with_bos(model), .first = 0, .second = 0};
  const auto add = [&](Index begin, Index count) {
    const Index at = static_cast<Index>(task.tokens.size());
    task.tokens.insert(task.tokens.end(), document.begin() + begin, document.begin() + begin + count);
    return at;
  };
  add(start, lead_in);
  task.first = add(elsewhere, passage);
  add(start + lead_in, gap);
  task.second = add(elsewhere, passage);
  return task;
}

CopyResult measure(const CopyTask& task, Session& session, const Progress& progress) {
  session.prefill_keeping_hidden(task.tokens, progress);
  const std::vector<double> nll = session.score_hidden();
  // nll[i] belongs to token i + 1; the first token of a copy cannot be known.
  const auto mean = [&](Index begin) {
    const auto from = nll.begin() + begin;
    return std::accumulate(from, from + passage - 1, 0.0) / static_cast<double>(passage - 1);
  };
  return {.gap = task.gap, .seed = task.seed, .nll_first = mean(task.first), .nll_second = mean(task.second)};
}

}  // namespace heed::model
