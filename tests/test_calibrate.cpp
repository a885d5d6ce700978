// What mechanisms learn from a model's attention over a text, the files it is kept in, and the command.
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>

#include "heed/base/file.h"
#include "heed/mechanism/boundary_predictor.h"
#include "heed/model/calibration.h"
#include "heed/model/safetensors.h"
#include "support/boundary_predictor.h"
#include "support/cases.h"
#include "support/command.h"
#include "support/folder.h"
#include "support/naive.h"
#include "support/tiny_session.h"

using namespace heed;
using namespace heed::model;
using namespace heed::test;

namespace {

constexpr Index length = 90;

// The dense attention weights of one layer, f64, from the queries and keys that a session shows.
struct Seen {
  Problem problem;
  std::vector<std::vector<double>> weights;  // [Hq][N·N]
};

std::map<Index, Seen> attention_of(const Model& model, const std::vector<Token>& tokens) {
  std::map<Index, Seen> layers;
  Session session(model, options(length, 512));
  session.observe_inputs([&](Index layer, const Inputs& in) {
    Seen& seen = layers[layer];
    const Problem& p = seen.problem = in.problem;
    std::vector<float> q(static_cast<size_t>(p.D)), k(q.size());
    for (Index head = 0; head < p.Hq; ++head) {
      std::vector<double>& w = seen.weights.emplace_back(static_cast<size_t>(p.N * p.N), 0.0);
      for (Index i = 0; i < p.N; ++i) {
        in.q.read(0, head, i, q.data());
        double sum = 0;
        for (Index j = 0; j <= i; ++j) {
          in.kv->read_key(head / p.group(), j, k.data());
          double s = 0;
          for (size_t f = 0; f < q.size(); ++f) s += static_cast<double>(q[f]) * static_cast<double>(k[f]);
          sum += w[static_cast<size_t>(i * p.N + j)] = std::exp(s / std::sqrt(static_cast<double>(p.D)));
        }
        for (Index j = 0; j <= i; ++j) w[static_cast<size_t>(i * p.N + j)] /= sum;
      }
    }
  });
  session.prefill(tokens);
  return layers;
}

Calibration learn(const Model& model, const std::string& call, const std::vector<Token>& tokens,
                  std::vector<Index> layers = {}) {
  MechanismUse use;
  use.call = MechanismCall::parse(call), use.layers = std::move(layers);
  return calibrate(model, use, tokens, 32, DType::f32);
}

}  // namespace

TEST_CASE("seer-attention's targets are the block maxima of the model's own attention") {
  const std::unique_ptr<Model> model = load(TinyModel(TinySizes{}).file());
  const std::vector<Token> tokens = random_tokens(length);
  const Calibration c = learn(*model, "seer-attention:block=16", tokens);
  CHECK(c.params == ParamTexts{{"block", "16"}});
  const std::map<Index, Seen> layers = attention_of(*model, tokens);
  REQUIRE(layers.size() == 2);
  REQUIRE(c.layers.size() == 2);
  const Index n = 6;
  for (const auto& [layer, seen] : layers) {
    const Tensor& targets = c.layers.at(layer).at("targets");
    REQUIRE(targets.shape() == Shape{seen.problem.Hq, n, n});
    for (Index head = 0; head < seen.problem.Hq; ++head)
      for (Index a = 0; a < n; ++a) {
        std::vector<double> largest(static_cast<size_t>(n), 0.0);
        double sum = 0;
        for (Index i = a * 16; i < std::min(length, (a + 1) * 16); ++i)
          for (Index j = 0; j <= i; ++j) {
            double& most = largest[static_cast<size_t>(j / 16)];
            most = std::max(most, seen.weights[static_cast<size_t>(head)][static_cast<size_t>(i * length + j)]);
          }
        for (const double x : largest) sum += x;
        for (Index b = 0; b < n; ++b)
          CHECK(static_cast<double>(targets.as<float>()[(head * n + a) * n + b]) ==
                doctest::Approx(largest[static_cast<size_t>(b)] / sum).epsilon(1e-4));
      }
  }
}

