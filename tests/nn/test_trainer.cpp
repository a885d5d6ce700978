// Training runs: they learn, stop and go on bit for bit, and every mechanism that has gradients takes part.
#include "support/doctest_with_torch.h"

#include <ATen/ops/from_blob.h>
#include <c10/core/GradMode.h>

#include <cmath>
#include <map>
#include <set>

#include "heed/base/file.h"
#include "heed/model/safetensors.h"
#include "heed/nn/gguf.h"
#include "heed/nn/trainer.h"
#include "support/folder.h"
#include "support/refusal.h"
#include "support/small_run.h"
#include "support/tiny_session.h"

using namespace heed;
using namespace heed::test;

namespace {

// Sentences of a small grammar: there is something to learn.
std::string prose(Index bytes) {
  const char* subjects[] = {"the king ", "a shepherd ", "the people ", "my brother "};
  const char* verbs[] = {"saw ", "blessed ", "followed ", "spoke unto "};
  const char* objects[] = {"the city.\n", "the flock.\n", "the mountain.\n", "the multitude.\n"};
  Random random(1);
  std::string text;
  while (static_cast<Index>(text.size()) < bytes)
    text += std::string(subjects[random.below(4)]) + verbs[random.below(4)] + objects[random.below(4)];
  return text;
}

struct Run : SmallRun {
  explicit Run(const ParamTexts& settings = {}, std::vector<std::string> mechanisms = {})
      : SmallRun(prose(20000), std::move(mechanisms), settings) {}
};

}  // namespace

TEST_CASE("a tiny model learns, with AdamW and with Muon, in f32 and in bf16") {
  for (const char* optimizer : {"adamw", "muon"})
    for (const char* dtype : {"f32", "bf16"}) {
      CAPTURE(optimizer);
      CAPTURE(dtype);
      Run run({{"steps", "50"}, {"optimizer", optimizer}, {"dtype", dtype}}, {"moba:block=16,top_k=2", "0=dense"});
      nn::Trainer trainer(run.config);
      const double before = trainer.held_out();
      CHECK(before == doctest::Approx(std::log(257.0)).epsilon(0.15));  // no token is likelier than another
      while (trainer.steps_done() < trainer.steps()) trainer.step();
      CHECK(trainer.held_out() < before - 2);
    }
}

TEST_CASE("a run that stopped goes on with the same bits") {
  for (const char* optimizer : {"adamw", "muon"}) {
    Run run({{"optimizer", optimizer}}, {"moba:block=16,top_k=2"});
    nn::Trainer whole(run.config);
    std::vector<double> losses;
    for (Index i = 0; i < 8; ++i) {
      losses.push_back(whole.step());
      if (i == 4) whole.save(run.folder / "five");
    }
    whole.save(run.folder / "whole");
    const auto rest = nn::Trainer::resume(run.folder / "five");
    CHECK(rest->steps_done() == 5);
    for (size_t i = 5; i < 8; ++i) CHECK(rest->step() == losses[i]);
    rest->save(run.folder / "rest");
    CHECK(read_file(run.folder / "rest") == read_file(run.folder / "whole"));
    CHECK(rest->held_out() == whole.held_out());
  }
}

TEST_CASE("sequences that begin with a mark: targets are the text's own, and the model file says so") {
  Run run({{"bos", "true"}, {"steps", "2"}, {"eval_tokens", "512"}}), bare;
  nn::Trainer trainer(run.config), without(bare.config);
  const auto windows = trainer.held_out_windows(), plain = without.held_out_windows();
  REQUIRE(windows.size() == plain.size());
  for (size_t i = 0; i < windows.size(); ++i) {
    CHECK(windows[i].tokens.select(1, 0).eq(256).all().item<bool>());
    CHECK(windows[i].tokens.narrow(1, 1, 63).equal(plain[i].tokens.narrow(1, 0, 63)));
    CHECK(windows[i].targets.equal(plain[i].tokens));
  }
  trainer.step();
  trainer.export_model(run.folder / "m.gguf");
  const auto loaded = model::Model::load(run.folder / "m.gguf", DType::f32);
  CHECK(loaded->tokenizer().bos() == 256);
  nn::TrainConfig further;
  further.file = run.config.file, further.from = run.folder / "m.gguf";
  further.settings = {{"length", "64"}, {"bos", "true"}};
  CHECK(refusal([&] { nn::Trainer t(further); }) == "train: bos = true, expected none: " + further.from + " says it");
  further.settings.pop_back();
  CHECK(nn::Trainer(further).held_out_windows()[0].tokens[0][0].item<Index>() == 256);
}

