// SentencePiece's kind of tokenizer: spaces become U+2581, characters merge into the piece with the
// highest score, and characters without a piece are spelled in bytes.

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <queue>
#include <unordered_set>

#include "heed/base/error.h"
#include "heed/model/tokenizers.h"
#include "heed/model/utf8.h"

namespace heed::model {
namespace {

constexpr std::string_view space_mark = "\xe2\x96\x81";  // U+2581

class SentencePieces final : public Tokenizer {
 public:
  explicit SentencePieces(Vocabulary v) : Tokenizer(std::move(v)) {
    const Vocabulary& vocabulary = this->vocabulary();
    if (vocabulary.scores.size() != vocabulary.tokens.size())
      fail("tokenizer.ggml.scores: {} entries, expected {}", vocabulary.scores.size(), vocabulary.tokens.size());
    for (size_t i = 0; i < vocabulary.scores.size(); ++i)
      if (!std::isfinite(vocabulary.scores[i]))
        fail("tokenizer.ggml.scores[{}] = {}, expected a finite number", i, vocabulary.scores[i]);
    for (size_t b = 0; b < 256; ++b) {
      const auto id = find(fmt::format("<0x{:02X}>", b));
      if (!id || kind(*id) != TokenKind::byte) fail("tokenizer.ggml.tokens: no byte token <0x{:02X}>", b);
      byte_token_[b] = *id;
    }
    for (size_t i = 0; i < vocabulary.tokens.size(); ++i) {
      const std::string_view token = vocabulary.tokens[i];
      if (plain(token) < 0) continue;
      longest_ = std::max(longest_, token.size());
      for (size_t at = token.find(space_mark, 1); at != token.npos; at = token.find(space_mark, at + space_mark.size()))
        before_space_.insert(last_code(token.substr(0, at)));
    }
  }

 private:
  static unsigned last_code(std::string_view text) {
    size_t at = text.size() - 1;
    while ((static_cast<unsigned char>(text[at]) & 0xc0) == 0x80) --at;
    return next_code(text, at);
  }

  void encode_plain(std::string_view raw, std::vector<Token>& ids) const override {
    std::string written;
    written.reserve(raw.size() + raw.size() / 2);
    if (vocabulary().add_space_prefix) written += space_mark;
    for (char c : raw) {
      if (c == ' ')
        written += space_mark;
      else
        written += c;
    }
    // Where no token reaches from a character over the space behind it, what stands on either side
    // merges on its own: the same pieces, in the memory of a word.
    const std::string_view text = written;
    size_t begin = 0;
    for (size_t at = text.find(space_mark, 1); at != text.npos; at = text.find(space_mark, at + space_mark.size())) {
      if (before_space_.count(last_code(text.substr(0, at))) != 0) continue;
      merge(text.substr(begin, at - begin), ids);
      begin = at;
    }
    merge(text.substr(begin), ids);
  }

  // O(n log n): see the byte-level tokenizer. Symbols are runs of the text; a merged one grows to the right.
  void merge(std::string_view text, std::vector<Token>& ids) const {
    struct Symbol {
      std::uint32_t begin, length;  // length 0: merged away
      std::int32_t previous, next;
    };
    struct Candidate {
      float score;
      std::int32_t left, right;
      std::uint32_t length;
      bool operator<(const Candidate& o) const { return score != o.score ? score < o.score : left > o.left; }
    };
    std::vector<Symbol> symbols;
    for (size_t at = 0; at < text.size();) {
      const size_t n = utf8_length(text[at]);
      const auto i = static_cast<std::int32_t>(symbols.size());
      symbols.push_back({static_cast<std::uint32_t>(at), static_cast<std::uint32_t>(n), i - 1, i + 1});
      at += n;
    }
    symbols.back().next = -1;
    std::priority_queue<Candidate> heap;
    const auto offer = [&](std::int32_t left, std::int32_t right) {
      if (left < 0 || right < 0) return;
      const Symbol &a = symbols[static_cast<size_t>(left)], &b = symbols[static_cast<size_t>(right)];
      const std::uint32_t length = a.length + b.length;
      if (length > longest_) return;
      if (const Token id = plain(text.substr(a.begin, length)); id >= 0)
        heap.push({vocabulary().scores[static_cast<size_t>(id)], left, right, length});
    };
    for (std::int32_t i = 0; i + 1 < static_cast<std::int32_t>(symbols.size()); ++i) offer(i, i + 1);
    while (!heap.empty()) {
      const Candidate best = heap.top();
      heap.pop();
      Symbol &left = symbols[static_cast<size_t>(best.left)], &right = symbols[static_cast<size_t>(best.right)];
      // Stale when either side was merged away or has grown since.
      if (left.length == 0 || right.length == 0 || left.next != best.right || left.length + right.length != best.length) continue;
      left.length = best.length;
      left.next = right.next;
      right.length = 0;
      if (left.next >= 0) symbols[static_cast<size_t>(left.next)].previous = best.left;
      offer(left.previous, best.left);
      offer(best.left, left.next);
    }
    for (std::int32_t i = 0; i >= 0; i = symbols[static_cast<size_t>(i)].next) {
      const std::string_view piece = text.substr(symbols[static_cast<size_t>(i)].begin, symbols[static_cast<size_t>(i)].length);
      if (const Token id = plain(piece); id >= 0) {
        ids.push_back(id);
      } else {
        for (char c : piece) ids.push_back(byte_token_[static_cast<unsigned char>(c)]);
      }
    }
  }

  std::string decode_plain(Token id) const override {
    if (kind(id) == TokenKind::byte)
      for (size_t b = 0; b < 256; ++b)
        if (byte_token_[b] == id) return std::string(1, static_cast<char>(b));
    const std::string_view written = text(id);
    std::string out;
    for (size_t at = 0; at < written.size();) {
      const bool space = written.substr(at).starts_with(space_mark);
      out += space ? ' ' : written[at];
      at += space ? space_mark.size() : 1;
    }
    return out;
  }

  std::array<Token, 256> byte_token_{};
  size_t longest_ = 0;                          // bytes of the longest token
  std::unordered_set<unsigned> before_space_;  // characters that stand before a space inside a token
};

}  // namespace

std::unique_ptr<Tokenizer> make_sentence_pieces(Vocabulary vocabulary) {
  return std::make_unique<SentencePieces>(std::move(vocabulary));
}

}  // namespace heed::model
