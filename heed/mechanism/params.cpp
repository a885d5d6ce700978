#include "heed/mechanism/params.h"

#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <cmath>

#include "heed/base/error.h"

namespace heed {
namespace {

bool parse_integer(std::string_view text, Index& out) {
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), out);
  return error == std::errc() && end == text.data() + text.size();
}

bool parse_number(std::string_view text, double& out) {
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), out);
  return error == std::errc() && end == text.data() + text.size() && std::isfinite(out);
}

bool parse_boolean(std::string_view text, bool& out) {
  out = text == "true" || text == "1";
  return out || text == "false" || text == "0";
}

// "5x6x7" to {5, 6, 7}.
bool parse_list(std::string_view text, std::vector<Index>& out) {
  out.clear();
  while (!text.empty()) {
    const size_t x = text.find('x');
    Index value;
    if (!parse_integer(text.substr(0, x), value)) return false;
    out.push_back(value);
    if (x == std::string_view::npos) return true;
    text.remove_prefix(x + 1);
    if (text.empty()) return false;
  }
  return true;
}

std::string range_of(const ParamSpec& s) {
  const bool low = s.least > -1e299, high = s.most < 1e299;
  if (low && high) return fmt::format("{} {} … {}", s.above_least ? "above" : "", s.least, s.most);
  if (low) return fmt::format("{} {}", s.above_least ? ">" : ">=", s.least);
  if (high) return fmt::format("<= {}", s.most);
  return "";
}

void check(const std::string& owner, const ParamSpec& s, const std::string& text) {
  const auto refuse = [&](const std::string& expected) {
    fail_usage("{}: {} = {}, expected {}", owner, s.name, text, expected);
  };
  const auto in_range = [&](double x) { return (s.above_least ? x > s.least : x >= s.least) && x <= s.most; };
  const auto expected_range = [&](const char* kind) {
    const bool low = s.least > -1e299, high = s.most < 1e299;
    if (low && high && s.above_least) return fmt::format("above {} and at most {}", s.least, s.most);
    if (low && high) return fmt::format("{} … {}", s.least, s.most);
    const std::string range = range_of(s);
    return range.empty() ? std::string(kind) : range;
  };
  switch (s.kind) {
    case ParamKind::integer: {
      Index x;
      if (!parse_integer(text, x)) refuse("an integer");
      if (!in_range(static_cast<double>(x))) refuse(expected_range("an integer"));
      return;
    }
    case ParamKind::number: {
      double x;
      if (!parse_number(text, x)) refuse("a number");
      if (!in_range(x)) refuse(expected_range("a number"));
      return;
    }
    case ParamKind::boolean: {
      bool x;
      if (!parse_boolean(text, x)) refuse("true or false");
      return;
    }
    case ParamKind::choice:
      if (std::find(s.choices.begin(), s.choices.end(), text) == s.choices.end())
        refuse(fmt::format("one of {}", fmt::join(s.choices, ", ")));
      return;
    case ParamKind::list: {
      std::vector<Index> values;
      if (!parse_list(text, values) || values.size() > 4) refuse("a number or numbers joined by x, such as 4x6");
      for (Index x : values)
        if (!in_range(static_cast<double>(x))) refuse(fmt::format("values {}", expected_range("")));
      return;
    }
    case ParamKind::levels: return;  // the mechanism reads and checks it
  }
}

ParamSpec spec(std::string name, ParamKind kind, std::string fallback, std::string help) {
  ParamSpec s;
  s.name = std::move(name);
  s.kind = kind;
  s.fallback = std::move(fallback);
  s.help = std::move(help);
  return s;
}

}  // namespace

ParamSpec integer(std::string name, Index fallback, Index least, std::string help) {
  return integer(std::move(name), fallback, least, Index{1} << 40, std::move(help));
}

ParamSpec integer(std::string name, Index fallback, Index least, Index most, std::string help) {
  ParamSpec s = spec(std::move(name), ParamKind::integer, fmt::format("{}", fallback), std::move(help));
  s.least = static_cast<double>(least);
  s.most = most >= Index{1} << 40 ? 1e300 : static_cast<double>(most);
  return s;
}

ParamSpec number(std::string name, double fallback, double least, double most, std::string help) {
  ParamSpec s = spec(std::move(name), ParamKind::number, fmt::format("{}", fallback), std::move(help));
  s.least = least, s.most = most;
  return s;
}

ParamSpec share(std::string name, double fallback, std::string help) {
  ParamSpec s = number(std::move(name), fallback, 0, 1, std::move(help));
  s.above_least = true;
  return s;
}

ParamSpec boolean(std::string name, bool fallback, std::string help) {
  return spec(std::move(name), ParamKind::boolean, fallback ? "true" : "false", std::move(help));
}

