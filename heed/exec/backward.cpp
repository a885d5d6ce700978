#include "heed/exec/backward.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "heed/base/clock.h"
#include "heed/base/threads.h"
#include "heed/exec/mirror.h"
#include "heed/exec/traverse.h"
#include "heed/exec/units.h"

namespace heed {
namespace {

// What some row blocks of a lane give to the keys and values that they meet: rows [columns, qp] and [columns, dvp], and
// to log-weights, of each source.
struct Chain {
  std::vector<Tensor> dk, dv, dlog_weight;
  std::vector<double> dsinks;  // per head of the lane
};

// A lane is a batch and a KV head, or a query head when keys differ by query head. Its row blocks are dealt out to a
// number of chains that shapes fix. A chain adds up in ascending order, and chains are added up in theirs, so bits do
// not depend on threads.
struct Chains {
  bool by_query = false;
  Index lanes = 0, each = 1;
  Index heads = 1;  // query heads of a lane
  Index count() const { return lanes * each; }
};

Chains chains_of(const Plan& plan, const Units& units) {
  const Problem& p = plan.problem;
  Chains c;
  for (const Source& s : plan.sources) c.by_query = c.by_query || s.per_query_head;
  c.lanes = p.B * (c.by_query ? p.Hq : p.Hk);
  c.heads = c.by_query ? 1 : p.group();
  // Enough for a machine's threads, few enough to be added up at little cost.
  c.each = std::clamp<Index>(ceil_div(8, c.lanes), 1, std::max<Index>(1, std::min<Index>(4, units.blocks)));
  // The rows of a token stand in blocks with one number, else one chain must add up its biases.
  if (!plan.rule.bias.empty() && !plan.row_tokens.empty()) c.each = 1;
  return c;
}

// Several lanes add to one element of a bias.
bool shares_bias(const Plan& plan) {
  const TensorView& bias = plan.rule.bias;
  return !bias.empty() && bias.shape[0] * bias.shape[1] < plan.problem.B * plan.problem.Hq;
}

// The rows of a block as the backward pass needs them, [count] each.
struct BlockRows {
  const float *q, *dout, *lse, *delta;
  float* dq;
};

class BackwardPanels final : public PanelWork {
 public:
  BackwardPanels(const Plan& plan, const Mirrors& mirrors, Chain& chain, float* dbias)
      : plan_(plan), mirrors_(mirrors), chain_(chain), dbias_(dbias) {}

  void start(const BlockRows& rows) { rows_ = rows; }

  SourceView take_up(const Rows& rows, const Tile& tile, const SourceView& view, Index from, Index count,
                     Scratch& scratch) override {
    const Index padded = round_up(count, panel_columns);
    const auto zeros = [&](Index n) {
      float* x = scratch.take<float>(n).data();
      std::fill_n(x, n, 0.0f);
      return x;
    };
    piece_ = {gather_columns(mirrors_.layout, mirrors_.view(plan_, tile.source, rows.block), tile.columns, from, count,
                             scratch),
              zeros(padded * mirrors_.qp()), zeros(padded * mirrors_.dvp),
              view.log_weight == nullptr ? nullptr : zeros(padded)};
    return gather_columns(mirrors_.scores, view, tile.columns, from, count, scratch);
  }

  void put_back(const Rows&, const Tile& tile, Index from, Index count) override {
    const Sums to = whole(tile.source);
    const Index qp = mirrors_.qp(), dvp = mirrors_.dvp;
    for (Index i = 0; i < count; ++i) {
      const Index column = tile.columns[from + i];
      for (Index f = 0; f < qp; ++f) to.dk[column * qp + f] += piece_.sums.dk[i * qp + f];
      for (Index e = 0; e < dvp; ++e) to.dv[column * dvp + e] += piece_.sums.dv[i * dvp + e];
      if (piece_.sums.dlog_weight != nullptr) to.dlog_weight[column] += piece_.sums.dlog_weight[i];
    }
  }