TEST_CASE("checkpoints that do not fit are refused") {
  Run run;
  nn::Trainer trainer(run.config);
  trainer.step(), trainer.step();
  const std::string path = run.folder / "c";
  trainer.save(path);
  const auto changed = [&](const char* name, const char* value) {
    return refusal([&] { nn::Trainer::resume(path, [&](nn::TrainConfig& c) { nn::set(c.settings, name, value); }); });
  };
  CHECK(changed("lr", "1e-3") == "accepted");
  CHECK(changed("width", "64") == path + ": width = 64, expected 32, as the run began");
  CHECK(changed("optimizer", "muon") == path + ": optimizer = muon, expected adamw, as the run began");
  CHECK(changed("steps", "1") == "train: steps = 1, expected at least the 2 that " + path + " has done");
  CHECK(changed("nonesuch", "1").starts_with("train: nonesuch = 1, expected one of the parameters steps"));

  model::write_safetensors(run.folder / "other", {});
  CHECK(refusal([&] { nn::Trainer::resume(run.folder / "other"); }) ==
        run.folder / "other: no \"format\" in its metadata, expected a checkpoint of heed train");
  const auto file = model::SafetensorsFile::open(path);
  std::vector<std::pair<std::string, TensorView>> tensors;
  for (const std::string& name : file.names())
    if (name != "optimizer.v.blk.1.ffn.up") tensors.emplace_back(name, file.tensor(name));
  model::write_safetensors(run.folder / "less", tensors, file.metadata());
  CHECK(refusal([&] { nn::Trainer::resume(run.folder / "less"); }) ==
        run.folder / "less: tensor optimizer.v.blk.1.ffn.up is missing");
}

TEST_CASE("what was trained runs in heed's engine, and can be trained further") {
  Run run({{"tied", "false"}}, {"streaming:sink=2,window=24"});
  nn::Trainer trainer(run.config);
  for (int i = 0; i < 3; ++i) trainer.step();
  const std::string path = run.folder / "model.gguf";
  CHECK(trainer.export_model(path) == std::vector<std::string>{path});
  const auto loaded = model::Model::load(path, DType::f32);
  const std::vector<model::Token> tokens = loaded->tokenizer().encode("the king saw the city.\nmy brother", false);
  model::Session session(*loaded, options(64, 64, "streaming:sink=2,window=24"));
  session.prefill_keeping_hidden(tokens);
  const std::vector<double> want = session.score_hidden();
  const std::vector<std::int64_t> wide(tokens.begin(), tokens.end());
  const at::Tensor all =
      at::from_blob(const_cast<std::int64_t*>(wide.data()), {1, static_cast<Index>(wide.size())}, at::kLong);
  const Index n = all.size(1) - 1;
  const at::Tensor got = trainer.model().losses(all.narrow(1, 0, n), all.narrow(1, 1, n));
  for (Index i = 0; i < n; ++i)
    CHECK(got[0][i].item<double>() == doctest::Approx(want[static_cast<size_t>(i)]).epsilon(1e-4));

  nn::TrainConfig further;
  further.file = run.config.file, further.from = path;
  further.settings = {{"steps", "2"}, {"length", "64"}, {"batch", "2"}};
  nn::Trainer again(further);
  CHECK(std::isfinite(again.step()));
  further.settings.emplace_back("width", "64");
  CHECK(refusal([&] { nn::Trainer t(further); }) == "train: width = 64, expected none: " + path + " says it");
}

