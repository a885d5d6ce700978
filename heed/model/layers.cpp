// Which layers a mechanism replaces: "0,3,5-9,20-".

#include <algorithm>
#include <charconv>
#include <set>
#include <string_view>

#include "heed/model/model.h"

namespace heed::model {
namespace {

[[noreturn]] void malformed(const std::string& text) {
  fail_usage("layers = \"{}\", expected numbers and ranges such as 0,3,5-9,20-", text);
}

Index number(std::string_view part, const std::string& text) {
  Index n = 0;
  const auto [end, error] = std::from_chars(part.data(), part.data() + part.size(), n);
  const bool digits = std::all_of(part.begin(), part.end(), [](char c) { return c >= '0' && c <= '9'; });
  if (part.empty() || !digits || error != std::errc{} || end != part.data() + part.size()) malformed(text);
  return n;
}

}  // namespace

std::vector<Index> parse_layers(const std::string& text, const ModelInfo& info) {
  std::set<Index> layers;
  for (size_t at = 0; at <= text.size();) {
    const size_t comma = std::min(text.find(',', at), text.size());
    const std::string_view part = std::string_view(text).substr(at, comma - at);
    at = comma + 1;

    const size_t dash = part.find('-');
    const Index first = number(part.substr(0, dash), text);
    Index last = first;
    if (dash != part.npos) last = dash + 1 == part.size() ? info.layers - 1 : number(part.substr(dash + 1), text);
    if (first >= info.layers || last >= info.layers)
      fail_usage("layers = \"{}\": no layer {}, expected 0 … {}", text, std::max(first, last), info.layers - 1);
    if (first > last) malformed(text);
    for (Index i = first; i <= last; ++i) {
      if (info.local[static_cast<size_t>(i)])
        fail_usage(
            "layers = \"{}\": layer {} has the model's own sliding window, expected layers with global attention", text,
            i);
      layers.insert(i);
    }
  }
  return {layers.begin(), layers.end()};
}

}  // namespace heed::model
