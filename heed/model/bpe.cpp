// Byte-level BPE as GPT-2 introduced it: bytes are written as printable characters, text is cut into
// pieces by patterns, and inside a piece the pair with the best rank merges first.

#include <array>
#include <queue>
#include <unordered_map>

#include "heed/base/error.h"
#include "heed/base/text.h"
#include "heed/model/pretokenizer.h"
#include "heed/model/tokenizers.h"
#include "heed/model/utf8.h"

namespace heed::model {
namespace {

// The character that stands for each byte: itself where it is printable Latin-1, else from U+0100 on.
std::array<std::string, 256> byte_characters() {
  std::array<std::string, 256> text;
  unsigned next = 256;
  for (unsigned b = 0; b < 256; ++b) {
    const bool itself = (b >= 33 && b <= 126) || (b >= 161 && b <= 172) || b >= 174;
    append_utf8(text[b], itself ? b : next++);
  }
  return text;
}

class BytePair final : public Tokenizer {
 public:
  explicit BytePair(Vocabulary v) : Tokenizer(std::move(v)), pretokenizer_(vocabulary_.pre), characters_(byte_characters()) {
    for (size_t b = 0; b < 256; ++b) {
      byte_of_[characters_[b]] = static_cast<char>(b);
      byte_token_[b] = plain(characters_[b]);
      encodable_[b] = byte_token_[b] >= 0;
      if (!encodable_[b] && (b == '\n' || (b >= ' ' && b <= '~'))) fail("tokenizer.ggml.tokens: no token for byte 0x{:02x}", b);
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
          fail("tokenizer.ggml.merges[{}] = \"{}\": \"{}\" is not a normal token", rank, printable(merge), printable(part));
      merges_.emplace(pair_of(plain(left), plain(right)), Merge{static_cast<std::int32_t>(rank), plain(both)});
    }
  }

 private:
  struct Merge {
    std::int32_t rank;
    Token result;
  };
  static std::uint64_t pair_of(Token a, Token b) {
    return static_cast<std::uint64_t>(static_cast<std::uint32_t>(a)) << 32 | static_cast<std::uint32_t>(b);
  }

  void encode_plain(std::string_view text, std::vector<Token>& ids) const override {
    pretokenizer_.split(text, [&](std::string_view piece) { encode_piece(piece, ids); });
  }

  // O(n log n): candidates wait in a heap; those whose symbols have changed since are dropped.
  void encode_piece(std::string_view piece, std::vector<Token>& ids) const {
    if (pretokenizer_.whole_tokens()) {
      std::string written;
      for (char c : piece) written += characters_[static_cast<unsigned char>(c)];
      if (const Token id = plain(written); id >= 0) return ids.push_back(id);
    }
    struct Symbol {
      Token id;
      std::int32_t previous, next;
    };
    struct Candidate {
      std::int32_t rank, left, right;
      Token left_id, right_id, result;
      bool operator<(const Candidate& o) const { return rank != o.rank ? rank > o.rank : left > o.left; }
    };
    const auto n = static_cast<std::int32_t>(piece.size());
    std::vector<Symbol> symbols(piece.size());
    for (std::int32_t i = 0; i < n; ++i) {
      const auto byte = static_cast<unsigned char>(piece[static_cast<size_t>(i)]);
      symbols[static_cast<size_t>(i)] = {byte_token_[byte], i - 1, i + 1 < n ? i + 1 : -1};
    }
    std::priority_queue<Candidate> heap;
    const auto offer = [&](std::int32_t left, std::int32_t right) {
      if (left < 0 || right < 0) return;
      const Token a = symbols[static_cast<size_t>(left)].id, b = symbols[static_cast<size_t>(right)].id;
      if (const auto it = merges_.find(pair_of(a, b)); it != merges_.end())
        heap.push({it->second.rank, left, right, a, b, it->second.result});
    };
    for (std::int32_t i = 0; i + 1 < n; ++i) offer(i, i + 1);
    while (!heap.empty()) {
      const Candidate best = heap.top();
      heap.pop();
      Symbol &left = symbols[static_cast<size_t>(best.left)], &right = symbols[static_cast<size_t>(best.right)];
      if (left.id != best.left_id || right.id != best.right_id || left.next != best.right) continue;
      left.id = best.result;
      left.next = right.next;
      right.id = -1;
      if (left.next >= 0) symbols[static_cast<size_t>(left.next)].previous = best.left;
      offer(left.previous, best.left);
      offer(best.left, left.next);
    }
    for (std::int32_t i = 0; i >= 0; i = symbols[static_cast<size_t>(i)].next) ids.push_back(symbols[static_cast<size_t>(i)].id);
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
  std::unordered_map<std::uint64_t, Merge> merges_;
};

}  // namespace

std::unique_ptr<Tokenizer> make_byte_pair(Vocabulary vocabulary) { return std::make_unique<BytePair>(std::move(vocabulary)); }

}  // namespace heed::model
