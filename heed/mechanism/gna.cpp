// Generalized neighborhood attention: neighborhood attention in which `stride` queries side by side share
// one window, so that whole tiles are visible and nothing is computed in vain.
// "Generalized Neighborhood Attention: Multi-dimensional Sparse Attention at the Speed of Light", arXiv:2504.16922.

#include "heed/mechanism/neighborhood.h"
#include "heed/mechanism/registry.h"

namespace heed::mechanism {
namespace {

std::vector<ParamSpec> params() {
  std::vector<ParamSpec> all = neighborhood_params();
  all.push_back(list("stride", "1", 1, "queries that share a window, per axis; kernel_size: separate blocks"));
  return all;
}

}  // namespace

const Mechanism& gna() {
  static const Mechanism m{
      .name = "gna",
      .title = "Generalized neighborhood attention",
      .paper = "arXiv:2504.16922",
      .year = 2025,
      .stage = "layout, select (static), attend",
      .training = Training::none,
      .idea = "Neighborhood attention with a stride: the queries of a group take the window of the one in their "
              "middle. A stride\n"
              "of 1 slides (natten), one of kernel_size makes separate blocks; between them lie settings whose windows "
              "are\n"
              "made of whole tiles. Tile visits are counted beforehand, and the tiles' shapes chosen by that count.",
      .equations = "on an axis of length L (of each dilation group): left = k div 2, right = k div 2 + k mod 2 - 1\n"
                   "leader = min((i div s)·s + s div 2, L - 1);  c = clamp(leader, left, L - 1 - right);  W(i) = { c - "
                   "left … c + right }\n"
                   "causal: leader = min((i div s)·s + s - 1, L - 1);  W(i) = { max(0, leader - k + 1) … i }\n"
                   "o_i = softmax over j, in the window of i on every axis, of scale·<q_i, k_j>, times v_j",
      .cost =
          "(tile visits)·(query tile · key tile)·(D + Dv) multiply-adds; at best N·(product of kernel_size)·(D + Dv)",
      .causality = Causality::either,
      .square = true,
      .params = params(),
      .extras = neighborhood_extras(),
      .not_on_models =
          "its windows lie on grids of images or video; on text its causal form is `streaming` without sinks",
      .plan = plan_neighborhood,
      .finish_gradient = finish_neighborhood_gradient,
  };
  return m;
}

}  // namespace heed::mechanism
