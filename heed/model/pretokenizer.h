// Cuts text into the pieces that byte-level BPE works on, by regular expressions (PCRE2).
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace heed::model {

class Pretokenizer {
 public:
  /// `name` as in tokenizer.ggml.pre. Throws Error for an unknown one, listing those known.
  explicit Pretokenizer(const std::string& name);
  ~Pretokenizer();
  Pretokenizer(const Pretokenizer&) = delete;
  Pretokenizer& operator=(const Pretokenizer&) = delete;

  /// Hands the pieces of valid UTF-8 text to `take`, in order; together they are the text.
  void split(std::string_view text, const std::function<void(std::string_view)>& take) const;
  /// True when a piece that is a token as a whole is not built from merges.
  bool whole_tokens() const { return whole_tokens_; }

 private:
  struct Stage;
  std::vector<std::unique_ptr<Stage>> stages_;  // each cuts what the one before left
  bool whole_tokens_ = false;
};

}  // namespace heed::model
