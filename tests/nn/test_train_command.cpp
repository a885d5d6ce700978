// heed train as a user runs it: reports, files, Ctrl-C and going on, one line for every failure.
#include <doctest/doctest.h>

#include <signal.h>

#include "heed/base/file.h"
#include "support/command.h"
#include "support/folder.h"

using namespace heed;
using namespace heed::test;

namespace {

struct Text {
  Folder folder;
  Text() {
    std::string text;
    for (int i = 0; i < 800; ++i) text += "line " + std::to_string(i) + " of a text.\n";
    write_file(folder / "text", text);
    write_file(folder / "c.json",
               R"({"layers": 1, "width": 16, "ffn": 24, "heads": 2, "kv_heads": 1, "head_size": 8, "length": 32,
                   "batch": 2, "steps": 8, "eval_every": 2, "save_every": 3, "eval_tokens": 64,
                   "mechanism": "moba:block=8,top_k=2"})");
  }
  std::vector<std::string> command(const std::string& out, std::vector<std::string> more = {}) const {
    std::vector<std::string> list{"train",         "--config", folder / "c.json", "--file",
                                  folder / "text", "--out",    folder / out};
    list.insert(list.end(), more.begin(), more.end());
    return list;
  }
};

}  // namespace

TEST_CASE("a run reports, leaves a checkpoint and a model, and heed run takes that") {
  const Text text;
  const Finished f = heed_command(text.command("a"));
  CHECK(f.code == 0);
  CHECK(f.err.empty());
  CHECK(f.out.find("64 tokens a step\nstep      2   loss ") != std::string::npos);
  CHECK(f.out.find("step      8   loss ") != std::string::npos);
  CHECK(f.out.find("held out ") != std::string::npos);
  CHECK(Folder::names_in(text.folder / "a") == std::vector<std::string>{"checkpoint.safetensors", "model.gguf"});
  const Finished run = heed_command({"run", text.folder / "a/model.gguf", "--prompt", "line", "-n", "4"});
  CHECK(run.code == 0);
  CHECK_REFUSED(heed_command(text.command("a")), 1,
                text.folder / "a/checkpoint.safetensors is there already, expected --resume " + (text.folder / "a") +
                    " or another folder");
}

TEST_CASE("stopped by Ctrl-C and resumed: the same checkpoint, byte for byte") {
  const Text text;
  CHECK(heed_command(text.command("whole", {"--steps", "600", "--eval-every", "100"})).code == 0);
  CommandOptions stop;
  stop.interrupt_with = SIGINT;
  stop.interrupt_when = [](const std::string& out) { return out.find("step    100") != std::string::npos; };
  const Finished f = heed_command(text.command("parts", {"--steps", "600", "--eval-every", "100"}), stop);
  CHECK(f.code == 130);
  CHECK(f.err == "heed: interrupted\n");
  CHECK(f.out.find("stopped after step ") != std::string::npos);
  CHECK(Folder::names_in(text.folder / "parts") == std::vector<std::string>{"checkpoint.safetensors"});
  const Finished rest = heed_command({"--threads", "1", "train", "--resume", text.folder / "parts"});
  CHECK(rest.code == 0);
  CHECK(rest.out.find("step    600   loss ") != std::string::npos);
  for (const char* name : {"/checkpoint.safetensors", "/model.gguf"})
    CHECK(read_file(text.folder / "parts" + name) == read_file(text.folder / "whole" + name));
}

TEST_CASE("one JSON object a line") {
  const Text text;
  const Finished f = heed_command(text.command("a", {"--json", "--held-out", "0", "--mechanism", "dense"}));
  std::vector<nlohmann::json> lines;
  for (size_t at = 0, end; (end = f.out.find('\n', at)) != std::string::npos; at = end + 1)
    lines.push_back(nlohmann::json::parse(f.out.substr(at, end - at)));
  REQUIRE(lines.size() == 5);
  CHECK(lines[3]["step"] == 8);
  CHECK(lines[3]["loss"].get<double>() > 0);
  CHECK(lines[3]["held_out"].is_null());
  CHECK(lines[3]["tokens_per_s"].get<double>() > 0);
  CHECK(lines[4]["files"] == nlohmann::json{text.folder / "a/model.gguf"});
}

TEST_CASE("help and bad command lines") {
  const Finished help = heed_command({"train", "--help"});
  CHECK(help.code == 0);
  CHECK(help.out.find("Usage: heed train [options]") != std::string::npos);
  for (const char* flag : {"--config F", "--resume DIR", "--kv-heads N", "--weight-decay X", "--threads N"})
    CHECK(help.out.find(flag) != std::string::npos);
  const Text text;
  const auto bad = [&](std::vector<std::string> more, int code, const std::string& line) {
    CHECK_REFUSED(heed_command(text.command("a", std::move(more))), code, line);
    CHECK(Folder::names_in(text.folder.path()) == std::vector<std::string>{"c.json", "text"});
  };
  bad({"--steps", "0"}, 2, "train: steps = 0, expected >= 1");
  bad({"--lr", "fast"}, 2, "train: lr = fast, expected a number");
  bad({"--nonesuch"}, 2, "--nonesuch: not an option or argument of heed train; heed train --help lists them");
  bad({"--resume", "x"}, 2, "train: --config, expected only without --resume");
  CHECK_REFUSED(heed_command({"train", "--file", text.folder / "text"}), 2,
                "train: --out is missing, expected a folder for checkpoints and the model");
  CHECK_REFUSED(heed_command({"train", "--out", text.folder / "b", "--file", text.folder / "none"}), 1,
                text.folder / "none: cannot be read: No such file or directory");
}