TEST_CASE("proxy heads are as many as it takes for the median head to be stood for") {
  TinySizes sizes;
  sizes.heads = 8, sizes.kv_heads = 4, sizes.head_size = 6;
  const std::unique_ptr<Model> model = load(TinyModel(sizes).file());
  const Calibration c = learn(*model, "proxy-attn:block=16", random_tokens(length));
  std::vector<float> medians;
  const Tensor& tried = c.layers.at(0).at("proxy_heads");
  REQUIRE(tried.size() == 3);
  for (Index i = 0; i < 3; ++i) {
    CHECK(tried.as<std::int32_t>()[i] == 1 << i);
    std::vector<float> all;
    for (const auto& [layer, named] : c.layers) {
      const Tensor& overlap = named.at("overlap");
      REQUIRE(overlap.shape() == Shape{3, 8});
      for (Index h = 0; h < 8; ++h) {
        const float x = overlap.as<float>()[i * 8 + h];
        CHECK((x >= 0 && x <= 1));
        all.push_back(x);
      }
    }
    std::sort(all.begin(), all.end());
    medians.push_back(all[all.size() / 2]);
  }
  const size_t want = medians[0] >= 0.5f ? 0 : medians[1] >= 0.5f ? 1 : 2;
  CHECK(c.params.back() == std::pair<std::string, std::string>{"proxy_heads", std::to_string(1 << want)});
  // With as many proxies as KV heads and one query head each, a proxy is the head itself.
  sizes.heads = 4, sizes.head_size = 12;
  const Calibration alone = learn(*load(TinyModel(sizes).file()), "proxy-attn:block=16", random_tokens(length));
  for (const auto& [layer, named] : alone.layers)
    for (Index h = 0; h < 4; ++h) CHECK(named.at("overlap").as<float>()[2 * 4 + h] == 1);
}

TEST_CASE("a calibration comes back from its file, and the mechanism reads it") {
  const std::unique_ptr<Model> model = load(TinyModel(TinySizes{}).file());
  const std::vector<Token> tokens = random_tokens(length);
  const Folder folder;
  const std::string path = folder / "plan.safetensors";
  // A gate for layer 1 alone, made up: [Hq, 3D, D].
  Calibration made;
  made.mechanism = "seer-attention", made.model = "llama tiny", made.params = {{"block", "16"}, {"density", "0.3"}};
  const Index heads = model->info().heads, d = model->info().head_size;
  Tensor wk(DType::f32, {heads, 3 * d, d});
  Random random(3);
  for (Index i = 0; i < wk.size(); ++i) wk.as<float>()[i] = static_cast<float>(random.normal());
  made.layers[1].emplace("wk", std::move(wk));
  made.layers[1].emplace("note", Tensor(DType::i32, {2}));  // a record that the mechanism does not read
  write_calibration(path, made);

  const auto read = std::make_shared<const Calibration>(read_calibration(path));
  CHECK(read->mechanism == made.mechanism);
  CHECK(read->model == made.model);
  CHECK(read->params == made.params);
  REQUIRE(read->layers.at(1).at("wk").shape() == Shape{heads, 3 * d, d});
  CHECK(std::memcmp(read->layers.at(1).at("wk").data(), made.layers.at(1).at("wk").data(),
                    static_cast<size_t>(made.layers.at(1).at("wk").bytes())) == 0);

  SessionOptions o = options(length, 32, "seer-attention:last_block_dense=false");
  o.use.layers = {1}, o.use.calibration = read;
  Session session(*model, o);
  Index pairs = 0;
  session.observe_plans([&](Index layer, const Plan& plan) {
    if (layer == 1)
      walk(plan, [&](const RowBlock&, const std::vector<Tile>& tiles) { pairs += static_cast<Index>(tiles.size()); });
  });
  session.prefill(tokens);
  CHECK(session.stats().attend.pairs < session.stats().dense_pairs * 7 / 10);  // the density was taken from the file
  o.use.call = MechanismCall::parse("seer-attention:last_block_dense=false,density=1");
  Session dense(*model, o);
  dense.prefill(tokens);
  CHECK(dense.stats().attend.pairs == dense.stats().dense_pairs);  // what the caller says stands over the file
  // Layer 0 has no gate.
  o.use.layers = {0};
  CHECK_THROWS_AS(Session(*model, o), Error);
  o.use.call = MechanismCall::parse("moba");
  CHECK_FAILS(Session(*model, o), UsageError,
              "--calibration: made for seer-attention, expected one for the mechanism moba");
}

TEST_CASE("tensors that all layers share reach each of them, a layer's own before them") {
  const TinySizes sizes;
  const std::unique_ptr<Model> model = load(TinyModel(sizes).file());
  const Index c = model->info().kv_heads * model->info().head_size, half = 4;
  const PredictorWeights shared(c, 8, 1), own(c, 8, 2);
  const auto put = [](NamedTensors& to, const std::string& name, const TensorView& x) {
    Tensor copy(x.dtype, x.shape);
    std::memcpy(copy.data(), x.data, static_cast<size_t>(copy.bytes()));
    to.emplace(name, std::move(copy));
  };
  Calibration made;
  made.mechanism = "dhsa", made.params = {{"threshold", "-0.5"}, {"predictor_heads", "2"}};
  for (const auto& [name, x] : shared.tensors()) put(made.all, name, x);
  put(made.all, "note", shared.tensors().at("predictor_score"));  // a record that the mechanism does not read
  put(made.layers[1], "predictor_score", own.tensors().at("predictor_score"));
  const Folder folder;
  write_calibration(folder / "all", made);
  const auto read = std::make_shared<const Calibration>(read_calibration(folder / "all"));
  CHECK(read->all.size() == 6);
  CHECK(read->layers.at(1).size() == 1);

  SessionOptions o = options(length, 32, "dhsa:budget=40,query_block=16,global=8,local=8,dense_tail=8");
  o.use.calibration = read;
  Session session(*model, o);
  Index layers = 0;
  session.observe_inputs([&](Index layer, const Inputs& in) {
    ++layers;
    CHECK(in.extra.size() == 5);
    CHECK(static_cast<const float*>(in.find("predictor_score")->data)[0] == (layer == 1 ? own : shared).score[0]);
    CHECK(mechanism::BoundaryPredictor::of(in, half, 2).has_value());
  });
  session.prefill(random_tokens(length));
  CHECK(layers == 2);
  TinySizes other = sizes;
  other.kv_heads = 4;
  CHECK_FAILS(Session(*load(TinyModel(other).file()), o), Error,
              fmt::format("predictor_qkv: shape = [3, {0}, {0}], expected [3, {1}, {1}]: [3, C, C], C = Hk·D", c,
                          4 * model->info().head_size));
}

