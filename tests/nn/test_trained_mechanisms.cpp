// Mechanisms that are part of a model from its first step: they learn, their own parts too, and nobody pretends that
// they run elsewhere.
#include "support/doctest_with_torch.h"

#include <ATen/ops/arange.h>
#include <ATen/ops/cosine_similarity.h>
#include <ATen/ops/randn.h>
#include <c10/core/GradMode.h>

#include <cmath>
#include <functional>

#include "heed/base/file.h"
#include "heed/nn/gguf.h"
#include "heed/nn/trainer.h"
#include "support/command.h"
#include "support/folder.h"
#include "support/refusal.h"
#include "support/small_run.h"
#include "support/tiny_model.h"

using namespace heed;
using namespace heed::test;

namespace {

// Lines of one letter and its number: within a line the next byte follows from the line's first ones.
std::string lines(Index bytes) {
  Random random(2);
  std::string text;
  while (static_cast<Index>(text.size()) < bytes) {
    const Index kind = random.below(8);
    for (Index i = 0; i < 12; ++i) text += static_cast<char>('a' + (kind * 3 + i * (kind + 1)) % 26);
    text += '\n';
  }
  return text;
}

// 50 steps unless the settings say otherwise.
struct Run : SmallRun {
  explicit Run(const std::string& mechanism, ParamTexts settings = {})
      : SmallRun(lines(20000), {mechanism}, with_steps(std::move(settings))) {}

 private:
  static ParamTexts with_steps(ParamTexts settings) {
    settings.insert(settings.begin(), {"steps", "50"});
    return settings;
  }
};

struct Trained {
  std::string call;
  std::vector<std::string> parts;  // learned by gradient, names ending so
};
const std::vector<Trained>& trained() {
  static const std::vector<Trained> all{{"gated-attention", {"attn.gate"}},
                                        {"gated-attention:position=g2", {"attn.gate"}},
                                        {"gated-attention:position=g3,activation=ns-sigmoid", {"attn.gate"}},
                                        {"gated-attention:position=g4", {"attn.gate"}},
                                        {"gated-attention:mode=additive,activation=silu", {"attn.gate"}},
                                        {"dma:budget=24", {"attn.w_dt", "attn.a"}},
                                        {"dma:budget=24,gate=linear,keep_self=true", {"attn.w_dt", "attn.a"}},
                                        {"combiner:block=16", {}},
                                        {"combiner:variant=logsparse", {}},
                                        {"combiner:variant=mixture,block=16", {}},
                                        {"routing-transformer:clusters=4,cluster_size=24", {}},
                                        {"routing-transformer:clusters=4,cluster_size=24,shared_qk=true", {}},
                                        {"landmark:block=15", {"landmark"}}};
  return all;
}

double length(const at::Tensor& x) { return x.norm().item<double>(); }

}  // namespace

TEST_CASE("a tiny model with each of them learns, and so do their own parts") {
  for (const Trained& t : trained())
    for (const std::string gate : {"elementwise", "headwise"}) {
      const bool gated = t.call.starts_with("gated-attention");
      if (!gated && gate == "headwise") continue;
      CAPTURE(t.call);
      CAPTURE(gate);
      Run run(t.call, {{"gate", gate}});
      nn::Trainer trainer(run.config);
      const double before = trainer.held_out();
      CHECK(before == doctest::Approx(std::log(257.0)).epsilon(0.15));
      while (trainer.steps_done() < trainer.steps()) trainer.step();
      CHECK(trainer.held_out() < before - 2.5);
      // One more batch by hand: gradients of what was learned.
      const at::Tensor tokens = at::arange(65).remainder(26).add(97).view({1, 65});
      trainer.model().losses(tokens.narrow(1, 0, 64), tokens.narrow(1, 1, 64)).mean().backward();
      size_t found = 0;
      for (const auto& [name, w] : nn::parameters_of(trainer.model()))
        for (const std::string& part : t.parts)
          if (name == part || name.ends_with("." + part)) {
            CAPTURE(name);
            REQUIRE(w.grad().defined());
            CHECK(std::isfinite(length(w.grad())));
            CHECK(length(w.grad()) > 0);
            ++found;
          }
      CHECK(found == (t.call.starts_with("landmark") ? 1 : 2 * t.parts.size()));
    }
}

