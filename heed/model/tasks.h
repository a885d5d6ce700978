// Was anything forgotten? A key hidden in a long text, and a passage that occurs twice.
#pragma once

#include <string>
#include <vector>

#include "heed/model/compare.h"

namespace heed::model {

/// A pass key question that can be put to any session.
struct PasskeyTask {
  Index length = 0;  // tokens, the space that is fed last included
  double depth = 0;
  std::uint64_t seed = 0;
  std::string key;
  std::vector<Token> prompt;
};
PasskeyTask make_passkey(const Model& model, const std::string& document, Index length, double depth,
                         std::uint64_t seed);
/// Asks in an empty session.
PasskeyResult ask(const Model& model, const PasskeyTask& task, Session& session, const Progress& progress);

/// 50 tokens, a passage of 200 from elsewhere, `gap` tokens, the passage again.
struct CopyTask {
  Index gap = 0;
  std::uint64_t seed = 0;
  std::vector<Token> tokens;
  Index first = 0, second = 0;  // where the passages begin
};
/// `document` holds ids without BOS; throws Error when they are too few.
CopyTask make_copy(const Model& model, const std::vector<Token>& document, Index gap, std::uint64_t seed);
/// Reads and scores in an empty session.
CopyResult measure(const CopyTask& task, Session& session, const Progress& progress);

}  // namespace heed::model