  void meet(const Rows& rows, const Tile& tile, const PanelTask& task, const Place& place, Scratch& scratch) override {
    const bool listed = !tile.columns.contiguous();
    const SourceView& mirror = listed ? piece_.view : mirrors_.view(plan_, tile.source, rows.block);
    const Sums sums = listed ? piece_.sums : whole(tile.source);
    const Index qp = mirrors_.qp(), dvp = mirrors_.dvp, first = place.panel * panel_columns;

    BackwardTask b;
    b.scores = task;
    b.qp = qp, b.dvp = dvp;
    b.values = static_cast<const float*>(mirror.keys) + place.panel * mirrors_.layout.panel_elements();
    b.keys = static_cast<const float*>(mirror.values) + first * qp;
    b.dk = sums.dk + first * qp, b.dv = sums.dv + first * dvp;
    if (sums.dlog_weight != nullptr) b.dcolumn = sums.dlog_weight + first;
    b.dq = rows_.dq;
    if (task.row_list == nullptr) {
      b.q = rows_.q + task.first_row * qp, b.dout = rows_.dout + task.first_row * dvp;
      b.lse = rows_.lse + task.first_row, b.delta = rows_.delta + task.first_row;
    } else {  // products read rows that lie one after the other
      b.q = gather(rows_.q, qp, task, scratch), b.dout = gather(rows_.dout, dvp, task, scratch);
      b.lse = gather(rows_.lse, 1, task, scratch), b.delta = gather(rows_.delta, 1, task, scratch);
    }
    const Index room = task.rows * BackwardTask::stride;
    b.p = scratch.take<float>(room).data(), b.ds = scratch.take<float>(room).data();
    const bool biased = dbias_ != nullptr && tile.source == 0;
    if (biased) b.dscore = scratch.take<float>(room).data();
    kernels().attend_backward(b);
    if (biased) add_to_bias(rows, task, place, b.dscore);
  }

 private:
  struct Sums {
    float *dk, *dv, *dlog_weight;
  };
  struct Piece {
    SourceView view;
    Sums sums;
  };

  Sums whole(Index source) {
    const size_t s = static_cast<size_t>(source);
    return {chain_.dk[s].as<float>(), chain_.dv[s].as<float>(),
            chain_.dlog_weight[s].size() > 0 ? chain_.dlog_weight[s].as<float>() : nullptr};
  }

  static const float* gather(const float* x, Index width, const PanelTask& task, Scratch& scratch) {
    float* out = scratch.take<float>(task.rows * width).data();
    for (Index i = 0; i < task.rows; ++i) std::copy_n(x + task.row_list[i] * width, width, out + i * width);
    return out;
  }

  void add_to_bias(const Rows& rows, const PanelTask& task, const Place& place, const float* dscore) {
    const TensorView& bias = plan_.rule.bias;
    const Problem& p = plan_.problem;
    const Index begin = std::max(place.first(), place.origin);
    const Index end = std::min(place.first() + task.panels * panel_columns, place.origin + place.view.columns);
    for (Index i = 0; i < task.rows; ++i) {
      const Index rank = task.row_list == nullptr ? task.first_row + i : task.row_list[i];
      const Index b = bias.shape[0] == 1 ? 0 : rows.block.b, h = bias.shape[1] == 1 ? 0 : rows.head_of(rank);
      float* to = dbias_ + ((b * bias.shape[1] + h) * p.N + rows.block.token(rows.row_of(rank))) * p.M;
      const float* from = dscore + i * BackwardTask::stride - place.first();
      for (Index r = begin; r < end; ++r) {
        const Index column = r - place.origin;
        to[place.view.position == nullptr ? column : place.view.position[column]] += from[r];
      }
    }
  }

  const Plan& plan_;
  const Mirrors& mirrors_;
  Chain& chain_;
  float* dbias_;
  BlockRows rows_{};
  Piece piece_{};
};

class Backward {
 public:
  Backward(const Plan& plan, const TensorView& o, const TensorView& lse, const TensorView& dout)
      : plan_(plan), mirrors_(mirror_sources(plan_)), o_(o), lse_(lse), dout_(dout), units_(units_of(plan)),
        chains_(chains_of(plan, units_)) {
    const Problem& p = plan.problem;
    repeats_ = !plan.row_tokens.empty() && !plan.output_by_token;
    dq_ = Tensor(DType::f32, {p.B, p.Hq, repeats_ ? plan.rows_per_head() : p.N, p.D});
    if (!plan.rule.bias.empty()) dbias_ = Tensor(DType::f32, plan.rule.bias.shape);
  }

