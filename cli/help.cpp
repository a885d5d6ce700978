#include "cli/help.h"

#include <fmt/format.h>

#include "cli/terminal.h"

namespace heed::cli {
namespace {

constexpr Index left_column = 26, page = 100;

// One entry: what is typed, and beside it what it does.
std::string entry(const std::string& left, const std::string& text) {
  std::string out = "  " + left;
  Index at = 2 + display_width(left);
  const auto indent = [&] {
    out += "\n" + std::string(left_column, ' ');
    at = left_column;
  };
  if (at + 2 > left_column) indent();
  else out += std::string(static_cast<size_t>(left_column - at), ' '), at = left_column;
  for (size_t begin = 0; begin < text.size();) {
    const size_t end = std::min(text.find(' ', begin), text.size());
    const std::string word = text.substr(begin, end - begin);
    if (at > left_column) {
      if (at + 1 + display_width(word) > page) indent();
      else out += " ", ++at;
    }
    out += word;
    at += display_width(word);
    begin = end + 1;
  }
  return out + "\n";
}

std::string typed(const CLI::Option* option) {
  if (option->get_positional()) return option->get_name(true, false);
  // A validator may have added its own words behind a colon.
  const std::string type = option->get_type_name().substr(0, option->get_type_name().find(':'));
  return option->get_name(false, true) + (option->get_type_size() == 0 || type.empty() ? "" : " " + type);
}

std::string options_of(const CLI::App* app, bool positional, const std::string& title) {
  std::string out;
  for (const CLI::Option* option : app->get_options()) {
    if (option->get_positional() != positional || option->get_group().empty()) continue;
    if (option == app->get_help_ptr() && app->get_parent() != nullptr) continue;  // among those of every command
    std::string text = option->get_description();
    if (!option->get_default_str().empty()) text += fmt::format(" [{}]", option->get_default_str());
    out += entry(typed(option), text);
  }
  return out.empty() ? out : "\n" + title + ":\n" + out;
}

}  // namespace

std::string Help::make_help(const CLI::App* app, std::string, CLI::AppFormatMode) const {
  std::string path = app->get_name(), usage;
  const CLI::App* root = app;
  while (root->get_parent() != nullptr) {
    root = root->get_parent();
    path.insert(0, root->get_name() + " ");
  }
  const auto commands = app->get_subcommands([](const CLI::App*) { return true; });
  usage = path;
  for (const CLI::Option* option : app->get_options())
    if (option->get_positional()) usage += " " + (option->get_required() ? typed(option) : "[" + typed(option) + "]");
  for (const CLI::Option* option : app->get_options())
    if (!option->get_positional() && option->get_required()) usage += " " + typed(option);
  if (!commands.empty()) usage += " COMMAND";
  usage += " [options]";

  std::string out = fmt::format("{}\n\nUsage: {}\n", app->get_description(), usage);
  if (!commands.empty()) {
    out += "\nCommands:\n";
    for (const CLI::App* command : commands) {
      const std::string about = command->get_description();
      out += entry(command->get_name(), about.substr(0, about.find('\n')));
    }
  }
  out += options_of(app, true, "Arguments");
  if (app != root) out += options_of(app, false, "Options");
  out += options_of(root, false, "Options of every command");
  // CLI11 hands a footer down to subcommands without one.
  if (!app->get_footer().empty() && (app == root || app->get_footer() != root->get_footer()))
    out += "\n" + app->get_footer() + "\n";
  return out;
}

}  // namespace heed::cli
