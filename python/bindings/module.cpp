// The Python module heed._core: what needs no torch.
#include "python/bindings/bindings.h"

NB_MODULE(_core, m) {
  namespace nb = nanobind;
  m.doc() = "heed's library for Python; the package heed is its face.";
  nb::exception<heed::Error>(m, "Error", PyExc_ValueError);
  heed::python::bind_attend(m);
  heed::python::bind_plan(m);
  heed::python::bind_model(m);
}