  PlanGradients run() {
    const double start = seconds_now();
    std::vector<Chain> chains(static_cast<size_t>(chains_.count()));
    std::vector<AttendStats> counted(chains.size());
    std::vector<double> emitting(chains.size(), 0.0);
    // Lanes that add to the same biases follow one another.
    const bool in_turn = shares_bias(plan_);
    parallel_for(in_turn ? chains_.each : chains_.count(), [&](Index unit, int) {
      for (Index lane = in_turn ? 0 : unit / chains_.each; lane < chains_.lanes; ++lane) {
        const Index number = unit % chains_.each;
        const size_t at = static_cast<size_t>(lane * chains_.each + number);
        run_chain(lane, number, chains[at], counted[at], emitting[at]);
        if (!in_turn) break;
      }
    });

    PlanGradients out;
    for (const AttendStats& s : counted) out.stats += s;
    for (size_t s = 0; s < plan_.sources.size(); ++s) out.sources.push_back(add_up(chains, s));
    out.dq = repeats_ ? rows_to_tokens() : std::move(dq_);
    out.dbias = std::move(dbias_);
    if (!plan_.rule.sinks.empty()) {
      out.dsinks = Tensor(DType::f32, {plan_.problem.Hq});
      for (Index h = 0; h < plan_.problem.Hq; ++h) {
        double sum = 0;
        for (Index lane = 0; lane < chains_.lanes; ++lane)
          for (Index c = 0; c < chains_.each; ++c)
            if (const Index own = h - lane * chains_.heads % plan_.problem.Hq; own >= 0 && own < chains_.heads)
              sum += chains[static_cast<size_t>(lane * chains_.each + c)].dsinks[static_cast<size_t>(own)];
        out.dsinks.as<float>()[h] = static_cast<float>(sum);
      }
    }
    double emit_s = 0;
    for (const double s : emitting) emit_s += s;
    const double wall = seconds_now() - start;
    out.stats.plan_s =
        std::min(wall, emit_s / static_cast<double>(std::max<Index>(1, std::min<Index>(threads(), chains_.count()))));
    out.stats.attend_s = wall - out.stats.plan_s;
    out.stats.scratch_bytes = scratch_bytes();
    return out;
  }

 private:
  // The view of a source that a lane meets.
  size_t view_of(const Source& source, Index lane) const {
    return static_cast<size_t>(chains_.by_query && !source.per_query_head ? lane / plan_.problem.group() : lane);
  }

  void run_chain(Index lane, Index number, Chain& chain, AttendStats& counted, double& emit_s) {
    for (const Source& source : plan_.sources) {
      const SourceView& view = source.views[view_of(source, lane)];
      const Index columns = round_up(view.columns, panel_columns);
      chain.dk.emplace_back(DType::f32, Shape{columns, mirrors_.qp()});
      chain.dv.emplace_back(DType::f32, Shape{columns, mirrors_.dvp});
      chain.dlog_weight.emplace_back(DType::f32, Shape{view.log_weight == nullptr ? 0 : columns});
    }
    chain.dsinks.assign(static_cast<size_t>(chains_.heads), 0.0);
    BackwardPanels work(plan_, mirrors_, chain, dbias_.as<float>());
    Scratch& scratch = thread_scratch();
    std::vector<Tile> reused;
    for (Index head = 0; head < chains_.heads; head += units_.heads)
      for (Index cut = number; cut < units_.blocks; cut += chains_.each) {
        const Scratch::Mark mark(scratch);
        Rows rows;
        rows.block = block_of(plan_, units_, (lane * chains_.heads + head) / units_.heads, cut);
        rows.heads = units_.heads;
        const double emit_start = seconds_now();
        Tiles tiles(scratch, reused);
        plan_.emit(rows.block, tiles);
        emit_s += seconds_now() - emit_start;
        counted.tiles_planned += static_cast<Index>(tiles.list().size());
        const BlockRows data = load(rows, chain.dsinks.data() + head, scratch);
        work.start(data);
        Traversal(plan_, scratch, &work).run(rows, tiles.list(), 0, std::numeric_limits<Index>::max(), counted);
        store(rows, data.dq);
      }
  }

  // Queries, gradients of outputs, lse and delta; and what the rows give to their heads' sinks.
  BlockRows load(const Rows& rows, double* dsinks, Scratch& scratch) const {
    const Index count = rows.count(), qp = mirrors_.qp(), dvp = mirrors_.dvp, d = plan_.problem.D,
                dv = plan_.problem.Dv;
    float* q = scratch.take<float>(count * qp).data();
    float* dout = scratch.take<float>(count * dvp).data();
    float* lse = scratch.take<float>(count).data();
    float* delta = scratch.take<float>(count).data();
    float* o = scratch.take<float>(dv).data();
    float* dq = scratch.take<float>(count * qp).data();
    std::fill_n(dq, count * qp, 0.0f);
    for (Index i = 0; i < count; ++i) {
      const Index head = rows.head_of(i), b = rows.block.b, row = output_row(rows, i);
      plan_.queries.read(b, head, rows.block.token(rows.row_of(i)), q + i * qp);
      std::fill(q + i * qp + d, q + (i + 1) * qp, 0.0f);
      read_f32(dout_.at({b, head, row}), dout_.dtype, dout_.stride[3], dv, dout + i * dvp);
      std::fill(dout + i * dvp + dv, dout + (i + 1) * dvp, 0.0f);
      read_f32(o_.at({b, head, row}), o_.dtype, o_.stride[3], dv, o);
      read_f32(lse_.at({b, head, row}), lse_.dtype, 1, 1, lse + i);
      delta[i] = kernels().dot(o, dout + i * dvp, dv);
      if (!plan_.rule.sinks.empty()) {
        const float sink = plan_.rule.sinks[static_cast<size_t>(head)];
        dsinks[head - rows.block.head] -= std::exp(static_cast<double>(sink - lse[i])) * static_cast<double>(delta[i]);
      }
      if (std::isinf(lse[i])) lse[i] = 0;  // it sees nothing, so any number will do
    }
    return {q, dout, lse, delta, dq};
  }

