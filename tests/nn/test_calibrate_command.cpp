// heed calibrate of mechanisms that are fitted, as a user runs it: what it writes is used, Ctrl-C leaves no file, one
// line for every failure.
#include <doctest/doctest.h>

#include <signal.h>

#include <chrono>
#include <cstdio>
#include <filesystem>

#include "heed/base/file.h"
#include "support/command.h"
#include "support/folder.h"
#include "support/tiny_model.h"

using namespace heed;
using namespace heed::test;

namespace {

struct Files {
  Folder folder;
  std::string model = folder / "tiny.gguf", text = folder / "text", out = folder / "plan.safetensors";
  Files() {
    write_file(model, TinyModel(TinySizes{}).file());
    std::string words;
    for (int i = 0; i < 150; ++i) words += "line " + std::to_string(i * i) + " of a text. ";
    write_file(text, words);
  }
  std::vector<std::string> command(const std::string& mechanism, std::vector<std::string> more = {}) const {
    std::vector<std::string> list{"calibrate", model, "--mechanism", mechanism, "--file", text, "-o", out};
    list.insert(list.end(), more.begin(), more.end());
    return list;
  }
};

}  // namespace

TEST_CASE("a gate and spans are fitted, and run and compare use them") {
  const Files f;
  const Finished gate = heed_command(
      f.command("seer-attention:block=8", {"--tokens", "96", "--pieces", "4", "--steps", "20", "--skip", "50"}));
  REQUIRE_MESSAGE(gate.code == 0, gate.err);
  CHECK(gate.err.empty());
  CHECK(gate.out.find(f.out + ": seer-attention fitted to 4 pieces of 96 tokens: 2 layers, ") == 0);
  CHECK(gate.out.find("KL of the gate to the model's attention, nats a row: ") != std::string::npos);
  const Finished compared =
      heed_command({"compare", f.model, "--file", f.text, "--tokens", "200", "--mechanism", "dense", "--mechanism",
                    "seer-attention:density=0.3", "--calibration", f.out, "--json", "-"});
  REQUIRE_MESSAGE(compared.code == 0, compared.err);
  CHECK(compared.json()["mechanisms"][1]["density"].get<double>() < 0.6);

  const Finished spans = heed_command(
      f.command("moa:block=8,sink=8,min_span=8", {"--tokens", "256", "--pieces", "1", "--density", "0.5", "--json"}));
  REQUIRE_MESSAGE(spans.code == 0, spans.err);
  CHECK(spans.json()["tokens"] == 256);
  CHECK(spans.json()["layers"][1]["tensors"]["beta"] == nlohmann::json{2});
  CHECK(spans.json()["layers"][1]["after"].get<double>() > 0);
  const Finished run = heed_command(
      {"run", f.model, "--file", f.text, "--tokens", "300", "--mechanism", "moa", "--calibration", f.out, "-n", "2"});
  CHECK_MESSAGE(run.code == 0, run.err);
}

TEST_CASE("one boundary predictor is fitted for all layers, and run uses it") {
  const Files f;
  const std::string dhsa = "dhsa:budget=64,query_block=16,global=8,local=16,dense_tail=8";
  const Finished fitted = heed_command(f.command(
      dhsa, {"--tokens", "200", "--pieces", "3", "--steps", "10", "--lr", "0.002", "--skip", "50", "--json"}));
  REQUIRE_MESSAGE(fitted.code == 0, fitted.err);
  const nlohmann::json json = fitted.json();
  CHECK(json["tokens"] == 600);
  CHECK(json["all"]["predictor_qkv"] == nlohmann::json{3, 24, 24});
  CHECK(json["params"]["predictor_heads"] == "4");
  CHECK(json["measure"] == "F1 of boundaries, every gap called one before");
  REQUIRE(json["layers"].size() == 2);
  CHECK(json["layers"][1]["layer"] == 1);
  CHECK(json["layers"][1]["after"].get<double>() >= 0);
  const Finished run = heed_command({"run", f.model, "--file", f.text, "--tokens", "300", "--mechanism",
                                     "dhsa:budget=64", "--calibration", f.out, "-n", "2"});
  CHECK_MESSAGE(run.code == 0, run.err);
  const Finished told = heed_command(f.command(dhsa, {"--tokens", "100", "--pieces", "2", "--steps", "2"}));
  CHECK(told.out.find(f.out + ": dhsa fitted to 2 pieces of 100 tokens: one for all layers, ") == 0);
}