ParamSpec choice(std::string name, std::string fallback, std::vector<std::string> choices, std::string help) {
  ParamSpec s = spec(std::move(name), ParamKind::choice, std::move(fallback), std::move(help));
  s.choices = std::move(choices);
  return s;
}

ParamSpec list(std::string name, std::string fallback, Index least, std::string help) {
  ParamSpec s = spec(std::move(name), ParamKind::list, std::move(fallback), std::move(help));
  s.least = static_cast<double>(least);
  return s;
}

Params::Params(std::string owner, const std::vector<ParamSpec>& specs,
               const std::vector<std::pair<std::string, std::string>>& given)
    : owner_(std::move(owner)) {
  for (size_t i = 0; i < given.size(); ++i) {
    const std::string& name = given[i].first;
    if (std::none_of(specs.begin(), specs.end(), [&](const ParamSpec& s) { return s.name == name; })) {
      std::vector<std::string> known;
      for (const ParamSpec& s : specs) known.push_back(s.name);
      if (known.empty()) fail_usage("{}: {} = {}, expected no parameters", owner_, name, given[i].second);
      fail_usage("{}: {} = {}, expected one of the parameters {}", owner_, name, given[i].second,
                 fmt::join(known, ", "));
    }
    for (size_t j = 0; j < i; ++j)
      if (given[j].first == name)
        fail_usage("{}: {} = {}, expected once, was also {}", owner_, name, given[i].second, given[j].second);
    given_.push_back(name);
  }
  for (const ParamSpec& s : specs) {
    const auto it = std::find_if(given.begin(), given.end(), [&](const auto& g) { return g.first == s.name; });
    if (it == given.end() && s.required) fail_usage("{}: {} is missing, expected {}", owner_, s.name, s.help);
    const std::string value = it == given.end() ? s.fallback : it->second;
    if (it != given.end()) check(owner_, s, value);
    values_.emplace_back(s.name, value);
  }
}

const std::string& Params::value(std::string_view name) const {
  for (const auto& [key, text] : values_)
    if (key == name) return text;
  fail("{}: has no parameter {}", owner_, name);
}

Index Params::integer(std::string_view name) const {
  Index x = 0;
  parse_integer(value(name), x);
  return std::min(x, Index{1} << 40);  // beyond any length, and sums and round-ups cannot overflow
}

double Params::number(std::string_view name) const {
  double x = 0;
  parse_number(value(name), x);
  return x;
}

bool Params::boolean(std::string_view name) const {
  bool x = false;
  parse_boolean(value(name), x);
  return x;
}

const std::string& Params::text(std::string_view name) const { return value(name); }

std::vector<Index> Params::list(std::string_view name) const {
  std::vector<Index> x;
  parse_list(value(name), x);
  return x;
}

bool Params::given(std::string_view name) const {
  return std::find(given_.begin(), given_.end(), name) != given_.end();
}

MechanismCall MechanismCall::parse(std::string_view text) {
  MechanismCall call;
  const size_t colon = text.find(':');
  call.name = std::string(text.substr(0, colon));
  if (call.name.empty()) fail_usage("mechanism = {}, expected NAME or NAME:parameter=value,…", text);
  if (colon == std::string_view::npos) return call;

  // A comma starts a parameter only where a name and an equals sign follow.
  const auto starts_parameter = [&](size_t at) {
    size_t i = at;
    while (i < text.size() && (std::isalnum(static_cast<unsigned char>(text[i])) != 0 || text[i] == '_')) ++i;
    return i > at && i < text.size() && text[i] == '=' && std::isdigit(static_cast<unsigned char>(text[at])) == 0;
  };
  size_t at = colon + 1;
  while (at < text.size()) {
    if (!starts_parameter(at))
      fail_usage("mechanism = {}, expected parameter=value after {}", text, text.substr(0, at));
    const size_t equals = text.find('=', at);
    size_t end = equals + 1;
    while (end < text.size() && !(text[end] == ',' && starts_parameter(end + 1))) ++end;
    call.params.emplace_back(text.substr(at, equals - at), text.substr(equals + 1, end - equals - 1));
    at = end + 1;
    if (end + 1 == text.size()) fail_usage("mechanism = {}, expected a parameter after the last comma", text);
  }
  if (call.params.empty()) fail_usage("mechanism = {}, expected parameter=value after the colon", text);
  return call;
}

std::string MechanismCall::text() const {
  std::string out = name;
  for (size_t i = 0; i < params.size(); ++i)
    out += fmt::format("{}{}={}", i == 0 ? ':' : ',', params[i].first, params[i].second);
  return out;
}

}  // namespace heed
