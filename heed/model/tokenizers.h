// The kinds of tokenizer, each behind its maker.
#pragma once

#include "heed/model/tokenizer.h"

namespace heed::model {

/// Byte-level BPE: text is cut by the pre-tokenizer's patterns, then pairs merge by rank.
std::unique_ptr<Tokenizer> make_byte_pair(Vocabulary vocabulary);
/// SentencePiece's kind: characters merge into the piece of highest score, leftmost among equals.
std::unique_ptr<Tokenizer> make_sentence_pieces(Vocabulary vocabulary);

}  // namespace heed::model
