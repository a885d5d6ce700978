// The kinds of tokenizer, each behind its maker.
#pragma once

#include <array>
#include <string>

#include "heed/model/tokenizer.h"

namespace heed::model {

/// The character that stands for each byte in byte-level BPE: itself where it is printable Latin-1, else from U+0100
/// on.
std::array<std::string, 256> byte_characters();
/// Byte-level BPE: text is cut by the pre-tokenizer's patterns, then pairs merge by rank.
std::unique_ptr<Tokenizer> make_byte_pair(Vocabulary vocabulary);
/// SentencePiece's kind: characters merge into the piece of highest score, leftmost among equals.
std::unique_ptr<Tokenizer> make_sentence_pieces(Vocabulary vocabulary);

}  // namespace heed::model
