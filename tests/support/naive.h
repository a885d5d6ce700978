// Attention straight from its definition, in f64, query by query: what the tests compare with.
// Nothing here uses heed's arithmetic.
#pragma once

#include <functional>
#include <vector>

#include "support/cases.h"

namespace heed::test {

/// Whether query t (0 … N-1) of head h sees key j.
using Sees = std::function<bool(Index b, Index h, Index t, Index j)>;
/// What becomes of a scaled score.
using Change = std::function<double(Index b, Index h, Index t, Index j, double score)>;

struct Naive {
  std::vector<double> o, lse;     // [B, Hq, N, Dv], [B, Hq, N]
  std::vector<char> undecided;    // [B, Hq, N]: rows that no check may judge, or empty
  Index pairs = 0;                // pairs seen, all heads
};

struct NaiveOptions {
  double scale = 0;                // 0: D^-1/2
  Change change = nullptr;
  std::vector<double> sinks = {};  // per query head: adds exp(sink) to the denominator
};

Naive naive_attention(const Case& c, const Sees& sees, const NaiveOptions& options = {});

/// Query t stands at M - N + t.
inline Index position(const Case& c, Index t) { return c.size.M - c.size.N + t; }

/// Documents as the tests hand them over: ids [B · M], or nothing for one document.
using Docs = std::vector<std::int32_t>;
/// First position of the document that position j of batch b belongs to.
Index document_start(const Case& c, const Docs& docs, Index b, Index j);
bool same_document(const Case& c, const Docs& docs, Index b, Index i, Index j);

Sees dense_sees(const Case& c, bool causal);
/// The last `window` positions, the own one included, and the first `sink`.
Sees streaming_sees(const Case& c, Index sink, Index window, const Docs& docs = {});
/// Block pairs at distance < window_blocks or a power of two, and the first sink_blocks blocks.
Sees power_sees(const Case& c, Index block, Index window_blocks, Index sink_blocks);

struct MobaOptions {
  Index block = 32, top_k = 3, sink = 0;
  bool higher = false;   // among equal scores
  double margin = 1e-4;  // rows whose choice is nearer to flipping are undecided
};
struct MobaChoice {
  Sees sees;
  std::vector<char> undecided;  // [B, Hq, N]
};
/// Own block up to the query, and the top_k - 1 earlier blocks with the largest mean key · query.
MobaChoice moba_sees(const Case& c, const MobaOptions& options, const Docs& docs = {});
Naive naive_moba(const Case& c, const MobaOptions& options, const Docs& docs = {});

/// "" when o and lse agree with the reference, else where and by how much they differ. o is measured
/// in units of its head's largest |o|, lse absolutely up to 1 and relatively above.
std::string difference(const Got& got, const Naive& want, const Case& c, double tolerance);

/// What outside checks allow: 2e-5 in f32, 2e-2 in bf16.
double tolerance(DType arithmetic);

}  // namespace heed::test

/// Compares and shows the worst element when it fails.
#define CHECK_AGREES(got, want, c)                                                                            \
  do {                                                                                                        \
    const std::string differs_ = heed::test::difference(got, want, c, heed::test::tolerance((c).arithmetic)); \
    CHECK_MESSAGE(differs_.empty(), (c).describe(), ": ", differs_);                                          \
  } while (false)

/// The call throws `type` with exactly this line.
#define CHECK_FAILS(expression, type, line) \
  CHECK_THROWS_WITH_AS(static_cast<void>(expression), doctest::String(std::string(line).c_str()), type)