TEST_CASE("gradients of the parts are central differences of the model's loss along themselves") {
  for (const auto& [call, part] : std::vector<std::pair<std::string, std::string>>{
           {"gated-attention", "blk.0.attn.gate"},
           {"gated-attention:position=g2", "blk.1.attn.gate"},
           {"dma:budget=999", "blk.0.attn.w_dt"},  // all keys kept: selection is constant
           {"dma:budget=999,gate=linear", "blk.1.attn.a"},
           {"combiner:block=13", "blk.0.attn.q"},
           {"routing-transformer:clusters=2,cluster_size=99", "blk.0.attn.q"},
           {"landmark:block=6", "landmark"}}) {
    CAPTURE(call);
    CAPTURE(part);
    Run run(call, {{"length", "39"}});
    nn::Trainer trainer(run.config);
    for (int i = 0; i < 3; ++i) trainer.step();
    nn::LanguageModel& model = trainer.model();
    const at::Tensor tokens = at::arange(80).mul(7).remainder(26).add(97).view({2, 40});
    const auto loss = [&] {
      return model.losses(tokens.narrow(1, 0, 39), tokens.narrow(1, 1, 39)).to(at::kDouble).mean();
    };
    loss().backward();
    for (const auto& [name, w] : nn::parameters_of(model)) {
      if (name != part) continue;
      const c10::NoGradGuard frozen;
      const at::Tensor kept = w.clone(), way = w.grad() / w.grad().norm();
      const double step = 2e-3 * std::max(length(kept), 0.1);
      w.copy_(kept + step * way);
      const double more = loss().item<double>();
      w.copy_(kept - step * way);
      const double less = loss().item<double>();
      w.copy_(kept);
      CHECK((more - less) / (2 * step) == doctest::Approx(length(w.grad())).epsilon(0.02));
    }
  }
}

TEST_CASE("landmarks stand between the tokens of all layers, and blocks longer than the text have none") {
  Run run("landmark:block=6");
  nn::Trainer marked(run.config);
  const at::Tensor tokens = at::arange(40).mul(5).remainder(26).add(97).view({1, 40});
  const c10::NoGradGuard frozen;
  const at::Tensor before = marked.model().logits(tokens);
  CHECK((before.sizes() == at::IntArrayRef({1, 40, 257})));
  for (const auto& [name, w] : nn::parameters_of(marked.model()))
    if (name == "landmark") w.add_(at::arange(32).sub(16).mul(0.1));
  const at::Tensor after = marked.model().logits(tokens);
  CHECK(before.narrow(1, 0, 6).equal(after.narrow(1, 0, 6)));  // the first landmark stands after token 5
  CHECK(!before.narrow(1, 6, 1).equal(after.narrow(1, 6, 1)));
  // Nothing depends on later tokens.
  at::Tensor other = tokens.clone();
  other.narrow(1, 23, 17).fill_(98);
  CHECK(marked.model().logits(other).narrow(1, 0, 23).equal(after.narrow(1, 0, 23)));

  Run wide("landmark:block=64"), plain("dense");
  nn::Trainer a(wide.config), b(plain.config);
  const auto from = a.model().named_parameters();
  for (const auto& [name, w] : nn::parameters_of(b.model())) w.copy_(from[name]);
  CHECK((a.model().logits(tokens) - b.model().logits(tokens)).abs().max().item<double>() < 1e-5);
  CHECK(refusal([] {
          Run two("landmark:block=6");
          two.config.mechanisms.push_back("1=landmark:block=7");
          nn::Trainer t(two.config);
        }) == "landmark: block = 7, expected 6 in all layers, as they share their landmarks");
}

TEST_CASE("centroids find planted clusters, and the commitment falls") {
  const Index clusters = 5, d = 16;
  Random random(4);
  const auto normal = [&](Index rows, double deviation) {
    at::Tensor x = at::empty({rows, d}, at::kFloat);
    for (Index i = 0; i < x.numel(); ++i) x.data_ptr<float>()[i] = static_cast<float>(deviation * random.normal());
    return x;
  };
  const at::Tensor means = normal(clusters, 1);
  nn::CentroidOptions options{.kv_heads = 1, .clusters = clusters, .head_size = d, .decay = 0.98, .commitment = 1};
  // Begun near tokens of each bump, as no bump may be left without a centroid.
  const at::Tensor mean = (means + normal(clusters, 0.7)).view({1, clusters, d}), sum = at::empty_like(mean),
                   count = at::empty({1, clusters}, at::kFloat);
  const nn::Centroids centroids(options, mean, sum, count);
  centroids.initialise();
  double first = 0, last = 0;
  for (int step = 0; step < 500; ++step) {
    const auto tokens = [&](Index n) {
      at::Tensor x = normal(n, 0.3);
      for (Index t = 0; t < n; ++t) x[t] += means[random.below(clusters)];
      return x;
    };
    const at::Tensor q = tokens(80).view({1, 2, 40, d}), k = tokens(40).view({1, 1, 40, d});
    last = centroids.follow(q, k).item<double>();
    if (step == 0) first = last;
  }
  CHECK(last < 0.6 * first);
  const at::Tensor centred = means - means.mean(1, true);
  for (Index c = 0; c < clusters; ++c)
    CHECK(at::cosine_similarity(centroids.now()[0], centred[c].unsqueeze(0)).max().item<double>() > 0.95);
  // Not while gradients are off: scoring leaves them as they are.
  const at::Tensor before = centroids.now();
  const c10::NoGradGuard frozen;
  centroids.follow(normal(40, 1).view({1, 1, 40, d}), normal(40, 1).view({1, 1, 40, d}));
  CHECK(before.equal(centroids.now()));
}

