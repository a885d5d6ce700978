#include "cli/torch_attend.h"

#include <algorithm>

#include "heed/base/threads.h"

namespace heed::cli {
namespace {

// Contiguous f32 copies, as they are sent.
std::vector<std::vector<float>> copies(const AttendInput& in) {
  std::vector<std::vector<float>> all;
  for (const TensorView* x : {&in.q, &in.k, &in.v}) {
    const Shape& s = x->shape;
    std::vector<float>& copy = all.emplace_back(static_cast<size_t>(elements(s)));
    float* out = copy.data();
    for (Index b = 0; b < s[0]; ++b)
      for (Index h = 0; h < s[1]; ++h)
        for (Index t = 0; t < s[2]; ++t, out += s[3]) read_f32(x->at({b, h, t}), x->dtype, x->stride[3], s[3], out);
  }
  return all;
}

Peer start(const AttendInput& in) {
  const auto tensors = copies(in);
  std::vector<std::span<const std::byte>> bytes;
  for (const auto& x : tensors) bytes.push_back(std::as_bytes(std::span(x)));
  return Peer("torch", "torch_attend",
              {{"threads", threads()}, {"tensors", {{"q", in.q.shape}, {"k", in.k.shape}, {"v", in.v.shape}}}}, bytes);
}

// Per head and query one byte for each 64 keys: whether the plan shows it one of them.
std::vector<std::uint8_t> visible_blocks(const Plan& plan) {
  const Problem& p = plan.problem;
  const Index blocks = p.M / 64;
  std::vector<std::uint8_t> table(static_cast<size_t>(p.Hq * p.N * blocks));
  const Index shared = plan.lanes == Lanes::per_query_head ? 1 : p.group();
  walk(plan, [&](const RowBlock& rows, const std::vector<Tile>& tiles) {
    for (const Tile& tile : tiles)
      for (Index i = 0; i < tile.rows.count; ++i)
        for (Index c = 0; c < tile.columns.count; ++c)
          if (sees(plan, rows, tile, i, c))
            for (Index h = rows.head; h < rows.head + shared; ++h)
              table[static_cast<size_t>((h * p.N + rows.token(tile.rows[i])) * blocks + tile.columns[c] / 64)] = 1;
  });
  return table;
}

}  // namespace

TorchAttend::TorchAttend(const AttendInput& in) : peer_(start(in)) {}

// The table says the plan's mask exactly if it shows no more pairs than the plan has, as it never shows fewer.
bool TorchAttend::send_blocks(const Plan& plan, const AttendStats& stats) {
  const Problem& p = plan.problem;
  if (!p.causal || p.B != 1 || p.N % 128 != 0 || plan.sources.size() != 1) return false;
  const std::vector<std::uint8_t> table = visible_blocks(plan);
  Index pairs = 0;
  const Index blocks = p.M / 64;
  for (Index row = 0; row < p.Hq * p.N; ++row)
    for (Index b = 0; b < blocks; ++b)
      if (table[static_cast<size_t>(row * blocks + b)] != 0) pairs += std::clamp<Index>(row % p.N + 1 - b * 64, 0, 64);
  if (pairs != stats.pairs) return false;
  peer_.ask(Json::object({{"blocks", {p.Hq, p.N, blocks}}}), std::as_bytes(std::span(table)));
  return true;
}

bool TorchAttend::take_up(const MechanismCall& call, const AttendInput& in, const Plan& plan, const AttendStats& stats,
                          const std::optional<ReferenceRows>& reference) {
  const Problem& p = plan.problem;
  runs_ = {}, error_ = {}, flex_ = call.name != "dense";
  request_ = Json::object({{"dtype", name_of(in.arithmetic)}});
  if (!in.extra.empty() || !plan.rule.plain() || (p.causal && p.N != p.M)) return false;
  if (call.name == "dense") {
    request_["mask"] = p.causal ? "causal" : "full";
  } else if (call.name == "streaming") {
    const Json parameters = params_json(call);
    request_["mask"] = "streaming", request_["sink"] = parameters.at("sink"),
    request_["window"] = parameters.at("window");
  } else if (send_blocks(plan, stats)) {
    request_["mask"] = "blocks";
  } else {
    return false;
  }
  if (!reference) return peer_.run(request_), true;
  Json check = request_;
  check["rows"] = reference->tokens();
  const auto o = peer_.ask(check).at("o").get<std::vector<double>>();  // [B · Hq, rows, Dv]
  const Index rows = static_cast<Index>(reference->tokens().size());
  error_ = reference->error([&](Index head, size_t rank, Index e) {
    return o[static_cast<size_t>((head * rows + static_cast<Index>(rank)) * p.Dv + e)];
  });
  return true;
}

void TorchAttend::take_up_backward(const AttendInput& in) {
  runs_ = {}, error_ = {}, flex_ = false;
  request_ =
      Json::object({{"dtype", name_of(in.arithmetic)}, {"mask", in.causal ? "causal" : "full"}, {"backward", true}});
  peer_.run(request_);
}

}  // namespace heed::cli