  Index output_row(const Rows& rows, Index rank) const {
    const Index row = rows.row_of(rank);
    return plan_.output_by_token ? rows.block.token(row) : rows.block.first + row;
  }

  void store(const Rows& rows, const float* dq) {
    const Index d = plan_.problem.D, qp = mirrors_.qp(), per_head = dq_.shape()[2];
    for (Index i = 0; i < rows.count(); ++i) {
      float* out =
          dq_.as<float>() + ((rows.block.b * plan_.problem.Hq + rows.head_of(i)) * per_head + output_row(rows, i)) * d;
      for (Index f = 0; f < d; ++f) out[f] = dq[i * qp + f] * plan_.rule.scale;
    }
  }

  // A token's gradient is the sum over its rows.
  Tensor rows_to_tokens() const {
    const Problem& p = plan_.problem;
    const Index rows = plan_.rows_per_head();
    Tensor sum(DType::f32, {p.B, p.Hq, p.N, p.D});
    parallel_for(p.B * p.Hq, [&](Index lane, int) {
      const auto& tokens =
          plan_.row_tokens[static_cast<size_t>(plan_.lanes == Lanes::per_query_head ? lane : lane / p.group())];
      for (Index r = 0; r < rows; ++r) {
        const float* from = dq_.as<float>() + (lane * rows + r) * p.D;
        float* to = sum.as<float>() + (lane * p.N + tokens[static_cast<size_t>(r)]) * p.D;
        for (Index f = 0; f < p.D; ++f) to[f] += from[f];
      }
    });
    return sum;
  }

  SourceGradients add_up(const std::vector<Chain>& chains, size_t s) const {
    const Source& source = plan_.sources[s];
    const Index views = static_cast<Index>(source.views.size()), d = plan_.problem.D, dv = plan_.problem.Dv;
    const Index qp = mirrors_.qp(), dvp = mirrors_.dvp, columns = views == 0 ? 0 : source.views[0].columns;
    const bool weighted = views > 0 && source.views[0].log_weight != nullptr;
    SourceGradients out{Tensor(DType::f32, {views, columns, d}), Tensor(DType::f32, {views, columns, dv}),
                        Tensor(DType::f32, {weighted ? views : 0, columns})};
    const Index chunks = ceil_div(columns, chunk_columns);
    const Index lanes_a_view = chains_.lanes / std::max<Index>(1, views);
    parallel_for(views * chunks, [&](Index unit, int) {
      const Index view = unit / chunks, first = unit % chunks * chunk_columns,
                  end = std::min(columns, first + chunk_columns);
      float *dk = out.dk.as<float>() + view * columns * d, *dv_out = out.dv.as<float>() + view * columns * dv;
      for (Index c = view * lanes_a_view * chains_.each; c < (view + 1) * lanes_a_view * chains_.each; ++c) {
        const Chain& chain = chains[static_cast<size_t>(c)];
        const float *from_k = chain.dk[s].as<float>(), *from_v = chain.dv[s].as<float>();
        for (Index j = first; j < end; ++j) {
          for (Index f = 0; f < d; ++f) dk[j * d + f] += from_k[j * qp + f];
          for (Index e = 0; e < dv; ++e) dv_out[j * dv + e] += from_v[j * dvp + e];
          if (weighted) out.dlog_weight.as<float>()[view * columns + j] += chain.dlog_weight[s].as<float>()[j];
        }
      }
      for (Index i = first * d; i < end * d; ++i) dk[i] *= plan_.rule.scale;
    });
    return out;
  }

  Plan plan_;  // whose sources are f32 ones
  Mirrors mirrors_;
  const TensorView &o_, &lse_, &dout_;
  Units units_;
  Chains chains_;
  bool repeats_ = false;  // a token may stand in several rows or none
  Tensor dq_, dbias_;  // dq: of tokens, or of rows when they repeat
};

}  // namespace

PlanGradients attend_backward(const Plan& plan, const TensorView& o, const TensorView& lse, const TensorView& dout) {
  const Problem& p = plan.problem;
  const Index rows = plan.rows_per_head();
  const auto check = [](const char* name, const TensorView& x, const Shape& expected) {
    if (x.shape != expected) fail("{}: shape = {}, expected {}", name, to_string(x.shape), to_string(expected));
  };
  check("o", o, {p.B, p.Hq, rows, p.Dv}), check("lse", lse, {p.B, p.Hq, rows});
  check("dout", dout, {p.B, p.Hq, rows, p.Dv});
  return Backward(plan, o, lse, dout).run();
}

}  // namespace heed
