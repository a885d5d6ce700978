#include "cli/options.h"

#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <fstream>
#include <limits>

#include "heed/base/error.h"

namespace heed::cli {
namespace {

template <class Number>
bool parse(std::string_view text, Number& out) {
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), out);
  return error == std::errc() && end == text.data() + text.size();
}

bool whole_inside(const std::string& text, Index least, Index most, Index& x) {
  return parse(text, x) && x >= least && x <= most;
}
bool real_inside(const std::string& text, double least, double most, double& x) {
  return parse(text, x) && std::isfinite(x) && x >= least && x <= most;
}

std::string expected_whole(Index least, Index most) {
  return most == std::numeric_limits<Index>::max() ? fmt::format("an integer >= {}", least)
                                                   : fmt::format("an integer {} … {}", least, most);
}
std::string expected_real(double least, double most) {
  const double huge = std::numeric_limits<double>::max();
  if (least <= -huge && most >= huge) return "a number";
  return most >= huge ? fmt::format("a number >= {}", least) : fmt::format("a number {} … {}", least, most);
}

CLI::Validator validator(std::string expected, std::function<bool(const std::string&)> accepts) {
  return CLI::Validator(
      [expected = std::move(expected), accepts = std::move(accepts)](std::string& text) {
        return accepts(text) ? std::string() : fmt::format("{}, expected {}", text, expected);
      },
      "");
}

template <class Number>
std::vector<Number> numbers(const std::string& option, const std::string& text, const std::string& expected,
                            auto accepts) {
  std::vector<Number> list;
  for (const std::string& part : comma_parts(text)) {
    Number x{};
    if (!accepts(part, x)) fail_usage("{}: {}, expected {}", option, part, expected);
    list.push_back(x);
  }
  return list;
}

}  // namespace

CLI::Validator whole_number(Index least, Index most) {
  return validator(expected_whole(least, most), [=](const std::string& text) {
    Index x = 0;
    return whole_inside(text, least, most, x);
  });
}
CLI::Validator whole_number(Index least) { return whole_number(least, std::numeric_limits<Index>::max()); }

CLI::Validator real_number(double least, double most) {
  return validator(expected_real(least, most), [=](const std::string& text) {
    double x = 0;
    return real_inside(text, least, most, x);
  });
}

CLI::Validator one_of(std::vector<std::string> names) {
  const std::string expected = fmt::format("{}", fmt::join(names, names.size() == 2 ? " or " : ", "));
  return validator(expected, [names = std::move(names)](const std::string& text) {
    return std::find(names.begin(), names.end(), text) != names.end();
  });
}

std::vector<std::string> comma_parts(const std::string& text) {
  std::vector<std::string> parts;
  for (size_t at = 0; at <= text.size();) {
    const size_t comma = std::min(text.find(',', at), text.size());
    parts.push_back(text.substr(at, comma - at));
    at = comma + 1;
  }
  return parts;
}

std::vector<Index> whole_numbers(const std::string& option, const std::string& text, Index least, Index most) {
  return numbers<Index>(option, text, expected_whole(least, most),
                        [&](const std::string& part, Index& x) { return whole_inside(part, least, most, x); });
}

std::vector<double> real_numbers(const std::string& option, const std::string& text, double least, double most) {
  return numbers<double>(option, text, expected_real(least, most),
                         [&](const std::string& part, double& x) { return real_inside(part, least, most, x); });
}

DType dtype_named(const std::string& name) {
  return name == "bf16" ? DType::bf16 : name == "q8_0" ? DType::i8 : DType::f32;
}

void MechanismOptions::add(CLI::App& command, bool several, const std::string& help) {
  auto* option = command.add_option("--mechanism", texts, help)->type_name("M")->allow_extra_args(false);
  if (several) option->take_all();
  else option->expected(1)->multi_option_policy(CLI::MultiOptionPolicy::Throw);
  command.add_option("--set", settings, "One more parameter of the one mechanism named; may be repeated")
      ->type_name("P=V")
      ->allow_extra_args(false)
      ->take_all();
}

std::pair<std::string, std::string> setting_of(const std::string& text) {
  const size_t equals = text.find('=');
  if (equals == std::string::npos || equals == 0) fail_usage("--set: {}, expected parameter=value", text);
  return {text.substr(0, equals), text.substr(equals + 1)};
}

std::vector<MechanismCall> MechanismOptions::calls(const std::vector<std::string>& otherwise) const {
  std::vector<MechanismCall> list;
  for (const std::string& text : texts.empty() ? otherwise : texts) list.push_back(MechanismCall::parse(text));
  if (!settings.empty() && list.size() != 1)
    fail_usage("--set: {}, expected only where one mechanism is named, here are {}", settings.front(), list.size());
  for (const std::string& text : settings) list.front().params.push_back(setting_of(text));
  for (const MechanismCall& call : list) {
    const Mechanism& m = find_mechanism(call.name);
    Params(m.name, m.params, call.params);
  }
  return list;
}

Json params_json(const MechanismCall& call) {
  const Mechanism& m = find_mechanism(call.name);
  const Params params(m.name, m.params, call.params);
  Json json = Json::object();
  for (const ParamSpec& spec : m.params) {
    const std::string& text = params.text(spec.name);
    switch (spec.kind) {
      case ParamKind::integer: json[spec.name] = params.integer(spec.name); break;
      case ParamKind::number: json[spec.name] = params.number(spec.name); break;
      case ParamKind::boolean: json[spec.name] = params.boolean(spec.name); break;
      default: json[spec.name] = text;
    }
    if (text.empty()) json[spec.name] = nullptr;
  }
  return json;
}

std::string json_text(const Json& json) { return json.dump(2, ' ', false, Json::error_handler_t::replace) + "\n"; }

std::string machine_name() {
  std::ifstream file("/proc/cpuinfo");
  for (std::string line; std::getline(file, line);)
    if (line.rfind("model name", 0) == 0)
      if (const size_t colon = line.find(": "); colon != std::string::npos) return line.substr(colon + 2);
  return "unknown processor";
}

}  // namespace heed::cli
