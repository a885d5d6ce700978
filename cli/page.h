// What pages of results have in common.
#pragma once

#include <string>

namespace heed::cli {

/// A page's beginning up to its heading: title of the window, a small line above the heading, the heading, as plain
/// texts. "</main></body></html>" ends it.
std::string page_head(const std::string& title, const std::string& kicker, const std::string& heading);

/// The patch of colour that stands for a series of charts.
std::string chip(size_t series);

}  // namespace heed::cli
