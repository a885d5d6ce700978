#include "heed/mechanism/attend.h"

#include <fmt/format.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <memory>
#include <span>

#include "heed/base/clock.h"
#include "heed/base/threads.h"

namespace heed {
namespace {

bool real(DType t) { return t == DType::f32 || t == DType::f16 || t == DType::bf16; }

// Whether none is NaN or infinity: those have every bit of the exponent. Without branches, so that a compiler takes
// several at once: every call reads all of its input here.
bool all_finite(const float* x, Index n) {
  std::uint32_t odd = 0;
  for (Index i = 0; i < n; ++i) odd |= (std::bit_cast<std::uint32_t>(x[i]) & 0x7f800000u) == 0x7f800000u ? 1u : 0u;
  return odd == 0;
}

// NaN or infinity anywhere would silently spoil whole rows, so it is refused. -inf may be allowed.
void check_finite(const TensorView& x, const std::string& name, bool allow_minus_infinity) {
  if (!real(x.dtype) || elements(x.shape) == 0) return;
  Shape shape = x.shape, stride = x.stride;
  while (shape.size() < 4) shape.insert(shape.begin(), 1), stride.insert(stride.begin(), 0);
  const Index outer = shape[0] * shape[1] * shape[2], inner = shape[3];
  parallel_for(ceil_div(outer, 256), [&](Index unit, int) {
    std::vector<float> row(static_cast<size_t>(inner));
    for (Index i = unit * 256; i < std::min(outer, (unit + 1) * 256); ++i) {
      const Index a = i / shape[2] / shape[1], b = i / shape[2] % shape[1], c = i % shape[2];
      const auto* p =
          static_cast<const std::byte*>(x.data) + (a * stride[0] + b * stride[1] + c * stride[2]) * size_of(x.dtype);
      const bool in_place = x.dtype == DType::f32 && stride[3] == 1 &&
                            reinterpret_cast<std::uintptr_t>(p) % alignof(float) == 0;  // files may hold others
      if (!in_place) read_f32(p, x.dtype, stride[3], inner, row.data());
      const float* values = in_place ? reinterpret_cast<const float*>(p) : row.data();
      if (all_finite(values, inner)) continue;
      for (const float v : std::span(values, static_cast<size_t>(inner)))
        if (!std::isfinite(v) && !(allow_minus_infinity && std::isinf(v) && v < 0))
          fail("{}: holds {}, expected finite values{}", name, v, allow_minus_infinity ? " or -inf" : "");
    }
  });
}

void check_rank(const TensorView& x, const char* name, const char* axes) {
  if (!real(x.dtype)) fail("{}: dtype = {}, expected f32, f16 or bf16", name, name_of(x.dtype));
  if (x.rank() != 4) fail("{}: shape = {}, expected {}", name, to_string(x.shape), axes);
}

Problem check_tensors(const AttendInput& in) {
  check_rank(in.q, "q", "[B, Hq, N, D]");
  check_rank(in.k, "k", "[B, Hk, M, D]");
  check_rank(in.v, "v", "[B, Hk, M, Dv]");
  Problem p;
  p.B = in.q.shape[0], p.Hq = in.q.shape[1], p.N = in.q.shape[2], p.D = in.q.shape[3];
  p.Hk = in.k.shape[1], p.M = in.k.shape[2], p.Dv = in.v.shape[3];
  const auto positive = [](const TensorView& x, const char* name) {
    for (Index extent : x.shape)
      if (extent < 1) fail("{}: shape = {}, expected every extent >= 1", name, to_string(x.shape));
  };
  positive(in.q, "q"), positive(in.k, "k"), positive(in.v, "v");
  if (in.k.shape != Shape{p.B, p.Hk, p.M, p.D})
    fail("k: shape = {}, expected [{}, Hk, M, {}] as q = {} says", to_string(in.k.shape), p.B, p.D,
         to_string(in.q.shape));
  if (in.v.shape != Shape{p.B, p.Hk, p.M, p.Dv})
    fail("v: shape = {}, expected [{}, {}, {}, Dv] as k = {} says", to_string(in.v.shape), p.B, p.Hk, p.M,
         to_string(in.k.shape));
  if (p.Hq % p.Hk != 0) fail("q: {} heads, expected a multiple of the {} heads of k", p.Hq, p.Hk);
  constexpr Index most = 512;
  if (p.D > most) fail("q: head size {}, expected 1 … {}", p.D, most);
  if (p.Dv > most) fail("v: head size {}, expected 1 … {}", p.Dv, most);
  return p;
}

Index extent_named(const std::string& axis, const Problem& p) {
  if (axis == "B") return p.B;
  if (axis == "Hq") return p.Hq;
  if (axis == "Hk") return p.Hk;
  if (axis == "N") return p.N;
  if (axis == "M") return p.M;
  if (axis == "D") return p.D;
  if (axis == "Dv") return p.Dv;
  if (axis == "*") return -1;
  return std::stoll(axis);
}

bool axis_matches(const std::string& axis, Index extent, const Problem& p) {
  for (size_t at = 0; at <= axis.size();) {
    const size_t bar = std::min(axis.find('|', at), axis.size());
    const Index expected = extent_named(axis.substr(at, bar - at), p);
    if (expected < 0 || expected == extent) return true;
    at = bar + 1;
  }
  return false;
}

}  // namespace

void check_extras(const Mechanism& m, const std::map<std::string, TensorView, std::less<>>& extra, const Problem& p) {
  std::vector<std::string> known;
  for (const ExtraSpec& e : m.extras) known.push_back(e.name);
  for (const auto& [name, x] : extra) {
    const auto spec =
        std::find_if(m.extras.begin(), m.extras.end(), [&, n = name](const ExtraSpec& e) { return e.name == n; });
    if (spec == m.extras.end()) {
      if (known.empty()) fail("{}: tensor {} is not one it reads, expected no extra tensors", m.name, name);
      fail("{}: tensor {} is not one it reads, expected {}", m.name, name, fmt::join(known, ", "));
    }
    if (std::find(spec->dtypes.begin(), spec->dtypes.end(), x.dtype) == spec->dtypes.end()) {
      std::vector<std::string_view> names;
      for (DType t : spec->dtypes) names.push_back(name_of(t));
      fail("{}: dtype = {}, expected {}", name, name_of(x.dtype), fmt::join(names, " or "));
    }
    bool matches = x.rank() == static_cast<Index>(spec->axes.size());
    for (size_t axis = 0; matches && axis < spec->axes.size(); ++axis)
      matches = axis_matches(spec->axes[axis], x.shape[axis], p);
    if (!matches) fail("{}: shape = {}, expected [{}]", name, to_string(x.shape), fmt::join(spec->axes, ", "));
    check_finite(x, name, name == "bias");
  }
  for (const ExtraSpec& e : m.extras)
    if (e.required && extra.find(e.name) == extra.end())
      fail("{}: tensor {} is missing, expected {}", m.name, e.name, e.help);
}

bool resolve_causality(const Mechanism& m, bool asked) {
  if (m.causality == Causality::refused && asked)
    fail_usage("{}: causal = true, expected false: it is not causal by definition", m.name);
  return m.causality == Causality::implied || asked;
}

Plan CheckedCall::plan() const {
  Plan made = mechanism.plan(params, inputs);
  made.keep.push_back(kv);
  return made;
}

CheckedCall check(const MechanismCall& call, const AttendInput& in) {
  const Mechanism& m = find_mechanism(call.name);
  Params params(m.name, m.params, call.params);
  Problem p = check_tensors(in);
  p.causal = resolve_causality(m, in.causal);
  if (p.causal && p.N > p.M) fail("q: {} queries, expected at most the {} keys when causal", p.N, p.M);
  const bool decoding = p.N == 1 && m.decodes != nullptr && m.decodes(params);
  if (m.square && p.N != p.M && !decoding)
    fail("{}: {} queries and {} keys, expected as many of one as of the other", m.name, p.N, p.M);
  if (in.arithmetic != DType::f32 && in.arithmetic != DType::bf16)
    fail_usage("dtype = {}, expected f32 or bf16", name_of(in.arithmetic));
  check_finite(in.q, "q", false), check_finite(in.k, "k", false), check_finite(in.v, "v", false);
  check_extras(m, in.extra, p);
  const float scale = in.scale.value_or(1.0f / std::sqrt(static_cast<float>(p.D)));
  if (!std::isfinite(scale)) fail_usage("scale = {}, expected a finite number", scale);

  const auto kv = std::make_shared<KeyValues>(p.B * p.Hk, p.D, p.Dv, p.M, in.arithmetic);
  kv->append(in.k, in.v);

  Inputs inputs;
  inputs.problem = p;
  inputs.rule.scale = scale;
  inputs.scale_given = in.scale.has_value();
  inputs.q = Queries(in.q, in.arithmetic);
  inputs.kv = kv.get();
  inputs.prompt = p.M;
  inputs.extra = in.extra;
  return {m, std::move(params), kv, std::move(inputs)};
}

Plan plan_of(const MechanismCall& call, const AttendInput& in) { return check(call, in).plan(); }

void check_calibrates(const Mechanism& m) {
  if (m.calibrate != nullptr) return;
  if (m.fitted) fail_usage("{} learns from the gradients of a model, expected a GGUF file and a text", m.name);
  std::vector<std::string> able;
  for (const Mechanism* other : mechanisms())
    if (other->calibrate != nullptr || other->fitted) able.push_back(other->name);
  fail_usage("{} learns nothing from a text, expected one of {}", m.name, fmt::join(able, ", "));
}

NamedTensors calibrate(const MechanismCall& call, const AttendInput& in) {
  check_calibrates(find_mechanism(call.name));
  const CheckedCall checked = check(call, in);
  return checked.mechanism.calibrate(checked.params, checked.inputs);
}

namespace {

// Carries out the plan of a call.
AttendOutput attend(const CheckedCall& checked, const Plan& plan) {
  const Problem& p = plan.problem;
  const Index rows = plan.rows_per_head();
  AttendOutput out;
  out.o = Tensor(DType::f32, {p.B, p.Hq, rows, p.Dv});
  out.lse = Tensor(DType::f32, {p.B, p.Hq, rows});
  const AttendTarget target{out.o.as<float>(), p.Hq * rows * p.Dv, rows * p.Dv, p.Dv, out.lse.as<float>()};
  out.stats = heed::attend(plan, target);
  out.density = static_cast<double>(out.stats.pairs) / static_cast<double>(dense_pairs(checked.inputs.problem));
  return out;
}

void finish(const CheckedCall& checked, const Plan& plan, AttendOutput& out) {
  const Mechanism& m = checked.mechanism;
  if (m.finish != nullptr) m.finish(checked.params, checked.inputs, plan, out);
  if (m.without_lse != nullptr && m.without_lse(checked.params)) out.lse = Tensor(DType::f32, {0});
}

// A call whose gradient is that of its plan, with that plan.
struct Differentiable {
  CheckedCall checked;
  Plan plan;
  double plan_s = 0;