TEST_CASE("the commitment draws queries and keys, not centroids") {
  const at::Tensor mean = at::randn({1, 3, 8}), sum = at::empty_like(mean), count = at::empty({1, 3});
  const nn::Centroids centroids({.kv_heads = 1, .clusters = 3, .head_size = 8, .commitment = 2}, mean, sum, count);
  centroids.initialise();
  const at::Tensor q = at::randn({1, 2, 5, 8}).requires_grad_(), k = at::randn({1, 1, 4, 8}).requires_grad_();
  const at::Tensor m = centroids.now()[0].to(at::kDouble);
  const auto naive = [&](const at::Tensor& x) {
    double total = 0;
    const at::Tensor rows = x.detach().to(at::kDouble).reshape({-1, 8});
    for (Index t = 0; t < rows.size(0); ++t) {
      const at::Tensor centred = rows[t] - rows[t].mean(), unit = centred / (centred.square().mean() + 1e-6).sqrt();
      const Index nearest = at::matmul(m, unit).argmax().item<Index>();
      total += (unit - m[nearest]).square().sum().item<double>();
    }
    return total / static_cast<double>(rows.numel());
  };
  const double want = 2 * (naive(q) + naive(k));
  const at::Tensor loss = centroids.follow(q, k);
  CHECK(loss.item<double>() == doctest::Approx(want).epsilon(1e-5));
  loss.backward();
  CHECK(length(q.grad()) > 0);
  CHECK(length(k.grad()) > 0);
  CHECK(!mean.grad().defined());
}

TEST_CASE("a run that stopped goes on with the same bits, learned parts included") {
  for (const char* call :
       {"gated-attention", "dma:budget=24", "landmark:block=15", "routing-transformer:clusters=4,cluster_size=24"}) {
    CAPTURE(call);
    Run run(call, {{"steps", "6"}});
    nn::Trainer whole(run.config);
    std::vector<double> losses;
    for (Index i = 0; i < 6; ++i) {
      losses.push_back(whole.step());
      if (i == 2) whole.save(run.folder / "three");
      if (i == 4) whole.held_out();  // which moves nothing
    }
    const auto rest = nn::Trainer::resume(run.folder / "three");
    for (size_t i = 3; i < 6; ++i) CHECK(rest->step() == losses[i]);
    whole.save(run.folder / "whole"), rest->save(run.folder / "rest");
    CHECK(read_file(run.folder / "rest") == read_file(run.folder / "whole"));
  }
}

TEST_CASE("no GGUF file pretends to be such a model, and no gate is added to one") {
  for (const char* call : {"gated-attention", "1=dma:budget=24", "combiner:block=16", "landmark:block=15",
                           "0=routing-transformer:clusters=4,cluster_size=24"}) {
    Run run(call, {{"steps", "1"}});
    nn::Trainer trainer(run.config);
    const std::string name = std::string(call).find('=') == 1 ? std::string(call).substr(2) : call;
    CHECK(refusal([&] { trainer.export_model(run.folder / "m.gguf"); }) ==
          run.folder / "m.gguf: layers with " + name.substr(0, name.find(':')) +
              " run only where they are trained, expected mechanisms that heed run takes");
    CHECK(Folder::names_in(run.folder.path()) == std::vector<std::string>{"text"});
  }
  const Folder folder;
  const std::string tiny = TinyModel(TinySizes{}).file();
  write_file(folder / "tiny.gguf", tiny);
  write_file(folder / "text", lines(4000));
  nn::TrainConfig from;
  from.file = folder / "text", from.from = folder / "tiny.gguf", from.mechanisms = {"1=gated-attention"};
  from.settings = {{"length", "32"}};
  CHECK(refusal([&] { nn::Trainer t(from); }) ==
        "mechanism = gated-attention: " + (folder / "tiny.gguf") +
            " holds no gates, expected a new model: a gate must be there from the start");
}

TEST_CASE("heed train says that there is no model.gguf and keeps the checkpoint") {
  Run run("gated-attention", {{"steps", "2"}, {"held_out", "0"}});
  std::vector<std::string> command{"--threads",
                                   "1",
                                   "train",
                                   "--out",
                                   run.folder / "out",
                                   "--file",
                                   run.config.file,
                                   "--mechanism",
                                   "gated-attention:position=g1",
                                   "--gate",
                                   "headwise"};
  for (const auto& [name, value] : run.config.settings) {
    std::string flag = "--" + name;
    for (char& c : flag) c = c == '_' ? '-' : c;
    command.push_back(flag), command.push_back(value);
  }
  const Finished f = heed_command(command);
  CHECK(f.code == 0);
  CHECK(f.out.find("no model.gguf: layers with gated-attention run only where they are trained\n") !=
        std::string::npos);
  CHECK(Folder::names_in(run.folder / "out") == std::vector<std::string>{"checkpoint.safetensors"});
}
