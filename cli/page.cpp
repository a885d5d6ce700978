#include "cli/page.h"

#include <fmt/format.h>

#include "cli/charts.h"
#include "cli/report_style.h"

namespace heed::cli {

std::string page_head(const std::string& title, const std::string& kicker, const std::string& heading) {
  return fmt::format("<!DOCTYPE html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><meta name=\"viewport\" "
                     "content=\"width=device-width, initial-scale=1\">\n"
                     "<meta name=\"color-scheme\" content=\"light dark\"><title>{}</title>\n<style>{}</style></head>\n"
                     "<body><main>\n<p class=\"kicker\">{}</p>\n<h1>{}</h1>\n",
                     escape_html(title), report_style, escape_html(kicker), escape_html(heading));
}

std::string chip(size_t series) { return fmt::format("<span class=\"chip s{}\"></span>", series % 8); }

}  // namespace heed::cli