TEST_CASE("files that are no calibration are refused in one line") {
  const Folder folder;
  const std::string path = folder / "plain.safetensors";
  const Tensor x(DType::f32, {2, 2});
  write_safetensors(path, {{"q", x.view()}});
  CHECK_FAILS(read_calibration(path), Error,
              path + ": no \"mechanism\" in its metadata, expected a file that heed calibrate wrote");
  for (const char* name : {"q", "layers.x.wk", "layers.-1.wk", "layers.1.", "layers.1", "all.", "all"}) {
    write_safetensors(path, {{name, x.view()}}, {{"mechanism", "seer-attention"}});
    CHECK_FAILS(read_calibration(path), Error,
                fmt::format("{}: tensor {}, expected names such as layers.0.NAME or all.NAME", path, name));
  }
  CHECK_THROWS_AS(learn(*load(TinyModel(TinySizes{}).file()), "moba", random_tokens(20)), UsageError);
}

TEST_CASE("heed calibrate writes what run and attend read") {
  const Folder folder;
  const std::string model = folder / "tiny.gguf", text = folder / "text", plan = folder / "plan.safetensors";
  TinySizes sizes;
  sizes.kv_heads = 4;
  write_file(model, TinyModel(sizes).file());
  write_file(text, std::string(100, 'a') + "In the beginning was the word." + std::string(60, 'b'));

  const Finished learned =
      heed_command({"calibrate", model, "--mechanism", "proxy-attn:block=16", "--file", text, "-o", plan, "--json"});
  REQUIRE_MESSAGE(learned.code == 0, learned.err);
  CHECK(learned.json()["mechanism"] == "proxy-attn");
  CHECK(learned.json()["layers"].size() == 2);
  CHECK(learned.json()["params"].contains("proxy_heads"));
  const Finished run = heed_command(
      {"run", model, "--file", text, "--mechanism", "proxy-attn:min_budget=16", "--calibration", plan, "-n", "2"});
  CHECK_MESSAGE(run.code == 0, run.err);

  const Finished other = heed_command({"run", model, "--file", text, "--mechanism", "moba", "--calibration", plan});
  CHECK(other.code == 2);
  CHECK(other.err == fmt::format("heed: --calibration: {} was made for proxy-attn, expected one for moba\n", plan));
  const Finished nothing = heed_command({"calibrate", model, "--mechanism", "dense", "--file", text, "-o", plan});
  CHECK(nothing.code == 2);
  CHECK(nothing.err.find("heed: dense learns nothing from a text, expected one of ") == 0);
  CHECK(heed_command({"calibrate", model, "--mechanism", "proxy-attn", "-o", plan}).err ==
        "heed: calibrate: --file is missing, expected a text for the model to read\n");

  // From tensors: paro's orders and masks.
  const std::string tensors = folder / "in.safetensors", masks = folder / "masks.safetensors", out = folder / "out";
  const Case c({1, 2, 2, 64, 64, 16, 16});
  write_safetensors(tensors, {{"q", c.q.view()}, {"k", c.k.view()}, {"v", c.v.view()}});
  const std::string paro = "paro:grid=4x4x4,block=8";
  const Finished from = heed_command({"calibrate", tensors, "--mechanism", paro, "-o", masks});
  REQUIRE_MESSAGE(from.code == 0, from.err);
  const Finished direct = heed_command({"attend", tensors, out, "--mechanism", paro, "--json"});
  const Finished with = heed_command({"attend", tensors, out, "--mechanism", paro, "--calibration", masks, "--json"});
  REQUIRE_MESSAGE(with.code == 0, with.err);
  CHECK(with.json()["pairs"] == direct.json()["pairs"]);
  CHECK(heed_command({"calibrate", tensors, "--mechanism", paro, "--file", text, "-o", masks}).err ==
        "heed: calibrate: --file, expected only with a model\n");
}
