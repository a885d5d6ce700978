// Byte-level BPE as GPT-2 introduced it: bytes are written as printable characters, text is cut into
// pieces by patterns, and inside a piece the pair with the best rank merges first.

#include <array>
#include <unordered_map>

#include "heed/base/error.h"
#include "heed/base/text.h"
#include "heed/model/merging.h"
#include "heed/model/pretokenizer.h"
#include "heed/model/tokenizers.h"
#include "heed/model/utf8.h"

namespace heed::model {

std::array<std::string, 256> byte_characters() {
  std::array<std::string, 256> text;
  unsigned next = 256;
  for (unsigned b = 0; b < 256; ++b) {
    const bool itself = (b >= 33 && b <= 126) || (b >= 161 && b <= 172) || b >= 174;
    append_utf8(text[b], itself ? b : next++);
  }
  return text;
}

namespace {

class BytePair final : public Tokenizer {
 public:
  explicit BytePair(Vocabulary v)
      : Tokenizer(std::move(v)), pretokenizer_(vocabulary_.pre), characters_(byte_characters()) {
    for (size_t b = 0; b < 256; ++b) {
      byte_of_[characters_[b]] = static_cast<char>(b);
      byte_token_[b] = plain(characters_[b]);
      encodable_[b] = byte_token_[b] >= 0;
      if (!encodable_[b] && (b == '\n' || (b >= ' ' && b <= '~')))
        fail("tokenizer.ggml.tokens: no token for byte 0x{:02x}", b);
    }
    merges_.reserve(vocabulary_.merges.size());
    for (size_t rank = 0; rank < vocabulary_.merges.size(); ++rank) {
      const std::string_view merge = vocabulary_.merges[rank];
      const size_t space = merge.find(' ', 1);
      if (space == merge.npos || space + 1 >= merge.size())
        fail("tokenizer.ggml.merges[{}] = \"{}\", expected two tokens", rank, printable(merge));
      const std::string_view left = merge.substr(0, space), right = merge.substr(space + 1);
      const std::string both = std::string(left).append(right);
      for (const std::string_view part : {left, right, std::string_view(both)})
        if (plain(part) < 0)
          fail("tokenizer.ggml.merges[{}] = \"{}\": \"{}\" is not a normal token", rank, printable(merge),
               printable(part));
      merges_.emplace(pair_of(plain(left), plain(right)), Joined{static_cast<std::uint32_t>(rank), plain(both)});
    }
  }

 private:
  static std::uint64_t pair_of(Token a, Token b) {
    return static_cast<std::uint64_t>(static_cast<std::uint32_t>(a)) << 32 | static_cast<std::uint32_t>(b);
  }

  void encode_plain(std::string_view text, std::vector<Token>& ids) const override {
    Merger merger;
    const auto join = [&](const Symbol& left, const Symbol& right) {
      const auto merge = merges_.find(pair_of(left.id, right.id));
      return merge == merges_.end() ? Joined{} : merge->second;
    };
    pretokenizer_.split(text, [&](std::string_view piece) {
      if (pretokenizer_.whole_tokens()) {
        std::string written;
        for (char c : piece) written += characters_[static_cast<unsigned char>(c)];
        if (const Token id = plain(written); id >= 0) return ids.push_back(id);
      }
      for (size_t i = 0; i < piece.size(); ++i)
        merger.add({static_cast<std::uint32_t>(i), 1, byte_token_[static_cast<unsigned char>(piece[i])]});
      merger.run(join, [&](const Symbol& symbol) { ids.push_back(symbol.id); });
    });
  }

  std::string decode_plain(Token id) const override {
    const std::string& written = text(id);
    if (kind(id) != TokenKind::normal) return written;  // matched on the raw text, or not written by heed at all
    std::string bytes;
    for (size_t at = 0; at < written.size();) {
      const size_t n = utf8_length(written[at]);
      const auto it = byte_of_.find(std::string_view(written).substr(at, n));
      if (it == byte_of_.end()) return written;  // not byte-level text: as it stands
      bytes += it->second;
      at += n;
    }
    return bytes;
  }

  Pretokenizer pretokenizer_;
  std::array<std::string, 256> characters_;
  std::array<Token, 256> byte_token_{};
  std::unordered_map<std::string_view, char> byte_of_;  // into characters_
  std::unordered_map<std::uint64_t, Joined> merges_;
};

}  // namespace

std::unique_ptr<Tokenizer> make_byte_pair(Vocabulary vocabulary) {
  return std::make_unique<BytePair>(std::move(vocabulary));
}

}  // namespace heed::model
