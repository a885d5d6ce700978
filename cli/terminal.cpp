#include "cli/terminal.h"

#include <fmt/format.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstdlib>
#include <cstring>

#include "heed/base/error.h"

namespace heed::cli {
namespace {

bool set_and_not_empty(const char* variable) {
  const char* text = std::getenv(variable);
  return text != nullptr && *text != 0;
}

bool colored_by_default() {
  const char* term = std::getenv("TERM");
  return ::isatty(STDOUT_FILENO) != 0 && !set_and_not_empty("NO_COLOR") && term != nullptr &&
         std::strcmp(term, "dumb") != 0;
}

bool colored = colored_by_default();

Index terminal_columns() {
  struct winsize size{};
  return ::ioctl(STDERR_FILENO, TIOCGWINSZ, &size) == 0 && size.ws_col > 0 ? size.ws_col : 80;
}

// The first `most` characters.
std::string_view cut(std::string_view text, Index most) {
  size_t i = 0;
  for (Index seen = 0; i < text.size(); ++i)
    if ((static_cast<unsigned char>(text[i]) & 0xc0u) != 0x80u && ++seen > most) break;
  return text.substr(0, i);
}

}  // namespace

void set_color(const std::string& when) { colored = when == "always" || (when == "auto" && colored_by_default()); }

std::string toned(std::string_view text, Tone tone) {
  if (!colored || tone == Tone::plain || text.empty()) return std::string(text);
  const char* code = tone == Tone::bold ? "1" : tone == Tone::dim ? "2" : tone == Tone::good ? "32" : "31";
  return fmt::format("\x1b[{}m{}\x1b[0m", code, text);
}

Index display_width(std::string_view text) {
  return std::count_if(text.begin(), text.end(),
                       [](char c) { return (static_cast<unsigned char>(c) & 0xc0u) != 0x80u; });
}

std::string table(const std::vector<std::vector<Cell>>& rows, size_t left) {
  std::vector<Index> widths;
  for (const auto& row : rows) {
    widths.resize(std::max(widths.size(), row.size()));
    for (size_t i = 0; i < row.size(); ++i) widths[i] = std::max(widths[i], display_width(row[i].text));
  }
  std::string out;
  for (const auto& row : rows) {
    std::string line;
    for (size_t i = 0; i < row.size(); ++i) {
      const std::string pad(static_cast<size_t>(widths[i] - display_width(row[i].text)), ' ');
      const std::string text = toned(row[i].text, &row == &rows.front() ? Tone::bold : row[i].tone);
      line += i == 0 ? "" : "  ";
      line += i < left ? text + pad : pad + text;
    }
    line.erase(line.find_last_not_of(' ') + 1);
    out += line + "\n";
  }
  return out;
}

std::string bytes_text(Index bytes) {
  const double b = static_cast<double>(bytes);
  if (b < 1024) return fmt::format("{} B", bytes);
  if (b < 1024.0 * 1024) return fmt::format("{:.0f} KiB", b / 1024);
  if (b < 1000 * 1024.0 * 1024) return fmt::format("{:.0f} MiB", b / (1024 * 1024));
  return fmt::format("{:.1f} GiB", b / (1024.0 * 1024 * 1024));
}

std::string count_text(Index n) {
  std::string digits = fmt::format("{}", n);
  for (Index at = static_cast<Index>(digits.size()) - 3; at > (n < 0 ? 1 : 0); at -= 3)
    digits.insert(static_cast<size_t>(at), ",");
  return digits;
}

std::string seconds_text(double s) {
  if (s < 0.0995) return fmt::format("{:.1f} ms", s * 1e3);
  if (s < 9.995) return fmt::format("{:.2f} s", s);
  if (s < 119.5) return fmt::format("{:.1f} s", s);
  const auto whole = static_cast<Index>(std::lround(s));
  return fmt::format("{} min {} s", whole / 60, whole % 60);
}

ProgressLine::ProgressLine() : terminal_(::isatty(STDERR_FILENO) != 0) {}
ProgressLine::~ProgressLine() { clear(); }

void ProgressLine::show(std::string_view what, Index done, Index total) {
  if (!terminal_ || total < 1) return;
  // A few times a second is enough for eyes.
  const auto now = std::chrono::steady_clock::now();
  if (shown_ && done < total && now - last_ < std::chrono::milliseconds(100)) return;
  last_ = now;
  constexpr Index bar = 24;
  const Index full = std::clamp<Index>(bar * done / total, 0, bar);
  std::string blocks;
  for (Index i = 0; i < bar; ++i) blocks += i < full ? "█" : "░";
  const std::string line = fmt::format("{} {}/{}  {}", blocks, count_text(done), count_text(total), what);
  fmt::print(stderr, "\r{}\x1b[K", cut(line, terminal_columns() - 1));
  std::fflush(stderr);
  shown_ = true;
}

void ProgressLine::clear() {
  if (!shown_) return;
  fmt::print(stderr, "\r\x1b[K");
  std::fflush(stderr);
  shown_ = false;
}

void print(std::string_view text) {
  if (std::fwrite(text.data(), 1, text.size(), stdout) != text.size())
    fail("standard output: cannot be written: {}", std::strerror(errno));
}

void flush_output() {
  if (std::fflush(stdout) != 0) fail("standard output: cannot be written: {}", std::strerror(errno));
}

}  // namespace heed::cli
