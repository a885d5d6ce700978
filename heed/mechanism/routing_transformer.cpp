// Routing Transformer: centroids gather the queries and the keys nearest to them, attention runs inside each
// cluster, and a token's output is the mean over the clusters that it is in.
// "Efficient Content-Based Sparse Attention with Routing Transformers", arXiv:2003.05997.

#include <algorithm>
#include <cmath>
#include <memory>

#include "heed/base/threads.h"
#include "heed/mechanism/extra.h"
#include "heed/mechanism/registry.h"
#include "heed/plan/clusters.h"

namespace heed::mechanism {
namespace {

// Our addition, for use without trained centroids: k-means of the queries and keys at hand, which share their
// centroids. So that it stays cheap it sees 64 vectors a cluster.
std::vector<float> fit_centroids(const Params& p, Index clusters, std::span<const float> q, std::span<const float> k,
                                 Index d) {
  const Index queries = static_cast<Index>(q.size()) / d, rows = queries + static_cast<Index>(k.size()) / d;
  if (clusters > rows)
    fail_usage("routing-transformer: clusters = {}, expected at most {}, the vectors there are", clusters, rows);
  const auto seed = static_cast<std::uint64_t>(p.integer("seed"));
  std::vector<float> x;
  for (const Index row : sample_evenly(rows, std::min(rows, 64 * clusters), seed)) {
    const float* from = row < queries ? q.data() + row * d : k.data() + (row - queries) * d;
    x.insert(x.end(), from, from + d);
  }
  return spherical_kmeans(x.data(), static_cast<Index>(x.size()) / d, d,
                          {.clusters = clusters, .iterations = p.integer("iterations"), .seed = seed});
}

// The centroids of every batch and KV head, [B · Hk][C · D].
std::vector<std::vector<float>> centroids_of(const Params& p, const Inputs& in, const Tensor& q, const Tensor& k) {
  const Problem& problem = in.problem;
  const Index lanes = problem.B * problem.Hk, d = problem.D, asked = p.integer("clusters");
  std::vector<std::vector<float>> centroids(static_cast<size_t>(lanes));
  if (const TensorView* mu = in.find("mu"); mu != nullptr) {
    const Index clusters = mu->shape[1];
    if (clusters < 1) fail("mu: shape = {}, expected [Hk, C, D] with at least one centroid", to_string(mu->shape));
    if (asked != 0 && asked != clusters)
      fail_usage("routing-transformer: clusters = {}, expected {} as mu says, or 0", asked, clusters);
    for (Index lane = 0; lane < lanes; ++lane) {
      std::vector<float>& to = centroids[static_cast<size_t>(lane)];
      to.resize(static_cast<size_t>(clusters * d));
      for (Index c = 0; c < clusters; ++c)
        read_f32(mu->at({lane % problem.Hk, c}), mu->dtype, mu->stride[2], d, to.data() + c * d);
    }
    return centroids;
  }
  const Index clusters = asked != 0 ? asked : ceil_div(problem.M, p.integer("cluster_size"));
  const Index queries = problem.group() * problem.N * d, keys = p.boolean("shared_qk") ? 0 : problem.M * d;
  for (Index lane = 0; lane < lanes; ++lane)
    centroids[static_cast<size_t>(lane)] =
        fit_centroids(p, clusters, {q.as<float>() + lane * queries, static_cast<size_t>(queries)},
                      {k.as<float>() + lane * keys, static_cast<size_t>(keys)}, d);
  return centroids;
}

// Lists of C · width tokens for every head of x (query heads or KV heads), which is packed in f32 in any arithmetic:
// rounding would flip near-ties.
std::vector<std::vector<std::int32_t>> lists_of(const KeyValues& x, const std::vector<std::vector<float>>& centroids,
                                                Index width) {
  const Index group = x.heads() / static_cast<Index>(centroids.size());
  std::vector<std::span<const float>> of_head;
  for (Index head = 0; head < x.heads(); ++head) of_head.emplace_back(centroids[static_cast<size_t>(head / group)]);
  return gather_clusters(x, of_head, width);
}

// Step 1: [B, Hq, N, D] and [B · Hk, M, D].
auto queries_of(const Inputs& in) {
  return [&](Index head, Index t, float* row) { in.q.read(head / in.problem.Hq, head % in.problem.Hq, t, row); };
}
auto keys_of(const Inputs& in) {
  return [&](Index head, Index t, float* row) { in.kv->read_key(head, t, row); };
}
Tensor normalised_queries(const Inputs& in, float eps) {
  const Problem& p = in.problem;
  return layer_norm_rows({p.B, p.Hq, p.N, p.D}, eps, queries_of(in));
}
Tensor normalised_keys(const Inputs& in, float eps) {
  const Problem& p = in.problem;
  return layer_norm_rows({p.B * p.Hk, p.M, p.D}, eps, keys_of(in));
}

// `mu` of the k-means over the first batch.
NamedTensors calibrate(const Params& p, const Inputs& in) {
  const auto eps = static_cast<float>(p.number("ln_eps"));
  const Tensor q = normalised_queries(in, eps), k = normalised_keys(in, eps);
  const std::vector<std::vector<float>> centroids = centroids_of(p, in, q, k);
  Tensor mu(DType::f32, {in.problem.Hk, static_cast<Index>(centroids[0].size()) / in.problem.D, in.problem.D});
  for (Index head = 0; head < in.problem.Hk; ++head) {
    const std::vector<float>& from = centroids[static_cast<size_t>(head)];
    std::copy(from.begin(), from.end(), mu.as<float>() + head * static_cast<Index>(from.size()));
  }
  NamedTensors tensors;
  tensors.emplace("mu", std::move(mu));
  return tensors;
}

// Everything that emit needs, per lane.
struct Routing {
  Tensor q;                                         // normalised [B, Hq, N, D]
  Tensor k{DType::f32, {0}};                        // and [B · Hk, M, D], where keys are not the queries
  std::unique_ptr<KeyValues> keys;                  // normalised, packed; per query head where they are the queries
  std::vector<std::vector<std::int32_t>> k_lists;   // [heads of keys][C · key_width]
};

// Rows are the clusters' queries, cluster after cluster. Memory is O(N·D) for the normalised queries and keys; choosing
// takes N·C·D multiply-adds per query head and per KV head.
Plan plan_routing(const Params& p, const Inputs& in) {
  const Problem problem = in.problem;
  const bool shared = p.boolean("shared_qk"), mask_self = p.boolean("mask_self");
  if (shared && problem.N != problem.M)
    fail_usage(
        "routing-transformer: shared_qk = true with {} queries and {} keys, expected as many of one as of the other",
        problem.N, problem.M);
  if (p.given("scale") && in.scale_given)
    fail_usage("routing-transformer: scale = {} beside the call's own scale {}, expected one of them",
               p.number("scale"), in.rule.scale);
  const auto eps = static_cast<float>(p.number("ln_eps"));

  // Step 1.
  const auto routing = std::make_shared<Routing>();
  routing->q = normalised_queries(in, eps);
  if (!shared) routing->k = normalised_keys(in, eps);
  const Tensor &k = routing->k, &keys = shared ? routing->q : k;

  // Steps 2 and 3. One set of centroids for a KV head and its queries (the group's sharing is our choice).
  const std::vector<std::vector<float>> centroids = centroids_of(p, in, routing->q, k);
  const Index clusters = static_cast<Index>(centroids[0].size()) / problem.D;
  const Index query_width = std::min(p.integer("cluster_size"), problem.N);
  const Index key_width = std::min(p.integer("cluster_size"), problem.M);
  Rule rule = in.rule;
  if (!in.scale_given) rule.scale = static_cast<float>(p.number("scale"));
  Plan plan = make_plan(problem, Queries(routing->q.view(), in.q.arithmetic()), *in.kv, rule, Lanes::per_query_head);
  plan.output_by_token = false;  // a token may stand in several clusters
  {
    KeyValues packed = pack_keys(routing->q.view(), DType::f32);
    plan.row_tokens = lists_of(packed, centroids, query_width);
    if (!shared) packed = pack_keys(k.view(), DType::f32);
    routing->k_lists = shared ? plan.row_tokens : lists_of(packed, centroids, key_width);
    // Normalised keys beside the values as they are.
    if (in.kv->layout().dtype != DType::f32) packed = pack_keys(keys.view(), in.kv->layout().dtype);
    routing->keys = std::make_unique<KeyValues>(std::move(packed));
  }
  const Index heads = routing->keys->heads();
  std::vector<SourceView> views(static_cast<size_t>(heads));
  for (Index head = 0; head < heads; ++head) {
    SourceView& view = views[static_cast<size_t>(head)];
    view = plan.sources[0].views[static_cast<size_t>(shared ? head / problem.group() : head)];
    view.keys = routing->keys->keys(head), view.key_scale = routing->keys->key_scales(head);
    if (plan.sources[0].layout.dtype == DType::f32 && plan.sources[0].layout.dp == problem.D &&
        in.kv->arithmetic() == DType::f32)
      view.key_rows = reinterpret_cast<const std::byte*>(keys.as<float>() + head * problem.M * problem.D);
  }
  plan.sources[0].views = std::move(views);
  plan.sources[0].per_query_head = shared;

  // A long cluster is cut as well: its rows' state should stay in cache, and threads should have something to share.
  plan.cuts = {0};
  for (Index c = 0; c < clusters; ++c)
    for (Index begin = 0; begin < query_width; begin += 1024)
      plan.cuts.push_back(c * query_width + std::min(begin + 1024, query_width));

  plan.emit = [=, routing = routing.get()](const RowBlock& rows, Tiles& tiles) {
    const Index head = shared ? rows.b * problem.Hq + rows.head : rows.b * problem.Hk + rows.kv_head;
    const std::int32_t* list =
        routing->k_lists[static_cast<size_t>(head)].data() + rows.first / query_width * key_width;
    // Step 4. Positions are compared, never ranks in the two lists.
    const Index last = rows.position(rows.rows - 1);
    const Index seen = problem.causal ? std::upper_bound(list, list + key_width, last) - list : key_width;
    const Set all = Set::range(0, rows.rows);
    const auto columns = [&](Index count) {
      if (key_width == problem.M) return Set::range(0, count);  // all keys
      return Set::list({list, static_cast<size_t>(count)});
    };
    if (!mask_self) {
      tiles.add(all, columns(seen), problem.causal ? Mask::causal() : Mask::full());
      return;
    }
    // A query meets its own key only where the cluster holds no other that it may see: the first of the list when
    // causal, else the only one.
    tiles.add(all, columns(seen), Mask::band(-Mask::unbounded, -1));
    if (!problem.causal) tiles.add(all, columns(seen), Mask::band(1, Mask::unbounded));
    if (!problem.causal && key_width > 1) return;
    Index first = 0;
    while (first < rows.rows && rows.position(first) < list[0]) ++first;
    if (first < rows.rows && rows.position(first) == list[0])
      tiles.add(Set::range(first, first + 1), columns(1), Mask::full());
  };
  plan.keep = {routing};
  return plan;
}

// Step 5: what the outputs of a head's tokens are divided by. A token in no cluster gets zero, whatever it is divided
// by.
std::vector<float> divisors(const Params& p, const Inputs& in, std::span<const std::int32_t> tokens) {
  std::vector<Index> count(static_cast<size_t>(in.problem.N), 0);
  for (const std::int32_t t : tokens) ++count[static_cast<size_t>(t)];
  std::vector<float> divisor(count.size(), 1.0f);
  for (size_t t = 0; t < count.size(); ++t)
    if (count[t] > 0) divisor[t] = static_cast<float>(static_cast<double>(count[t]) + p.number("eps"));
  return divisor;
}

// The mean over a token's clusters.
void finish_routing(const Params& p, const Inputs& in, const Plan& plan, AttendOutput& out) {
  const Problem& problem = in.problem;
  const Index dv = problem.Dv, rows = plan.rows_per_head();
  Tensor o(DType::f32, {problem.B, problem.Hq, problem.N, dv});
  parallel_for(problem.B * problem.Hq, [&](Index head, int) {
    const std::vector<std::int32_t>& tokens = plan.row_tokens[static_cast<size_t>(head)];
    const std::vector<float> divisor = divisors(p, in, tokens);
    float* to = o.as<float>() + head * problem.N * dv;
    for (Index row = 0; row < rows; ++row)
      for (Index e = 0, t = tokens[static_cast<size_t>(row)]; e < dv; ++e)
        to[t * dv + e] += out.o.as<float>()[(head * rows + row) * dv + e];
    for (Index t = 0; t < problem.N; ++t)
      for (Index e = 0; e < dv; ++e) to[t * dv + e] /= divisor[static_cast<size_t>(t)];
  });
  out.o = std::move(o);
}

bool takes_means(const Params&, const Inputs&) { return true; }

// Every row of a token has the same share of its gradient.
Tensor unfinish_routing(const Params& p, const Inputs& in, const Plan& plan, const TensorView& dout) {
  const Problem& problem = in.problem;
  const Index dv = problem.Dv, rows = plan.rows_per_head();
  Tensor given(DType::f32, {problem.B, problem.Hq, rows, dv});
  parallel_for(problem.B * problem.Hq, [&](Index head, int) {
    const std::vector<std::int32_t>& tokens = plan.row_tokens[static_cast<size_t>(head)];
    const std::vector<float> divisor = divisors(p, in, tokens);
    for (Index row = 0; row < rows; ++row) {
      const Index t = tokens[static_cast<size_t>(row)];
      float* to = given.as<float>() + (head * rows + row) * dv;
      read_f32(dout.at({head / problem.Hq, head % problem.Hq, t}), dout.dtype, dout.stride[3], dv, to);
      for (Index e = 0; e < dv; ++e) to[e] /= divisor[static_cast<size_t>(t)];
    }
  });
  return given;
}

// Lists are constant, so centroids get no gradient: they follow the tokens by moving averages. With shared_qk the keys'
// gradient is the queries' too, head by head, and k, which nobody reads, gets none.
void finish_gradient_routing(const Params& p, const Inputs& in, const Differentiated& done, AttendGradients& out) {
  const auto eps = static_cast<float>(p.number("ln_eps"));
  if (p.boolean("shared_qk")) {
    const Tensor& dk = done.gradients.sources[0].dk;  // [B · Hq, M, D]
    for (Index i = 0; i < out.dq.size(); ++i) out.dq.as<float>()[i] += dk.as<float>()[i];
    std::fill_n(out.dk.as<float>(), out.dk.size(), 0.0f);
  } else {
    layer_norm_rows_backward(out.dk, eps, keys_of(in));
  }
  layer_norm_rows_backward(out.dq, eps, queries_of(in));
}

}  // namespace

const Mechanism& routing_transformer() {
  static const Mechanism m{
      .name = "routing-transformer",
      .title = "Routing Transformer",
      .paper = "arXiv:2003.05997",
      .year = 2020,
      .stage = "select (clusters), attend",
      .training = Training::required,
      .idea =
          "Queries and keys, normalised, share centroids. Each centroid gathers the `cluster_size` queries and the as\n"
          "many keys that lie nearest to it, and attention runs inside the cluster. A token may be in several "
          "clusters, whose\n"
          "outputs are averaged, or in none: its output is then zero. Which tokens share a cluster depends on all "
          "of them, later\n"
          "ones included, even where attention inside is causal: values never leak back, membership does.\n"
          "Without centroids `mu` a seeded k-means of the queries and keys at hand finds some (our addition).",
      .equations = "q' = LayerNorm(q), k' = LayerNorm(k) without weights, or k' = q' (shared_qk)\n"
                   "Q_c, K_c = the cluster_size tokens of largest <q'_t, mu_c>, of largest <k'_j, mu_c>\n"
                   "o_ct = softmax over j in K_c (j <= t if causal) of scale·<q'_t, k'_j>, times v_j\n"
                   "o_t = sum over the c with t in Q_c of o_ct, divided by (their number + eps)",
      .cost = "2·N·C·D multiply-adds to choose, C·cluster_size²·(D + Dv) to attend, half of it when causal",
      .causality = Causality::either,
      .square = false,
      .params = {integer("cluster_size", 512, 1, "queries and keys that a centroid gathers, at most all"),
                 number("scale", 1, -1e300, 1e300, "factor of the scores of normalised queries and keys"),
                 number("eps", 1e-2, 0, 1e300, "added to the number of clusters that a token's outputs are divided by"),
                 number("ln_eps", 1e-6, 0, 1e300, "added to the variance when q and k are normalised"),
                 boolean("mask_self", false, "a query sees its own key only where it sees no other in the cluster"),
                 boolean("shared_qk", false, "the normalised queries are the keys; k is not read"),
                 integer("clusters", 0, 0, "without mu: centroids to find; 0: M / cluster_size, rounded up"),
                 integer("iterations", 10, 0, "without mu: rounds of k-means"),
                 integer("seed", 0, 0, "without mu: of the vectors that k-means sees and starts from")},
      .extras = {{"mu",
                  {DType::f32, DType::f16, DType::bf16},
                  {"Hk", "*", "D"},
                  false,
                  "[Hk, C, D], the centroids that the queries and keys of a KV head share"}},
      .not_on_models = "its models are trained with normalised queries and keys and with its centroids",
      .plan = plan_routing,
      // A row is a mean of several softmaxes.
      .without_lse = [](const Params&) { return true; },
      .finishes = takes_means,
      .unfinish = unfinish_routing,
      .finish_gradient = finish_gradient_routing,
      .finish = finish_routing,
      .calibrate = calibrate,
  };
  return m;
}

}  // namespace heed::mechanism
