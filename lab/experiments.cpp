#include <fmt/format.h>
#include <fmt/ranges.h>

#include "heed/base/error.h"
#include "lab/experiment.h"

namespace heed::lab {

const std::vector<const Experiment*>& experiments() {
  static const std::vector<const Experiment*> all{&gate(), &moba(), &moba_continued()};
  return all;
}

const Experiment& find_experiment(const std::string& name) {
  std::vector<std::string> names;
  for (const Experiment* e : experiments()) {
    if (e->name == name) return *e;
    names.push_back(e->name);
  }
  fail_usage("lab: no experiment {}, expected one of {}", name, fmt::join(names, ", "));
}

}  // namespace heed::lab
