// Neighborhood attention: every token of a grid attends to the tokens nearest to it on each axis.
// "Faster Neighborhood Attention: Reducing the O(n^2) Cost of Self Attention at the Threadblock Level",
// arXiv:2403.04690.

#include "heed/mechanism/neighborhood.h"
#include "heed/mechanism/registry.h"

namespace heed::mechanism {

const Mechanism& natten() {
  static const Mechanism m{
      .name = "natten",
      .title = "Neighborhood attention",
      .paper = "arXiv:2403.04690",
      .year = 2024,
      .stage = "layout, select (static), attend",
      .training = Training::continued,
      .idea =
          "Tokens stand on a grid of one to three axes. Each attends to the kernel_size nearest on every axis; at a "
          "border\n"
          "the window is shifted and keeps its size. Boxes of queries are computed together with the keys around them.",
      .equations = "on an axis of length L (of each dilation group): left = k div 2, right = k div 2 + k mod 2 - 1\n"
                   "c = clamp(i, left, L - 1 - right);  W(i) = { c - left … c + right };  causal: W(i) = { max(0, i - "
                   "k + 1) … i }\n"
                   "o_i = softmax over j, in the window of i on every axis, of scale·<q_i, k_j>, times v_j",
      .cost = "N·(product of kernel_size)·(D + Dv) multiply-adds, and those of the boxes' margins",
      .causality = Causality::either,
      .square = true,
      .params = neighborhood_params(),
      .extras = neighborhood_extras(),
      .not_on_models =
          "its windows lie on grids of images or video; on text its causal form is `streaming` without sinks",
      .plan = plan_neighborhood,
      .finish_gradient = finish_neighborhood_gradient,
  };
  return m;
}

}  // namespace heed::mechanism