TEST_CASE("Ctrl-C leaves no file") {
  const Files f;
  CommandOptions stop;
  stop.interrupt_with = SIGINT;
  const auto begin = std::chrono::steady_clock::now();
  stop.interrupt_when = [&](const std::string&) {
    return std::chrono::steady_clock::now() - begin > std::chrono::seconds(3);
  };
  const Finished stopped = heed_command(
      f.command("seer-attention:block=8", {"--tokens", "96", "--pieces", "4", "--steps", "100000000"}), stop);
  CHECK(stopped.code == 130);
  CHECK(stopped.err == "heed: interrupted\n");
  CHECK(Folder::names_in(f.folder.path()) == std::vector<std::string>{"text", "tiny.gguf"});
}

TEST_CASE("what cannot be fitted is refused in one line") {
  const Files f;
  const auto bad = [&](const std::string& mechanism, std::vector<std::string> more, int code, const std::string& line) {
    CHECK_REFUSED(heed_command(f.command(mechanism, std::move(more))), code, line);
    CHECK(Folder::names_in(f.folder.path()) == std::vector<std::string>{"text", "tiny.gguf"});
  };
  bad("seer-attention", {"--density", "0.5"}, 2, "calibrate: --density, expected only with moa and a model");
  bad("proxy-attn", {"--pieces", "2"}, 2,
      "calibrate: --pieces, expected only with seer-attention, dhsa or moa and a model");
  bad("moa", {"--steps", "9"}, 2, "calibrate: --steps, expected only with seer-attention or dhsa and a model");
  bad("seer-attention", {"--steps", "0"}, 2, "--steps: 0, expected an integer >= 1; see heed calibrate --help");
  bad("seer-attention:oracle=true,block=8", {"--tokens", "64"}, 2,
      "seer-attention: oracle = true, expected false where a gate is fitted");
  bad("seer-attention", {"--tokens", "64", "--pieces", "1"}, 1,
      "pieces of 64 tokens, expected at least two blocks of 64");
  bad("dhsa", {"--tokens", "15"}, 1, "pieces of 15 tokens, expected at least 16: four times half_window = 4");
  const Finished few = heed_command(f.command("seer-attention", {"--tokens", "500", "--pieces", "999"}));
  CHECK(few.code == 1);
  CHECK(few.err.find(" tokens, expected at least ") != std::string::npos);
  CHECK(few.err.find(": 999 pieces of 500\n") != std::string::npos);
  CHECK_REFUSED(heed_command({"calibrate", f.model, "--mechanism", "moa", "-o", f.out}), 2,
                "calibrate: --file is missing, expected a text for the model to read");
}

TEST_CASE("a heed without libtorch says what is missing") {
  const Files f;
  const std::string alone = f.folder / "heed";  // heed-torch does not stand beside it
  std::filesystem::copy_file(HEED_COMMAND, alone);
  FILE* pipe = ::popen(
      (alone + " calibrate " + f.model + " --mechanism moa --file " + f.text + " -o " + f.out + " 2>&1").c_str(), "r");
  REQUIRE(pipe != nullptr);
  char line[512] = "";
  CHECK(std::fgets(line, sizeof line, pipe) != nullptr);
  CHECK(::pclose(pipe) == 1 << 8);
  CHECK(std::string(line) ==
        "heed: calibrate --mechanism moa: this heed was built without libtorch, expected one built with it, as make "
        "python does\n");
}