  Differentiable(const MechanismCall& call, const AttendInput& in, const TensorView& dout) : checked(check(call, in)) {
    const double start = seconds_now();
    const Problem& p = checked.inputs.problem;
    if (!real(dout.dtype)) fail("do: dtype = {}, expected f32, f16 or bf16", name_of(dout.dtype));
    check_shape(dout, "do", {p.B, p.Hq, p.N, p.Dv}, ", as o is");
    check_finite(dout, "do", false);

    plan = checked.plan();
    // Keys made of others: a mechanism that forgot whom their gradients belong to must not pass for one that has none.
    for (size_t i = 1; i < plan.sources.size() && checked.mechanism.finish_gradient == nullptr; ++i)
      for (const SourceView& view : plan.sources[i].views)
        if (view.members == nullptr) fail("{}: it attends keys made of others and has no finish_gradient", call.text());
    plan_s = seconds_now() - start;
  }

  static void check_shape(const TensorView& x, const char* name, const Shape& expected, const char* why = "") {
    if (x.shape != expected) fail("{}: shape = {}, expected {}{}", name, to_string(x.shape), to_string(expected), why);
  }

  bool finishes() const {
    const Mechanism& m = checked.mechanism;
    return m.finishes != nullptr && m.finishes(checked.params, checked.inputs);
  }

