// Queries choose blocks of keys by the blocks' mean keys: what moba's kinds share.
#pragma once

#include "heed/mechanism/documents.h"
#include "heed/plan/select.h"

namespace heed::mechanism {

struct BlockRouter {
  Index block = 1;  // tokens
  /// Blocks per query. When causal its own block is one of them, always, and the others are past blocks;
  /// else all blocks compete and none is sure.
  Index top_k = 1;
  Ties ties = Ties::lower;
  Index sink = 0;                   // causal only: first tokens of a document that every query sees
  const KeyValues* keys = nullptr;  // whose means are scored
  Index source = 0;                 // of the plan, with the same keys: what is attended
};

/// Gives `plan`, which has one lane per query head, its cuts and its emit. Blocks start anew at every document, and
/// queries choose inside their own.
void route_blocks(const BlockRouter& router, const Inputs& in, const Documents& documents, Plan& plan);

}  // namespace heed::mechanism
