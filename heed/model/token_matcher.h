// Finds tokens that are matched on the raw text: user-defined ones always, control ones on request.
#pragma once

#include <array>
#include <cstdint>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "heed/model/tokenizer.h"

namespace heed::model {

/// A trie over bytes.
class TokenMatcher {
 public:
  struct Match {
    Token id = -1;  // -1: none
    size_t size = 0;
  };

  /// `control`: matched only when asked for. An empty text is never matched.
  void add(std::string_view text, Token id, bool control) {
    if (text.empty()) return;
    std::uint32_t node = 0;
    for (const char c : text) {
      const auto [edge, inserted] = edges_.try_emplace(key(node, c), static_cast<std::uint32_t>(ends_.size()));
      if (inserted) ends_.emplace_back();
      node = edge->second;
    }
    if (ends_[node].id < 0) ends_[node] = {id, control};
    starts_[static_cast<unsigned char>(text.front())] = true;
  }

  /// The longest token at the beginning of `text`.
  Match longest(std::string_view text, bool special) const {
    Match best;
    if (text.empty() || !starts_[static_cast<unsigned char>(text.front())]) return best;
    std::uint32_t node = 0;
    for (size_t i = 0; i < text.size(); ++i) {
      const auto edge = edges_.find(key(node, text[i]));
      if (edge == edges_.end()) break;
      node = edge->second;
      if (ends_[node].id >= 0 && (special || !ends_[node].control)) best = {ends_[node].id, i + 1};
    }
    return best;
  }

 private:
  struct End {
    Token id = -1;
    bool control = false;
  };
  static std::uint64_t key(std::uint32_t node, char c) {
    return std::uint64_t{node} << 8 | static_cast<unsigned char>(c);
  }

  std::unordered_map<std::uint64_t, std::uint32_t> edges_;  // (node, byte) to node
  std::vector<End> ends_{1};                                // by node; 0 is the root
  std::array<bool, 256> starts_{};
};

}  // namespace heed::model