  // o and lse as the plan gave them, dout of the finished o.
  AttendGradients gradients(const AttendInput& in, const TensorView& o, const TensorView& lse, const TensorView& dout) {
    const Mechanism& m = checked.mechanism;
    const bool other = finishes() && m.unfinish != nullptr;
    const Tensor unfinished = other ? m.unfinish(checked.params, checked.inputs, plan, dout) : Tensor();
    PlanGradients found = heed::attend_backward(plan, o, lse, other ? unfinished.view() : dout);
    fold(plan, found);
    AttendGradients result;
    result.dq = std::move(found.dq);
    result.dk = by_kv_head(found.sources[0].dk), result.dv = by_kv_head(found.sources[0].dv);
    result.stats = found.stats;
    if (found.dbias.data() != nullptr && in.extra.contains("bias"))
      result.extra.emplace("bias", std::move(found.dbias));
    if (m.finish_gradient != nullptr) m.finish_gradient(checked.params, checked.inputs, {plan, o, dout, found}, result);
    return result;
  }

  // [views, M, width] → [B, Hk, M, width]: query heads that see keys of their own add to their KV head's.
  Tensor by_kv_head(const Tensor& x) const {
    const Problem& p = checked.inputs.problem;
    const Index size = x.shape()[1] * x.shape()[2], each = x.shape()[0] / (p.B * p.Hk);
    Tensor y(DType::f32, {p.B, p.Hk, x.shape()[1], x.shape()[2]});
    parallel_for(p.B * p.Hk, [&](Index head, int) {
      for (Index view = head * each; view < (head + 1) * each; ++view)
        for (Index i = 0; i < size; ++i) y.as<float>()[head * size + i] += x.as<float>()[view * size + i];
    });
    return y;
  }
};

}  // namespace

AttendOutput attend(const MechanismCall& call, const AttendInput& in) {
  const double start = seconds_now();
  const CheckedCall checked = check(call, in);
  const Plan plan = checked.plan();
  const double planned = seconds_now() - start;
  AttendOutput out = attend(checked, plan);
  out.stats.plan_s += planned;
  finish(checked, plan, out);
  return out;
}

AttendGradients attend_backward(const MechanismCall& call, const AttendInput& in, const TensorView& dout,
                                AttendOutput* forward) {
  Differentiable made(call, in, dout);
  AttendOutput out = attend(made.checked, made.plan);
  out.stats.plan_s += made.plan_s;
  AttendGradients result = made.gradients(in, out.o.view(), out.lse.view(), dout);
  if (forward != nullptr) {
    finish(made.checked, made.plan, out);
    *forward = std::move(out);
  }
  return result;
}

AttendGradients attend_backward(const MechanismCall& call, const AttendInput& in, const TensorView& dout,
                                const TensorView& o, const TensorView& lse) {
  Differentiable made(call, in, dout);
  const Problem& p = made.checked.inputs.problem;
  if (o.dtype != DType::f32) fail("o: dtype = {}, expected f32", name_of(o.dtype));
  if (lse.dtype != DType::f32) fail("lse: dtype = {}, expected f32", name_of(lse.dtype));
  made.check_shape(o, "o", {p.B, p.Hq, p.N, p.Dv});
  const Mechanism& m = made.checked.mechanism;
  const bool without = m.without_lse != nullptr && m.without_lse(made.checked.params);
  made.check_shape(lse, "lse", without ? Shape{0} : Shape{p.B, p.Hq, p.N});
  AttendGradients result;
  if (made.finishes()) {  // o is no longer what the plan gave
    const AttendOutput again = attend(made.checked, made.plan);
    result = made.gradients(in, again.o.view(), again.lse.view(), dout);
    result.stats.attend_s += again.stats.attend_s;
  } else {
    result = made.gradients(in, o, lse, dout);
  }
  result.stats.plan_s += made.plan_s;
  return result;
}

AttendOutput attend(std::string_view call, const AttendInput& in) { return attend(MechanismCall::parse(call), in); }

}  // namespace heed
