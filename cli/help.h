// How --help reads.
#pragma once

#include <CLI/CLI.hpp>

namespace heed::cli {

/// Usage, arguments, options wrapped to the width of a page, the options that all commands share,
/// examples.
class Help : public CLI::Formatter {
 public:
  std::string make_help(const CLI::App* app, std::string name, CLI::AppFormatMode mode) const override;
};

}  // namespace heed::cli
