// A mechanism's parameters: what may be said, and what was said.
#pragma once

#include <map>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "heed/base/types.h"

namespace heed {

enum class ParamKind : std::uint8_t { integer, number, boolean, choice, list, levels };

/// One parameter. `fallback` is the default in the spelling of the command line.
struct ParamSpec {
  std::string name;
  ParamKind kind = ParamKind::integer;
  std::string fallback;
  std::string help;                  // one line, units included
  double least = -1e300, most = 1e300;
  bool above_least = false;          // exclusive lower bound
  std::vector<std::string> choices;  // kind choice
  bool required = false;
};

/// Short ways to write a ParamSpec.
ParamSpec integer(std::string name, Index fallback, Index least, std::string help);
ParamSpec integer(std::string name, Index fallback, Index least, Index most, std::string help);
ParamSpec number(std::string name, double fallback, double least, double most, std::string help);
/// A number above 0, at most 1.
ParamSpec share(std::string name, double fallback, std::string help);
ParamSpec boolean(std::string name, bool fallback, std::string help);
ParamSpec choice(std::string name, std::string fallback, std::vector<std::string> choices, std::string help);
/// "5x6x7" or one number; per-axis values.
ParamSpec list(std::string name, std::string fallback, Index least, std::string help);

/// Checked values by name. The owner's name stands in messages: "moba: top_k = 0, expected >= 1".
class Params {
 public:
  /// Checks every given value against its spec and fills in defaults. Throws UsageError naming an
  /// unknown parameter (listing the known), a malformed or out-of-range value, a missing required one.
  Params(std::string owner, const std::vector<ParamSpec>& specs,
         const std::vector<std::pair<std::string, std::string>>& given);

  Index integer(std::string_view name) const;
  double number(std::string_view name) const;
  bool boolean(std::string_view name) const;
  const std::string& text(std::string_view name) const;
  /// Values of a list; an empty text gives an empty list.
  std::vector<Index> list(std::string_view name) const;
  bool given(std::string_view name) const;

  const std::string& owner() const { return owner_; }
  /// Every value, in the order of the specs, as text.
  const std::vector<std::pair<std::string, std::string>>& values() const { return values_; }

 private:
  const std::string& value(std::string_view name) const;
  std::string owner_;
  std::vector<std::pair<std::string, std::string>> values_;
  std::vector<std::string> given_;
};

/// "NAME[:p=v,…]" taken apart. A comma starts a parameter only before `name=`, so values may hold commas.
struct MechanismCall {
  std::string name;
  std::vector<std::pair<std::string, std::string>> params;
  /// Throws UsageError for text that is not of that form.
  static MechanismCall parse(std::string_view text);
  /// The text again.
  std::string text() const;
};

}  // namespace heed
