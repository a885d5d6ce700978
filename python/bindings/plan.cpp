// Plans: who attends to whom, and what it costs.
#include "cli/png.h"
#include "heed/exec/attend.h"
#include "heed/exec/picture.h"
#include "python/bindings/bindings.h"

namespace heed::python {
namespace {

// More would be an array that nobody looks at; pictures have any size.
constexpr Index most_mask_elements = Index{1} << 28;

class PlanHandle {
 public:
  PlanHandle(Array q, Array k, std::optional<Array> v, Arrays extra, const std::string& mechanism, bool causal,
             std::optional<float> scale, const std::optional<std::string>& dtype)
      : q_(std::move(q)), k_(std::move(k)), v_(std::move(v)), extra_(std::move(extra)) {
    const Call c(q_, k_, v_ ? &*v_ : nullptr, extra_, mechanism, causal, scale, dtype);
    call_ = c.call.text();
    const nb::gil_scoped_release released;
    const CheckedCall checked = check(c.call, c.in);
    // Of the input: a plan may be over something else (channels).
    problem_ = checked.inputs.problem;
    plan_ = checked.plan();
    counted_ = rehearse(plan_);
  }

  const std::string& call() const { return call_; }
  const Problem& problem() const { return problem_; }
  Index pairs() const { return counted_.pairs; }
  Index tiles() const { return counted_.tiles_planned; }
  double density() const { return static_cast<double>(counted_.pairs) / static_cast<double>(dense_pairs(problem_)); }
  Index flops() const { return 2 * (plan_.problem.D + plan_.problem.Dv) * counted_.pairs; }

  // [B, Hq, N, M]: whether a query's output holds a key's value.
  nb::object mask() const {
    const Problem& p = plan_.problem;
    if (p.N != problem_.N || p.M != problem_.M)
      fail("to_mask: {} attends {} rows to {} columns that are no tokens, expected a plan over tokens", call_, p.N,
           p.M);
    const Index elements = p.B * p.Hq * p.N * p.M;
    if (elements > most_mask_elements)
      fail("to_mask: shape = [{}, {}, {}, {}], {} elements, expected at most {}; plot() draws plans of any size", p.B,
           p.Hq, p.N, p.M, elements, most_mask_elements);
    std::vector<std::uint8_t> seen(static_cast<size_t>(elements), 0);
    {
      const nb::gil_scoped_release released;
      for (Index b = 0; b < p.B; ++b)
        for (Index h = 0; h < p.Hq; ++h) mark(b, h, seen.data() + (b * p.Hq + h) * p.N * p.M);
    }
    return numpy_of(std::move(seen), {size(p.B), size(p.Hq), size(p.N), size(p.M)});
  }

  nb::tuple picture(Index batch, Index head, Index max_pixels) const {
    Picture drawn = draw(plan_, batch, head, max_pixels);
    const std::vector<size_t> shape{size(drawn.height), size(drawn.width)};
    return nb::make_tuple(numpy_of(std::move(drawn.share), shape), drawn.cell);
  }

  nb::bytes png(Index batch, Index head, Index max_pixels) const {
    const std::string bytes =
        cli::encode_png(draw(plan_, batch, head, max_pixels), {.margin = 24, .least = 3 * max_pixels / 4});
    return nb::bytes(bytes.data(), bytes.size());
  }

 private:
  static size_t size(Index n) { return static_cast<size_t>(n); }

  void mark(Index b, Index head, std::uint8_t* seen) const {
    const Problem& p = plan_.problem;
    walk_head(plan_, b, head, [&](const RowBlock& rows, const std::vector<Tile>& tiles) {
      for (const Tile& tile : tiles) {
        const Source& source = plan_.sources[size(tile.source)];
        const SourceView& view = source.views[size(source.per_query_head ? b * p.Hq + head : b * p.Hk + rows.kv_head)];
        for (Index r = 0; r < tile.rows.count; ++r) {
          std::uint8_t* row = seen + rows.token(tile.rows[r]) * p.M;
          for (Index c = 0; c < tile.columns.count; ++c)
            if (sees(plan_, rows, tile, r, c)) mark_tokens(tile.source, view, tile.columns[c], row);
        }
      }
    });
  }

  // The tokens whose values a column holds; none for keys that the caller gave beside the input.
  static void mark_tokens(Index source, const SourceView& view, Index column, std::uint8_t* row) {
    if (view.members == nullptr) {
      if (source == 0) row[column] = 1;
      else if (view.position != nullptr) row[view.position[column]] = 1;
      return;
    }
    const Members& m = *view.members;
    const Index begin = m.begins.empty() ? column : m.begins[size(column)];
    const Index end = m.begins.empty() ? column + 1 : m.begins[size(column + 1)];
    for (Index i = begin; i < end; ++i)
      if (m.tokens[size(i)] >= 0) row[m.tokens[size(i)]] = 1;
  }

  Array q_, k_;
  std::optional<Array> v_;
  Arrays extra_;
  std::string call_;
  Problem problem_;
  Plan plan_;
  AttendStats counted_;
};

}  // namespace

void bind_plan(nb::module_& m) {
  nb::class_<PlanHandle>(m, "Plan")
      .def(nb::init<Array, Array, std::optional<Array>, Arrays, const std::string&, bool, std::optional<float>,
                    const std::optional<std::string>&>(),
           nb::arg("q"), nb::arg("k"), nb::arg("v").none(), nb::arg("extra"), nb::arg("mechanism"), nb::arg("causal"),
           nb::arg("scale").none(), nb::arg("dtype").none())
      .def_prop_ro("call", &PlanHandle::call)
      .def_prop_ro("causal", [](const PlanHandle& p) { return p.problem().causal; })
      .def_prop_ro("shape",
                   [](const PlanHandle& p) {
                     return nb::make_tuple(p.problem().B, p.problem().Hq, p.problem().N, p.problem().M);
                   })
      .def_prop_ro("pairs", &PlanHandle::pairs)
      .def_prop_ro("tiles", &PlanHandle::tiles)
      .def_prop_ro("density", &PlanHandle::density)
      .def_prop_ro("flops", &PlanHandle::flops)
      .def("mask", &PlanHandle::mask)
      .def("picture", &PlanHandle::picture, nb::arg("batch"), nb::arg("head"), nb::arg("max_pixels"))
      .def("png", &PlanHandle::png, nb::arg("batch"), nb::arg("head"), nb::arg("max_pixels"));
}

}  // namespace heed::python
