// heed's mechanisms on torch tensors, with gradients: the operators torch.ops.heed.attend and attend_backward, which
// this library registers, and their face for C++.
#pragma once

#include <ATen/core/Tensor.h>

#include <map>
#include <optional>
#include <string>

#include "heed/base/types.h"

namespace heed::aten {

struct AttendOptions {
  std::string mechanism = "dense";  // NAME or NAME:parameter=value,… of heed list
  bool causal = false;
  std::optional<double> scale = {};      // default D^-1/2
  std::optional<DType> arithmetic = {};  // f32 or bf16; default: bf16 when q, k and v all are, else f32
  std::map<std::string, at::Tensor, std::less<>> extra = {};  // the mechanism's extra tensors by name
};

struct Attended {
  at::Tensor o;    // [B, Hq, N, Dv] f32
  at::Tensor lse;  // [B, Hq, N] f32, natural log; [0] for mechanisms that have none. It carries no gradient.
};

/// Attention of q [B, Hq, N, D] over k [B, Hk, M, D] and v [B, Hk, M, Dv], f32, f16 or bf16 on the CPU, any strides,
/// none copied. Gradients reach q, k, v and the extra tensors that heed differentiates (`bias`, `k_extra`, …), each in
/// its tensor's type, what the mechanism selects taken as constant. There are no second derivatives. Throws heed::Error
/// as heed::attend does; a mechanism without a backward pass says so in backward(), where the exception is a c10::Error
/// with the same line.
Attended attend(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const AttendOptions& options = {});

}  // namespace heed::aten
