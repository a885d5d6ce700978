// The table of mechanisms: an explicit list, as a self-registering global would vanish from a
// static library. A new mechanism is one file and one line in registry.cpp.
#pragma once

#include <algorithm>

#include "heed/mechanism/mechanism.h"

namespace heed::mechanism {

const Mechanism& dense();
const Mechanism& streaming();
const Mechanism& moba();
const Mechanism& flash_moba();
const Mechanism& vmoba();
const Mechanism& power();
const Mechanism& hip();
const Mechanism& dhsa();
const Mechanism& dma();
const Mechanism& landmark();
const Mechanism& combiner();
const Mechanism& proxy_attn();
const Mechanism& seer_attention();
const Mechanism& natten();
const Mechanism& gna();
const Mechanism& hilo();
const Mechanism& sparsifiner();
const Mechanism& psa();
const Mechanism& davit();
const Mechanism& s2();
const Mechanism& moa();
const Mechanism& blockrank();
const Mechanism& paro();
const Mechanism& llsa();
const Mechanism& biformer();
const Mechanism& routing_transformer();
const Mechanism& pbs_attn();
const Mechanism& gated_attention();
const Mechanism& flex();

}  // namespace heed::mechanism
