// What is printed: colour where it is wanted, aligned tables, a progress bar, numbers for people.
#pragma once

#include <chrono>
#include <cstdio>
#include <string>
#include <string_view>
#include <vector>

#include "heed/base/types.h"

namespace heed::cli {

/// "auto" (the default): on a terminal, unless NO_COLOR is set or TERM is dumb.
void set_color(const std::string& when);

enum class Tone { plain, bold, dim, good, bad };
/// `text` in that tone on standard output, when it shows colours.
std::string toned(std::string_view text, Tone tone);

/// Characters that a terminal shows, one for each code point.
Index display_width(std::string_view text);

struct Cell {
  std::string text;
  Tone tone = Tone::plain;
};
/// Columns aligned: the first `left` to the left, the others to the right. The first row is the head.
std::string table(const std::vector<std::vector<Cell>>& rows, size_t left = 1);

/// "612 MiB", "1.4 GiB".
std::string bytes_text(Index bytes);
/// "8,000".
std::string count_text(Index n);
/// "0.83 s", "12.4 s", "3 min 20 s".
std::string seconds_text(double s);

/// One line on standard error that is drawn over, on a terminal; nothing in a pipe.
class ProgressLine {
 public:
  ProgressLine();
  ~ProgressLine();
  ProgressLine(const ProgressLine&) = delete;
  ProgressLine& operator=(const ProgressLine&) = delete;
  void show(std::string_view what, Index done, Index total);
  void clear();

 private:
  bool terminal_, shown_ = false;
  std::chrono::steady_clock::time_point last_{};
};

/// Writes to standard output. Throws Error when it cannot be written.
void print(std::string_view text);
/// Brings out what was printed; throws Error when that fails.
void flush_output();

}  // namespace heed::cli
