// Packed documents and padding: extra tensors that several mechanisms take.
#pragma once

#include <span>
#include <vector>

#include "heed/mechanism/mechanism.h"

namespace heed::mechanism {

/// Tokens [begin, end) of one document.
struct Document {
  Index begin = 0, end = 0;
};

/// The documents of every batch, in order; one that spans everything where none were given.
struct Documents {
  std::vector<std::vector<Document>> of;  // [B]
  /// The documents that have a token in [begin, end).
  std::span<const Document> meeting(Index b, Index begin, Index end) const;
  /// The document of one token.
  const Document& at(Index b, Index token) const { return meeting(b, token, token + 1).front(); }
};

/// `doc` i32 [B, M]: runs of equal numbers are documents, and tokens of different ones never meet.
ExtraSpec document_spec();
/// `key_mask` u8 [B, M]: 0 hides a key from every query.
ExtraSpec key_mask_spec();

/// Reads `doc`. Throws Error for a document number that comes back after another, and for more queries than keys, as
/// the first of them would stand in no document.
Documents read_documents(const Inputs& in);
/// The same, and limits the plan to them.
Documents apply_documents(const Inputs& in, Plan& plan);
/// Reads `key_mask` and hides its keys.
void apply_key_mask(const Inputs& in, Plan& plan);

}  // namespace heed::mechanism
