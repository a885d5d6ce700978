#include "heed/model/pretokenizer.h"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include <limits>
#include <utility>

#include "heed/base/error.h"
#include "heed/base/text.h"

namespace heed::model {
namespace {

// Unicode's White_Space, as the inside of a character class: PCRE2's \s has U+180E as well.
const std::string white =
    R"(\x{9}-\x{d}\x{20}\x{85}\x{a0}\x{1680}\x{2000}-\x{200a}\x{2028}\x{2029}\x{202f}\x{205f}\x{3000})";
// A run of white space up to the end or up to its last character, which goes with what follows.
const std::string spaces = "[" + white + "]+(?![^" + white + "])|[" + white + "]+";

const std::string gpt2 = R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^)" + white + R"(\p{L}\p{N}]+|)" + spaces;

// Llama 3's and Qwen 2's differ in how many digits go together.
std::string words(const std::string& number) {
  return R"('(?:[sS]|[tT]|[rR][eE]|[vV][eE]|[mM]|[lL][lL]|[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|)" + number + "| ?[^" + white +
         R"(\p{L}\p{N}]+[\r\n]*|[)" + white + R"(]*[\r\n]+|)" + spaces;
}

struct Recipe {
  std::string name;
  std::vector<std::string> patterns;
  bool whole_tokens = false;
};

const std::vector<Recipe>& recipes() {
  static const std::vector<Recipe> all = {
      {"smollm", {R"(\p{N})", gpt2}},
      {"gpt-2", {gpt2}},
      {"default", {R"([\p{P}$+<=>^~|]+)", gpt2, R"(\p{N}+)", "[0-9][0-9][0-9]"}},
      {"llama-bpe", {words(R"(\p{N}{1,3})")}, true},
      {"qwen2", {words(R"(\p{N})")}},
  };
  return all;
}

struct FreeMatch {
  void operator()(pcre2_match_data* p) const { pcre2_match_data_free(p); }
};

}  // namespace

// One regular expression.
struct Pretokenizer::Stage {
  explicit Stage(const std::string& pattern) {
    int error = 0;
    PCRE2_SIZE offset = 0;
    code = pcre2_compile(reinterpret_cast<PCRE2_SPTR>(pattern.data()), pattern.size(), PCRE2_UTF | PCRE2_UCP, &error,
                         &offset, nullptr);
    context = pcre2_match_context_create(nullptr);
    if (code == nullptr || context == nullptr) fail("PCRE2: error {} at offset {} of {}", error, offset, pattern);
    pcre2_jit_compile(code, PCRE2_JIT_COMPLETE);  // where there is no JIT, pcre2_match interprets
    // The patterns take time linear in the text: its length is no reason to stop.
    pcre2_set_match_limit(context, std::numeric_limits<std::uint32_t>::max());
    pcre2_set_depth_limit(context, std::numeric_limits<std::uint32_t>::max());
    pcre2_set_heap_limit(context, std::numeric_limits<std::uint32_t>::max());
  }
  ~Stage() {
    pcre2_match_context_free(context);
    pcre2_code_free(code);
  }
  Stage(const Stage&) = delete;
  Stage& operator=(const Stage&) = delete;

  // The first match from `from` on: [begin, end), begin == end when there is none.
  std::pair<size_t, size_t> next(std::string_view text, size_t from, pcre2_match_data* match) const {
    const auto search = [&](std::uint32_t options) {
      return pcre2_match(code, reinterpret_cast<PCRE2_SPTR>(text.data()), text.size(), from,
                         PCRE2_NO_UTF_CHECK | options, match, context);
    };
    int found = search(0);
    if (found == PCRE2_ERROR_JIT_STACKLIMIT) found = search(PCRE2_NO_JIT);
    if (found == PCRE2_ERROR_NOMATCH) return {text.size(), text.size()};
    if (found < 0) fail("PCRE2: error {} in {} bytes of text", found, text.size());
    const PCRE2_SIZE* at = pcre2_get_ovector_pointer(match);
    return {at[0], at[1]};
  }

  pcre2_code* code;
  pcre2_match_context* context;
};

Pretokenizer::Pretokenizer(const std::string& name) {
  const std::string_view same = name == "llama3" || name == "llama-v3" ? std::string_view("llama-bpe") : name;
  std::string known;
  for (const Recipe& recipe : recipes()) {
    known += (known.empty() ? "" : ", ") + recipe.name;
    if (recipe.name != same) continue;
    for (const std::string& pattern : recipe.patterns) stages_.push_back(std::make_unique<Stage>(pattern));
    whole_tokens_ = recipe.whole_tokens;
  }
  if (stages_.empty()) fail("tokenizer.ggml.pre = \"{}\", supported: {}", printable(name), known);
}

Pretokenizer::~Pretokenizer() = default;

void Pretokenizer::split(std::string_view text, const std::function<void(std::string_view)>& take) const {
  const std::unique_ptr<pcre2_match_data, FreeMatch> match(pcre2_match_data_create(1, nullptr));
  if (match == nullptr) throw std::bad_alloc();
  // What a stage matches and what lies between its matches are the next one's whole texts: a look
  // ahead never sees beyond them.
  const auto cut = [&](const auto& self, size_t stage, std::string_view piece) -> void {
    if (piece.empty()) return;
    if (stage == stages_.size()) return take(piece);
    for (size_t done = 0; done < piece.size();) {
      const auto [begin, end] = stages_[stage]->next(piece, done, match.get());
      self(self, stage + 1, piece.substr(done, begin - done));
      self(self, stage + 1, piece.substr(begin, end - begin));
      done = end;
    }
  };
  cut(cut, 0, text);
}

}  // namespace heed::model
