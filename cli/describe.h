// What a mechanism says of itself, in words.
#pragma once

#include <string>

#include "heed/mechanism/mechanism.h"

namespace heed::cli {

/// "none", "continued", "required".
std::string training_name(Training training);
/// "either", "implied", "refused": whether the caller may say --causal.
std::string causality_name(Causality causality);
std::string kind_name(ParamKind kind);
/// "2502.13189", or "" for a paper that is not on arXiv.
std::string arxiv_number(const Mechanism& m);

}  // namespace heed::cli
