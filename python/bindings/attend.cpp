// attend, its gradients, and what the registry says.
#include "cli/describe.h"
#include "heed/base/threads.h"
#include "heed/kernel/kernels.h"
#include "python/bindings/bindings.h"

namespace heed::python {

TensorView view_of(const std::string& name, const Array& x) {
  const auto type = x.dtype();
  const auto is = [&](nb::dlpack::dtype_code code, int bits) {
    return type.code == static_cast<std::uint8_t>(code) && type.bits == bits && type.lanes == 1;
  };
  using enum nb::dlpack::dtype_code;
  DType dtype;
  if (is(Float, 32)) dtype = DType::f32;
  else if (is(Float, 16)) dtype = DType::f16;
  else if (is(Bfloat, 16)) dtype = DType::bf16;
  else if (is(Int, 32)) dtype = DType::i32;
  else if (is(UInt, 8) || is(Bool, 8)) dtype = DType::u8;
  else
    fail("{}: elements of {} bits of kind {}, expected f32, f16, bf16, i32 or u8", name, type.bits,
         type.code == static_cast<std::uint8_t>(Float) ? "float"
         : type.code == static_cast<std::uint8_t>(Int) ? "integer"
                                                       : "other");
  Shape shape, stride;
  for (size_t i = 0; i < x.ndim(); ++i)
    shape.push_back(static_cast<Index>(x.shape(i))), stride.push_back(static_cast<Index>(x.stride(i)));
  return {x.data(), dtype, std::move(shape), std::move(stride)};
}

nb::object numpy_of(Tensor&& x) {
  auto held = std::make_unique<Tensor>(std::move(x));
  std::vector<size_t> shape(held->shape().begin(), held->shape().end());
  float* data = held->as<float>();
  const nb::capsule owner(held.release(), [](void* p) noexcept { delete static_cast<Tensor*>(p); });
  return nb::cast(nb::ndarray<nb::numpy, float>(data, shape.size(), shape.data(), owner));
}

DType dtype_named(const std::string& argument, const std::string& name) {
  if (name == "f32") return DType::f32;
  if (name == "bf16") return DType::bf16;
  fail("{} = {}, expected f32 or bf16", argument, name);
}

Call::Call(const Array& q, const Array& k, const Array* v, const Arrays& extra, const std::string& mechanism,
           bool causal, std::optional<float> scale, const std::optional<std::string>& dtype)
    : call(MechanismCall::parse(mechanism)) {
  in.q = view_of("q", q), in.k = view_of("k", k);
  in.v = v == nullptr ? in.k : view_of("v", *v);
  for (const auto& [name, x] : extra) in.extra.emplace(name, view_of(name, x));
  in.causal = causal, in.scale = scale;
  const bool halves = in.q.dtype == DType::bf16 && in.k.dtype == DType::bf16 && in.v.dtype == DType::bf16;
  in.arithmetic = dtype ? dtype_named("dtype", *dtype) : halves ? DType::bf16 : DType::f32;
}

namespace {

nb::dict arrays_of(NamedTensors&& tensors) {
  nb::dict out;
  for (auto& [name, x] : tensors) out[name.c_str()] = numpy_of(std::move(x));
  return out;
}

nb::tuple attend(const Array& q, const Array& k, const Array& v, const Arrays& extra, const std::string& mechanism,
                 bool causal, std::optional<float> scale, const std::optional<std::string>& dtype) {
  const Call c(q, k, &v, extra, mechanism, causal, scale, dtype);
  AttendOutput out;
  {
    const nb::gil_scoped_release released;
    out = heed::attend(c.call, c.in);
  }
  nb::object lse = nb::none();
  if (out.lse.size() > 0) lse = numpy_of(std::move(out.lse));
  return nb::make_tuple(numpy_of(std::move(out.o)), lse, arrays_of(std::move(out.extra)));
}

nb::tuple attend_backward(const Array& grad, const Array& q, const Array& k, const Array& v, const Arrays& extra,
                          const Array& o, const Array& lse, const std::string& mechanism, bool causal,
                          std::optional<float> scale, const std::optional<std::string>& dtype) {
  const Call c(q, k, &v, extra, mechanism, causal, scale, dtype);
  AttendGradients got;
  {
    const nb::gil_scoped_release released;
    got = heed::attend_backward(c.call, c.in, view_of("do", grad), view_of("o", o), view_of("lse", lse));
  }
  return nb::make_tuple(numpy_of(std::move(got.dq)), numpy_of(std::move(got.dk)), numpy_of(std::move(got.dv)),
                        arrays_of(std::move(got.extra)));
}

nb::dict parameter(const ParamSpec& p) {
  nb::dict d;
  d["name"] = p.name, d["kind"] = cli::kind_name(p.kind), d["required"] = p.required, d["help"] = p.help;
  d["default"] = p.required || p.fallback.empty() ? nb::none() : nb::object(nb::str(p.fallback.c_str()));
  d["least"] = p.least > -1e299 ? nb::object(nb::float_(p.least)) : nb::none();
  d["most"] = p.most < 1e299 ? nb::object(nb::float_(p.most)) : nb::none();
  d["above_least"] = p.above_least;
  d["choices"] = p.choices;
  return d;
}

nb::dict describe(const std::string& name) {
  const Mechanism& m = find_mechanism(name);
  nb::list params, extras;
  for (const ParamSpec& p : m.params) params.append(parameter(p));
  for (const ExtraSpec& e : m.extras) {
    nb::dict d;
    d["name"] = e.name, d["shape"] = e.axes, d["required"] = e.required, d["help"] = e.help;
    d["differentiable"] = e.differentiable;
    extras.append(d);
  }
  nb::dict d;
  d["name"] = m.name, d["title"] = m.title, d["paper"] = m.paper, d["arxiv"] = cli::arxiv_number(m);
  d["year"] = m.year, d["stage"] = m.stage, d["training"] = cli::training_name(m.training);
  d["causal"] = cli::causality_name(m.causality), d["square"] = m.square;
  d["on_models"] = m.not_on_models.empty(), d["not_on_models"] = m.not_on_models;
  d["idea"] = m.idea, d["equations"] = m.equations, d["cost"] = m.cost;
  d["params"] = params, d["extras"] = extras;
  return d;
}

bool decodes(const std::string& text) {
  const MechanismCall call = MechanismCall::parse(text);
  const Mechanism& m = find_mechanism(call.name);
  const Params params(m.name, m.params, call.params);
  return !m.square || (m.decodes != nullptr && m.decodes(params));
}

std::vector<std::string> names() {
  std::vector<std::string> list;
  for (const Mechanism* m : mechanisms()) list.push_back(m->name);
  return list;
}

}  // namespace

void bind_attend(nb::module_& m) {
  m.def("attend", attend, nb::arg("q"), nb::arg("k"), nb::arg("v"), nb::arg("extra"), nb::arg("mechanism"),
        nb::arg("causal"), nb::arg("scale").none(), nb::arg("dtype").none(), "(o, lse or None, extra outputs)");
  m.def("attend_backward", attend_backward, nb::arg("do"), nb::arg("q"), nb::arg("k"), nb::arg("v"), nb::arg("extra"),
        nb::arg("o"), nb::arg("lse"), nb::arg("mechanism"), nb::arg("causal"), nb::arg("scale").none(),
        nb::arg("dtype").none(), "(dq, dk, dv, gradients of extra tensors)");
  m.def("mechanisms", names, "Every mechanism's name, in the order of the documentation.");
  m.def("describe", describe, nb::arg("name"), "What the registry says of a mechanism.");
  m.def("decodes", decodes, nb::arg("mechanism"), "Whether it has a rule for one query after all keys.");
  m.def("threads", threads, "Threads in use.");
  m.def("set_threads", set_threads, nb::arg("n"), "Use n >= 1 threads from now on.");
  m.def("isa", [] { return std::string(kernels().name); }, "The instruction set in use.");
}

}  // namespace heed::python
