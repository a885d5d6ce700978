#include "cli/charts.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "cli/terminal.h"
#include "cli/utf8.h"

namespace heed::cli {
namespace {

constexpr size_t series_colors = 8;  // classes s0 … s7 of the style sheet

std::string tick_text(double value, double step) {
  if (step >= 1) return count_text(std::llround(value));
  return fmt::format("{:.{}f}", value, static_cast<int>(std::ceil(-std::log10(step) - 1e-9)));
}

}  // namespace

std::string escape_html(std::string_view text) {
  std::string out;
  for (char c : valid_utf8(text)) {
    switch (c) {
      case '&': out += "&amp;"; break;
      case '<': out += "&lt;"; break;
      case '>': out += "&gt;"; break;
      case '"': out += "&quot;"; break;
      case '\'': out += "&#39;"; break;
      default: out += static_cast<unsigned char>(c) < 0x20 && c != '\n' && c != '\t' ? ' ' : c;
    }
  }
  return out;
}

double nice_step(double range, int wanted) {
  if (!(range > 0)) return 1;
  const double raw = range / wanted, power = std::pow(10, std::floor(std::log10(raw)));
  for (double factor : {1.0, 2.0, 5.0})
    if (raw <= factor * power) return factor * power;
  return 10 * power;
}

std::string bar_chart(const std::vector<Bar>& bars, double from) {
  constexpr double width = 480, room = 84, row = 46;  // room: for the value behind the longest bar
  double most = from;
  for (const Bar& b : bars) {
    double sum = 0;
    for (double part : b.parts) sum += part;
    most = std::max(most, sum);
  }
  const double scale = most > from ? (width - room) / (most - from) : 0;
  std::string svg =
      fmt::format("<svg viewBox=\"0 0 {} {}\" role=\"img\">\n", width, row * static_cast<double>(bars.size()));
  double y = 0;
  for (const Bar& b : bars) {
    svg += fmt::format("<text class=\"label\" x=\"0\" y=\"{:.0f}\">{}</text>\n", y + 14, escape_html(b.label));
    double x = 0, skipped = from;
    for (size_t i = 0; i < b.parts.size(); ++i) {
      const double shown = std::max(0.0, b.parts[i] - skipped), length = shown * scale;
      skipped = std::max(0.0, skipped - b.parts[i]);
      svg += fmt::format(
          "<rect class=\"bar s{}\" x=\"{:.2f}\" y=\"{:.0f}\" width=\"{:.2f}\" height=\"16\" opacity=\"{}\"/>\n",
          b.series % series_colors, x, y + 21, length,
          i == 0   ? 1.0
          : i == 1 ? 0.5
                   : 0.25);
      x += length;
    }
    svg +=
        fmt::format("<text class=\"value\" x=\"{:.2f}\" y=\"{:.0f}\">{}</text>\n", x + 7, y + 34, escape_html(b.value));
    y += row;
  }
  return svg + "</svg>\n";
}

std::string line_chart(const std::vector<Line>& lines, double x_end, const std::string& x_title,
                       const std::string& y_title, bool zero) {
  constexpr double width = 1000, height = 300, left = 56, right = 12, top = 12, bottom = 44;
  double low = std::numeric_limits<double>::infinity(), high = -low;
  for (const Line& line : lines)
    for (double y : line.y) low = std::min(low, y), high = std::max(high, y);
  if (zero) low = std::min(low, 0.0), high = std::max(high, 0.0);
  if (!(high > low)) low -= 0.5, high += 0.5;
  const double step = nice_step(high - low, 5);
  low = std::floor(low / step) * step, high = std::ceil(high / step) * step;
  const auto at_x = [&](double x) { return left + x / x_end * (width - left - right); };
  const auto at_y = [&](double y) { return height - bottom - (y - low) / (high - low) * (height - top - bottom); };

  std::string svg = fmt::format("<svg viewBox=\"0 0 {} {}\" role=\"img\">\n", width, height);
  for (int i = 0; low + i * step <= high + step / 2; ++i) {
    const double y = low + i * step;
    const bool strong = zero && std::abs(y) < step / 2;
    svg += fmt::format("<line class=\"{}\" x1=\"{}\" x2=\"{}\" y1=\"{:.1f}\" y2=\"{:.1f}\"/>", strong ? "zero" : "grid",
                       left, width - right, at_y(y), at_y(y));
    svg += fmt::format("<text class=\"tick\" text-anchor=\"end\" x=\"{}\" y=\"{:.1f}\">{}</text>\n", left - 8,
                       at_y(y) + 4, tick_text(strong ? 0 : y, step));
  }
  const double x_step = nice_step(x_end, 8);
  for (double x = 0; x <= x_end * 1.0001; x += x_step)
    svg += fmt::format("<text class=\"tick\" text-anchor=\"middle\" x=\"{:.1f}\" y=\"{}\">{}</text>\n", at_x(x),
                       height - bottom + 18, tick_text(x, x_step));
  svg += fmt::format("<text class=\"axis\" text-anchor=\"middle\" x=\"{}\" y=\"{}\">{}</text>\n",
                     (left + width - right) / 2, height - 6, escape_html(x_title));
  svg +=
      fmt::format("<text class=\"axis\" text-anchor=\"middle\" transform=\"translate(12 {}) rotate(-90)\">{}</text>\n",
                  (top + height - bottom) / 2, escape_html(y_title));
  for (const Line& line : lines) {
    svg += fmt::format("<polyline class=\"line s{}\" points=\"", line.series % series_colors);
    const double bins = static_cast<double>(line.y.size());
    for (size_t i = 0; i < line.y.size(); ++i)
      svg += fmt::format("{}{:.1f},{:.1f}", i == 0 ? "" : " ", at_x((static_cast<double>(i) + 0.5) / bins * x_end),
                         at_y(line.y[i]));
    svg += "\"/>\n";
  }
  return svg + "</svg>\n";
}

}  // namespace heed::cli
