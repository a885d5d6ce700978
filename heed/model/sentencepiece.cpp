// SentencePiece's kind of tokenizer: spaces become U+2581, characters merge into the piece with the
// highest score, and characters without a piece are spelled in bytes.

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <numeric>
#include <unordered_set>

#include "heed/base/error.h"
#include "heed/model/merging.h"
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
    rank_scores();
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
  // Ranks order the tokens as their scores do, best first: equal scores, equal ranks.
  void rank_scores() {
    const std::vector<float>& scores = vocabulary().scores;
    std::vector<std::uint32_t> order(scores.size());
    std::iota(order.begin(), order.end(), 0u);
    std::sort(order.begin(), order.end(), [&](std::uint32_t a, std::uint32_t b) { return scores[a] > scores[b]; });
    ranks_.resize(scores.size());
    std::uint32_t rank = 0;
    for (size_t i = 0; i < order.size(); ++i) {
      if (i > 0 && scores[order[i]] != scores[order[i - 1]]) ++rank;
      ranks_[order[i]] = rank;
    }
  }

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
      if (c == ' ') written += space_mark;
      else written += c;
    }
    const std::string_view text = written;

    Merger merger;
    size_t begin = 0;  // of the symbols in the merger
    const auto join = [&](const Symbol& left, const Symbol& right) -> Joined {
      const size_t size = left.size + right.size;
      const Token id = size > longest_ ? -1 : plain(text.substr(begin + left.begin, size));
      return id < 0 ? Joined{} : Joined{ranks_[static_cast<size_t>(id)], id};
    };
    const auto take = [&](const Symbol& symbol) {
      const std::string_view piece = text.substr(begin + symbol.begin, symbol.size);
      if (const Token id = symbol.id >= 0 ? symbol.id : plain(piece); id >= 0) return ids.push_back(id);
      for (char c : piece) ids.push_back(byte_token_[static_cast<unsigned char>(c)]);
    };
    for (size_t at = 0; at < text.size();) {
      const size_t n = utf8_length(text[at]);
      // Where no token reaches from a character over the space behind it, what stands on either side
      // merges on its own: the same pieces, in the memory of a word.
      if (at > begin && text.substr(at, n) == space_mark &&
          before_space_.count(last_code(text.substr(begin, at - begin))) == 0) {
        merger.run(join, take);
        begin = at;
      }
      merger.add({static_cast<std::uint32_t>(at - begin), static_cast<std::uint32_t>(n), -1});
      at += n;
    }
    merger.run(join, take);
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
  std::vector<std::uint32_t> ranks_;            // by id
  size_t longest_ = 0;                          // bytes of the longest token
  std::unordered_set<unsigned> before_space_;  // characters that stand before a space inside a token
};

}  // namespace

std::unique_ptr<Tokenizer> make_sentence_pieces(Vocabulary vocabulary) {
  return std::make_unique<SentencePieces>(std::move(vocabulary));
}

}  // namespace heed::model