TEST_CASE("every mechanism that a language model can be trained with takes a step") {
  // Small enough for 64 tokens; the others' defaults are.
  const std::map<std::string, std::string> small{
      {"moba", ":block=8,top_k=3"},
      {"flash-moba", ":block=8,top_k=3"},
      {"power", ":block=8,window_blocks=2"},
      {"s2", ":block=8,local_blocks=2,stride_blocks=2"},
      {"moa", ":block=8,sink=8,min_span=16"},
      {"streaming", ":sink=2,window=16"},
      {"hip", ":budget=16,query_block=8,window=16,sink=4"},
      {"psa", ":query_block=16,block=8,fold=8"},
      {"proxy-attn", ":min_budget=16,block=8,mass=0.6"},
      {"pbs-attn", ":block=8,segment=16,mass=0.4"},
      {"seer-attention", ":block=8,density=0.6"},
      {"blockrank", ":segment=20"},
      {"dhsa", ":budget=32,query_block=16,half_window=2,nms_radius=2,global=8,"
               "local=8,dense_tail=8"},
      {"combiner", ":block=16"},
      {"dma", ":budget=16"},
      {"gated-attention", ""},
      {"landmark", ":block=15"},
      {"routing-transformer", ":clusters=4,cluster_size=16"}};
  // Not for models that were trained without them.
  const std::set<std::string> made_here{"combiner", "dma", "gated-attention", "landmark", "routing-transformer"};
  Index trained = 0, refused = 0;
  for (const Mechanism* m : mechanisms()) {
    CAPTURE(m->name);
    const auto found = small.find(m->name);
    Run run({{"key_conv", "3"}}, {m->name + (found == small.end() ? "" : found->second)});
    if ((m->not_on_models.empty() || made_here.contains(m->name)) && m->causality != Causality::refused) {
      nn::Trainer trainer(run.config);
      std::vector<at::Tensor> before;
      for (const auto& [name, w] : nn::parameters_of(trainer.model())) before.push_back(w.detach().clone());
      CHECK(std::isfinite(trainer.step()));
      size_t i = 0;
      for (const auto& [name, w] : nn::parameters_of(trainer.model())) {
        CAPTURE(name);
        const bool gate = name.ends_with(".wk");  // learned by distillation, a constant for the loss
        CHECK((w - before[i++]).abs().max().item<double>() > (gate ? -1 : 0));
        CHECK(std::isfinite(w.abs().max().item<double>()));
      }
      ++trained;
    } else {
      const std::string line = refusal([&] { nn::Trainer t(run.config); });
      CHECK(line.starts_with("mechanism = " + m->name + ": "));
      CHECK(line.find(", expected one that") != std::string::npos);
      ++refused;
    }
  }
  CHECK(trained >= 18);
  CHECK(refused >= 8);
}

TEST_CASE("settings and texts that do not do are refused in one line") {
  const auto with = [](ParamTexts settings, std::vector<std::string> mechanisms = {}) {
    Run run(std::move(settings), std::move(mechanisms));
    return refusal([&] { nn::Trainer t(run.config); });
  };
  CHECK(with({{"steps", "0"}}) == "train: steps = 0, expected >= 1");
  CHECK(with({{"lr", "fast"}}) == "train: lr = fast, expected a number");
  CHECK(with({{"kv_heads", "3"}}) == "train: kv_heads = 3, expected a divisor of heads = 4");
  CHECK(with({{"head_size", "7"}}) == "train: head_size = 7, expected an even number");
  CHECK(with({{"length", "300"}}) == "train: length = 300, expected at most context = 256");
  CHECK(with({{"key_conv", "4"}}) == "train: key_conv = 4, expected 0, 3 or 5");
  CHECK(with({{"optimizer", "sgd"}}) == "train: optimizer = sgd, expected one of adamw, muon");
  CHECK(with({}, {"2=dense"}) == "layers = \"2\": no layer 2, expected 0 … 1");
  CHECK(with({}, {"moba:blocks=3"}).starts_with("moba: blocks = 3, expected one of the parameters"));
  CHECK(with({{"held_out", "0.001"}})
            .ends_with("20 tokens are held out, expected at least length + 1 = 65, or held_out = 0"));
  Run run;
  write_file(run.folder / "text", "short");
  CHECK(refusal([&] { nn::Trainer t(run.config); }) ==
        run.config.file + ": 5 tokens to train on, expected at least length + 1 = 65");
  run.config.file.clear();
  CHECK(refusal([&] { nn::Trainer t(run.config); }) == "train: file is missing, expected a text to train on");
}

