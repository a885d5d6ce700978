#include "cli/describe.h"

namespace heed::cli {

std::string training_name(Training training) {
  switch (training) {
    case Training::none: return "none";
    case Training::continued: return "continued";
    case Training::required: return "required";
  }
  return "?";
}

std::string causality_name(Causality causality) {
  switch (causality) {
    case Causality::either: return "either";
    case Causality::implied: return "implied";
    case Causality::refused: return "refused";
  }
  return "?";
}

std::string kind_name(ParamKind kind) {
  switch (kind) {
    case ParamKind::integer: return "integer";
    case ParamKind::number: return "number";
    case ParamKind::boolean: return "boolean";
    case ParamKind::choice: return "choice";
    case ParamKind::list: return "list";
    case ParamKind::levels: return "levels";
  }
  return "?";
}

std::string arxiv_number(const Mechanism& m) {
  const std::string prefix = "arXiv:";
  return m.paper.rfind(prefix, 0) == 0 ? m.paper.substr(prefix.size()) : "";
}

}  // namespace heed::cli
