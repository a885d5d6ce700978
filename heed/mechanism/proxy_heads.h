// Proxy heads: the means of groups of heads, and how well they stand for each of them.
#pragma once

#include "heed/mechanism/mechanism.h"

namespace heed::mechanism {

/// Mean query of query heads [first, first + heads) at `token`: out [D].
void mean_query(const Queries& queries, Index b, Index first, Index heads, Index token, float* out);

/// Of one layer's attention over a calibration text (B = 1, M = N): `overlap` f32 [C, Hq] for the C numbers of proxy
/// heads that are tried, 1 and then each time the least divisor of Hk that is at least twice the one before. An
/// entry is the share of a head's top 5 % of keys, by the weight that its last `block` queries give them, that are
/// also in the top 5 % of its proxy.
NamedTensors calibrate_proxy_heads(const Params& params, const Inputs& in);

/// proxy_heads = the first number tried whose median overlap over all heads and layers is at least a half, else the
/// last: the rule of the sheet, which is ours and not the paper's.
ParamTexts settle_proxy_heads(const Params& params, const std::vector<NamedTensors>& layers);

}  // namespace heed::mechanism