TEST_CASE("configurations are read and written") {
  const nn::TrainConfig c = nn::parse_config(
      R"({"file": "a", "from": "b", "mechanism": ["dense", "1=moba:block=8"], "steps": 12, "lr": 0.25, "tied": false,
          "optimizer": "muon"})",
      "c.json");
  CHECK(c.file == "a");
  CHECK(c.from == "b");
  CHECK((c.mechanisms == std::vector<std::string>{"dense", "1=moba:block=8"}));
  const Params p = nn::settings_of(c);
  CHECK(p.integer("steps") == 12);
  CHECK(p.number("lr") == 0.25);
  CHECK(!p.boolean("tied"));
  const nn::TrainConfig again = nn::parse_config(nn::json_of(c), "again");
  CHECK((again.file == c.file && again.from == c.from && again.mechanisms == c.mechanisms));
  CHECK(again.settings == c.settings);
  CHECK(nn::parse_config(R"({"mechanism": "dense"})", "c.json").mechanisms == std::vector<std::string>{"dense"});
  CHECK(refusal([] { nn::parse_config("[]", "c.json"); }) ==
        "c.json: not a JSON object, expected one such as {\"file\": \"book.txt\"}");
  CHECK(refusal([] { nn::parse_config("{\"steps\": 1", "c.json"); }).starts_with("c.json: not a JSON object"));
  CHECK(refusal([] { nn::parse_config("{\"steps\": [1]}", "c.json"); }) ==
        "c.json: steps is array, expected a number, a boolean or text");
}

TEST_CASE("windows of a text") {
  std::vector<model::Token> tokens(100);
  for (size_t i = 0; i < tokens.size(); ++i) tokens[i] = static_cast<model::Token>(i);
  const auto check = [&](const nn::Windows& w, Index from, Index to, bool bos) {
    for (Index i = 0; i < w.tokens.size(0); ++i)
      for (Index t = 0; t < w.tokens.size(1); ++t) {
        const Index in = w.tokens[i][t].item<Index>(), out = w.targets[i][t].item<Index>();
        CHECK((bos && t == 0 ? in == 999 : in + 1 == out));
        CHECK((out >= from && out < to));
      }
  };
  const nn::TrainingText text(tokens, 0.3, 8, {}, "x"), marked(tokens, 0.3, 8, 999, "x");
  CHECK(text.trained_tokens() == 70);
  Index lowest = 99, highest = 0;
  for (Index step = 0; step < 40; ++step) {
    const nn::Windows w = text.batch(1, step, 4);
    check(w, 1, 70, false);
    check(marked.batch(1, step, 4), 0, 70, true);
    lowest = std::min(lowest, w.targets.min().item<Index>()),
    highest = std::max(highest, w.targets.max().item<Index>());
  }
  CHECK(lowest == 1);
  CHECK(highest == 69);
  CHECK(text.batch(1, 3, 4).tokens.equal(text.batch(1, 3, 4).tokens));
  CHECK(!text.batch(1, 3, 4).tokens.equal(text.batch(1, 4, 4).tokens));
  CHECK(!text.batch(1, 3, 4).tokens.equal(text.batch(2, 3, 4).tokens));

  Index scored = 0;
  std::set<Index> seen;
  for (const nn::Windows& w : text.held_out(1000, 2)) {
    check(w, 70, 100, false);
    CHECK(w.tokens.size(0) <= 2);
    for (Index i = 0; i < w.targets.numel(); ++i) seen.insert(w.targets.flatten()[i].item<Index>()), ++scored;
  }
  CHECK(scored == 24);  // three windows of 8 and their last targets fit into 30
  CHECK(seen.size() == 24);
  CHECK(text.held_out(1, 2).size() == 1);
  CHECK(nn::TrainingText(tokens, 0, 8, {}, "x").held_out(100, 1).empty());
}
