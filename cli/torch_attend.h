// torch's attention on the tensors that `heed bench attend` times.
#pragma once

#include <optional>
#include <span>
#include <vector>

#include "cli/attend_reference.h"
#include "cli/peer.h"

namespace heed::cli {

class TorchAttend {
 public:
  /// Starts torch and gives it q, k and v as f32. Throws Error where it is missing.
  explicit TorchAttend(const AttendInput& in);

  /// Makes a call the one that run() repeats, and lets torch run it once, compiling what it must. False where torch
  /// cannot say its mask: masks are none, causal, streaming's, and any causal one whose visible keys, those behind the
  /// query aside, come in whole blocks of 64. `reference`: held against torch's output, where there is one.
  bool take_up(const MechanismCall& call, const AttendInput& in, const Plan& plan, const AttendStats& stats,
               const std::optional<ReferenceRows>& reference);
  /// Makes dense attention and its gradient what run() repeats.
  void take_up_backward(const AttendInput& in);
  void run() { runs_.add(peer_.run(request_)); }

  const Runs& runs() const { return runs_; }
  std::optional<double> error() const { return error_; }
  /// What computes it: scaled_dot_product_attention or flex_attention.
  const char* function() const { return flex_ ? "flex_attention" : "scaled_dot_product_attention"; }
  const Peer& peer() const { return peer_; }

 private:
  bool send_blocks(const Plan& plan, const AttendStats& stats);
  Peer peer_;
  Json request_;
  Runs runs_;
  std::optional<double> error_;
  bool flex_ = false;
};

}  // namespace heed::cli
