#include "heed/torch/attend.h"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <memory>
#include <tuple>
#include <utility>
#include <vector>

#include "heed/mechanism/attend.h"
#include "heed/torch/tensors.h"

namespace heed::aten {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using Names = std::vector<std::string>;
using Scale = std::optional<double>;
using Type = std::optional<std::string>;

// torch has its own exception for a wrong value, which Python sees as a ValueError.
template <class Work>
auto translated(Work work) {
  try {
    return work();
  } catch (const Error& e) {
    C10_THROW_ERROR(ValueError, e.what());
  }
}

// Masks come as bool, which is kept in bytes.
at::Tensor bytes_of(const at::Tensor& x) { return x.scalar_type() == at::kBool ? x.view(at::kByte) : x; }

// The memory stays heed's until torch drops the tensor.
at::Tensor owned(Tensor&& x) {
  const auto keep = std::make_shared<Tensor>(std::move(x));
  return at::from_blob(keep->data(), keep->shape(), [keep](void*) {}, at::kFloat);
}

struct Call {
  MechanismCall call;
  AttendInput in;

  Call(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, at::TensorList extra,
       const std::string& mechanism, const Names& names, bool causal, Scale scale, const Type& dtype)
      : call(MechanismCall::parse(mechanism)) {
    in.q = view_of("q", q), in.k = view_of("k", k), in.v = view_of("v", v);
    if (extra.size() != names.size())
      fail("names: {} of them, expected one for each of the {} extra tensors", names.size(), extra.size());
    for (size_t i = 0; i < names.size(); ++i)
      if (!in.extra.emplace(names[i], view_of(names[i], bytes_of(extra[i]))).second)
        fail("names: {} twice, expected different ones", names[i]);
    in.causal = causal;
    if (scale) in.scale = static_cast<float>(*scale);
    const bool halves = in.q.dtype == DType::bf16 && in.k.dtype == DType::bf16 && in.v.dtype == DType::bf16;
    if (dtype && *dtype != "f32" && *dtype != "bf16") fail_usage("dtype = {}, expected f32 or bf16", *dtype);
    in.arithmetic = (dtype ? *dtype == "bf16" : halves) ? DType::bf16 : DType::f32;
  }
};

// Places in `names` of the tensors whose gradient attend_backward gives.
std::vector<size_t> differentiable(const std::string& mechanism, const Names& names) {
  std::vector<size_t> places;
  for (size_t i = 0; i < names.size(); ++i)
    for (const ExtraSpec& e : find_mechanism(MechanismCall::parse(mechanism).name).extras)
      if (e.name == names[i] && e.differentiable) places.push_back(i);
  return places;
}

std::tuple<at::Tensor, at::Tensor> attend_cpu(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                              at::TensorList extra, std::string mechanism, Names names, bool causal,
                                              Scale scale, Type dtype) {
  return translated([&] {
    const Call c(q, k, v, extra, mechanism, names, causal, scale, dtype);
    AttendOutput out = heed::attend(c.call, c.in);
    return std::tuple(owned(std::move(out.o)), owned(std::move(out.lse)));
  });
}

// Shapes alone, which may be symbols: what attend will check is not checked here.
std::tuple<at::Tensor, at::Tensor> attend_meta(const at::Tensor& q, const at::Tensor&, const at::Tensor& v,
                                               at::TensorList, std::string mechanism, Names, bool, Scale, Type) {
  return translated([&] {
    const MechanismCall call = MechanismCall::parse(mechanism);
    const Mechanism& m = find_mechanism(call.name);
    const Params params(m.name, m.params, call.params);
    for (const auto& [name, x] : {std::pair("q", q), std::pair("v", v)})
      if (x.dim() != 4) fail("{}: {} axes, expected 4", name, x.dim());
    const auto options = q.options().dtype(at::kFloat);
    c10::SymDimVector rows(q.sym_sizes().begin(), q.sym_sizes().begin() + 3), o = rows;
    o.push_back(v.sym_size(3));
    const bool without = m.without_lse != nullptr && m.without_lse(params);
    return std::tuple(at::empty_symint(o, options),
                      without ? at::empty({0}, options) : at::empty_symint(rows, options));
  });
}

using Gradients = std::tuple<at::Tensor, at::Tensor, at::Tensor, std::vector<at::Tensor>>;

Gradients backward_cpu(const at::Tensor& grad, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                       at::TensorList extra, const at::Tensor& o, const at::Tensor& lse, std::string mechanism,
                       Names names, bool causal, Scale scale, Type dtype) {
  return translated([&] {
    const Call c(q, k, v, extra, mechanism, names, causal, scale, dtype);
    AttendGradients got =
        heed::attend_backward(c.call, c.in, view_of("do", grad), view_of("o", o), view_of("lse", lse));
    std::vector<at::Tensor> others;
    for (size_t i : differentiable(mechanism, names))
      others.push_back(owned(std::move(got.extra.at(names[i]))).to(extra[i].scalar_type()));
    return Gradients(owned(std::move(got.dq)).to(q.scalar_type()), owned(std::move(got.dk)).to(k.scalar_type()),
                     owned(std::move(got.dv)).to(v.scalar_type()), std::move(others));
  });
}

Gradients backward_meta(const at::Tensor&, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                        at::TensorList extra, const at::Tensor&, const at::Tensor&, std::string mechanism, Names names,
                        bool, Scale, Type) {
  return translated([&] {
    const auto like = [](const at::Tensor& x) { return at::empty_symint(x.sym_sizes(), x.options()); };
    std::vector<at::Tensor> others;
    for (size_t i : differentiable(mechanism, names)) others.push_back(like(extra[i]));
    return Gradients(like(q), like(k), like(v), std::move(others));
  });
}

template <class F>
auto operation(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<F>();
}

std::tuple<at::Tensor, at::Tensor> call_attend(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                               at::TensorList extra, const std::string& mechanism, const Names& names,
                                               bool causal, Scale scale, const Type& dtype) {
  static const auto op = operation<decltype(attend_cpu)>("heed::attend");
  return op.call(q, k, v, extra, mechanism, names, causal, scale, dtype);
}

struct AttendFunction : torch::autograd::Function<AttendFunction> {
  static variable_list forward(AutogradContext* context, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                               at::TensorList extra, const std::string& mechanism, const Names& names, bool causal,
                               Scale scale, const Type& dtype) {
    const at::AutoDispatchBelowADInplaceOrView below;
    const auto [o, lse] = call_attend(q, k, v, extra, mechanism, names, causal, scale, dtype);
    variable_list saved{q, k, v, o, lse};
    saved.insert(saved.end(), extra.begin(), extra.end());
    context->save_for_backward(std::move(saved));
    context->mark_non_differentiable({lse});
    context->saved_data["mechanism"] = mechanism;
    context->saved_data["names"] = names;
    context->saved_data["causal"] = causal;
    context->saved_data["scale"] = scale;
    context->saved_data["dtype"] = dtype;
    return {o, lse};
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    static const auto op = operation<decltype(backward_cpu)>("heed::attend_backward");
    const variable_list saved = context->get_saved_variables();
    const variable_list extra(saved.begin() + 5, saved.end());
    const auto& data = context->saved_data;
    const std::string mechanism = data.at("mechanism").toStringRef();
    const Names names = data.at("names").to<Names>();
    const auto [dq, dk, dv, others] =
        op.call(grads[0], saved[0], saved[1], saved[2], extra, saved[3], saved[4], mechanism, names,
                data.at("causal").toBool(), data.at("scale").to<Scale>(), data.at("dtype").to<Type>());
    variable_list result{dq, dk, dv};
    result.resize(3 + names.size());
    const std::vector<size_t> places = differentiable(mechanism, names);
    for (size_t i = 0; i < places.size(); ++i) result[3 + places[i]] = others[i];
    result.resize(result.size() + 5);  // mechanism, names, causal, scale, dtype
    return result;
  }
};

std::tuple<at::Tensor, at::Tensor> attend_autograd(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                                   at::TensorList extra, std::string mechanism, Names names,
                                                   bool causal, Scale scale, Type dtype) {
  const variable_list out = AttendFunction::apply(q, k, v, extra, mechanism, names, causal, scale, dtype);
  return {out[0], out[1]};
}

}  // namespace

