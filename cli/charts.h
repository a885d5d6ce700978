// Charts as SVG, coloured by the page's style sheet (classes s0, s1, … are the series).
#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace heed::cli {

/// Text for HTML and SVG; what is not UTF-8 is replaced.
std::string escape_html(std::string_view text);

struct Bar {
  std::string label, value;        // above the bar, behind it
  size_t series = 0;
  std::vector<double> parts;       // drawn one after the other, each fainter
};
/// Horizontal bars on a scale from 0 (or from `from`) to the longest.
std::string bar_chart(const std::vector<Bar>& bars, double from = 0);

struct Line {
  size_t series = 0;
  std::vector<double> y;           // at equal steps of x
};
/// Lines over 0 … x_end; with `zero` a stronger line at y = 0.
std::string line_chart(const std::vector<Line>& lines, double x_end, const std::string& x_title,
                       const std::string& y_title, bool zero);

/// 1, 2 or 5 times a power of ten, such that about `wanted` steps span the range.
double nice_step(double range, int wanted);

}  // namespace heed::cli
