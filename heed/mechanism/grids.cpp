#include "heed/mechanism/grids.h"

#include <fmt/format.h>

namespace heed::mechanism {

ParamSpec grid_spec() {
  return list("grid", "", 1, "lengths of the token grid's axes, row-major; empty: one axis of N tokens");
}

ParamSpec required_grid_spec(const std::string& example) {
  ParamSpec grid = grid_spec();
  grid.required = true;
  grid.help = "lengths of the token grid's axes, row-major, such as " + example;
  return grid;
}

GridShape read_grid(const Params& p, const Problem& problem, Index text) {
  const Index expected = problem.N - text;
  GridShape grid;
  std::vector<Index> lengths = p.list("grid");
  if (lengths.empty()) lengths = {expected};
  grid.text = fmt::format("{}", fmt::join(lengths, "x"));
  grid.axes = static_cast<Index>(lengths.size());
  if (grid.axes > 3) fail_usage("{}: grid = {}, expected 1 … 3 axes", p.owner(), grid.text);
  Index tokens = 1;
  for (Index a = 0; a < grid.axes; ++a) {
    const Index length = lengths[static_cast<size_t>(a)];
    tokens = length > expected / tokens ? expected + 1 : tokens * length;  // more is all that matters
    grid.length[grid.axis(a)] = length;
  }
  if (tokens != expected)
    fail_usage("{}: grid = {}, expected lengths whose product is N{} = {}", p.owner(), grid.text,
               text == 0 ? "" : " - text_len", expected);
  return grid;
}

Extents read_per_axis(const Params& p, std::string_view name, const GridShape& grid, Index missing) {
  const std::vector<Index> values = p.list(name);
  const auto count = static_cast<Index>(values.size());
  if (count != 1 && count != grid.axes)
    fail_usage("{}: {} = {}, expected one value{} for grid = {}", p.owner(), name, p.text(name),
               grid.axes == 1 ? "" : fmt::format(" or {}", grid.axes), grid.text);
  Extents out{missing, missing, missing};
  for (Index a = 0; a < grid.axes; ++a) out[grid.axis(a)] = values[count == 1 ? 0 : static_cast<size_t>(a)];
  return out;
}

}  // namespace heed::mechanism