Attended attend(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const AttendOptions& options) {
  Names names;
  std::vector<at::Tensor> extra;
  for (const auto& [name, x] : options.extra) names.push_back(name), extra.push_back(x);
  Type dtype;
  if (options.arithmetic) dtype = std::string(name_of(*options.arithmetic));
  try {
    auto [o, lse] = call_attend(q, k, v, extra, options.mechanism, names, options.causal, options.scale, dtype);
    return {std::move(o), std::move(lse)};
  } catch (const c10::ValueError& e) {
    throw Error(e.what_without_backtrace());
  }
}

}  // namespace heed::aten

// In Python: torch.ops.heed.attend(q, k, v, extra, mechanism, names, causal, scale, dtype).
TORCH_LIBRARY(heed, m) {
  m.def("attend(Tensor q, Tensor k, Tensor v, Tensor[] extra, str mechanism, str[] names, bool causal=False, "
        "float? scale=None, str? dtype=None) -> (Tensor o, Tensor lse)");
  m.def(
      "attend_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor[] extra, Tensor o, Tensor lse, str mechanism, "
      "str[] names, bool causal=False, float? scale=None, str? dtype=None) "
      "-> (Tensor dq, Tensor dk, Tensor dv, Tensor[] dextra)");
}
TORCH_LIBRARY_IMPL(heed, CPU, m) {
  m.impl("attend", heed::aten::attend_cpu);
  m.impl("attend_backward", heed::aten::backward_cpu);
}
TORCH_LIBRARY_IMPL(heed, Meta, m) {
  m.impl("attend", heed::aten::attend_meta);
  m.impl("attend_backward", heed::aten::backward_meta);
}
TORCH_LIBRARY_IMPL(heed, Autograd, m) {
  m.impl("attend", heed::aten::attend_autograd);
  m.impl("attend_backward", torch::autograd::autogradNotImplementedFallback());
}
