#include "heed/mechanism/registry.h"

#include <fmt/format.h>

namespace heed {

const std::vector<const Mechanism*>& mechanisms() {
  using namespace mechanism;
  static const std::vector<const Mechanism*> table{
      &dense(),      &streaming(),
      &moba(),       &flash_moba(),
      &vmoba(),      &power(),
      &hip(),        &dhsa(),
      &psa(),        &dma(),
      &landmark(),   &combiner(),
      &proxy_attn(), &seer_attention(),
      &natten(),     &gna(),
      &hilo(),       &sparsifiner(),
      &davit(),      &s2(),
      &moa(),        &blockrank(),
      &paro(),       &llsa(),
      &biformer(),   &routing_transformer(),
      &pbs_attn(),   &gated_attention(),
      &flex(),
  };
  return table;
}

const Mechanism& find_mechanism(std::string_view name) {
  std::vector<std::string> known;
  for (const Mechanism* m : mechanisms()) {
    if (m->name == name) return *m;
    known.push_back(m->name);
  }
  fail_usage("mechanism = {}, expected one of {}", name, fmt::join(known, ", "));
}

}  // namespace heed
