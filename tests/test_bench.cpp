// heed bench: what it prints for machines, and how it deals with other programs. None of them need be installed: a
// stand-in speaks in their place.
#include <doctest/doctest.h>

#include <filesystem>
#include <fstream>

#include "support/command.h"
#include "support/folder.h"
#include "support/tiny_model.h"

using namespace heed;
using namespace heed::test;

namespace {

const std::vector<std::string> quick{"bench",       "attend", "--length", "128", "--heads", "1",
                                     "--head-size", "16",     "--repeat", "2",   "--json",  "-"};

std::vector<std::string> with(std::vector<std::string> arguments, const std::vector<std::string>& more) {
  arguments.insert(arguments.end(), more.begin(), more.end());
  return arguments;
}

// A Python that, whatever script it is given, answers as `body` says: run(request) of a class Peer.
CommandOptions stand_in(const Folder& folder, const std::string& body) {
  const std::string path = folder / "python";
  std::ofstream(path) << "#!/usr/bin/env python3\n"
                         "import os, sys\n"
                         "sys.dont_write_bytecode = True\n"
                         "sys.path.insert(0, os.path.dirname(sys.argv[-1]))\n"
                         "import peer\n"
                      << body << "peer.serve(Peer)\n";
  std::filesystem::permissions(path, std::filesystem::perms::owner_all);
  return {.environment = {"HEED_PYTHON=" + path}};
}

// Reads what it is sent, takes half a second for everything, and gives ones as outputs.
const std::string patient = "class Peer:\n"
                            "    def __init__(self, setup, channel):\n"
                            "        self.version = '9.8'\n"
                            "        self.channel, self.tensors = channel, setup.get('tensors', {})\n"
                            "        for shape in self.tensors.values():\n"
                            "            channel.read(4 * peer.math.prod(shape))\n"
                            "    def run(self, request):\n"
                            "        if 'blocks' in request:\n"
                            "            self.channel.read(peer.math.prod(request['blocks']))\n"
                            "            return {}\n"
                            "        if 'rows' in request and self.tensors:\n"
                            "            b, h, n, d = self.tensors['q']\n"
                            "            return {'o': [1.0] * (b * h * len(request['rows']) * d)}\n"
                            "        return {'seconds': 0.5}\n";

}  // namespace

TEST_CASE("bench peak measures something") {
  const Finished f = heed_command({"bench", "peak", "--threads", "1", "--json", "-"});
  REQUIRE_MESSAGE(f.code == 0, f.err);
  const auto json = f.json();
  REQUIRE(json["peaks"].size() == 1);
  CHECK(json["peaks"][0]["f32_flops"].get<double>() > 1e8);
  CHECK(json["peaks"][0]["read_bytes_per_s"].get<double>() > 1e8);
  // A byte is a quarter of a float: a product of bytes that was slower would be a loop that measures something else.
  const double int8 = json["peaks"][0]["int8_ops"].get<double>();
  CHECK((json["isa"] == "portable" ? int8 == 0 : int8 > json["peaks"][0]["f32_flops"].get<double>()));
}

TEST_CASE("bench attend: error against f64, with bf16's rounding of the inputs") {
  const Finished f = heed_command(with(quick, {"--mechanism", "dense"}));
  REQUIRE_MESSAGE(f.code == 0, f.err);
  const auto json = f.json();
  REQUIRE(json["results"].size() == 2);
  for (const char* key : {"machine", "isa", "threads", "length", "f32_peak", "read_bytes_per_s"})
    CHECK(json.contains(key));
  for (const auto& r : json["results"]) {
    for (const char* key : {"best_s", "median_s", "pack_s", "flops_per_s", "share_of_peak", "bytes"})
      CHECK(r[key].get<double>() > 0);
    CHECK(!r.contains("against"));
    const double error = r["max_relative_error"].get<double>();
    if (r["dtype"] == "f32") CHECK((error > 0 && error < 1e-5));
    else CHECK((error > 1e-4 && error < 2e-2));
  }
}

TEST_CASE("bench: a peer that is unknown, missing, without its package, or failing is one line") {
  const Folder folder;
  CHECK_REFUSED(heed_command(with(quick, {"--against", "abacus"})), 2,
                "--against: abacus, expected torch; see heed bench attend --help");
  CHECK_REFUSED(heed_command({"bench", "decode", "m.gguf", "--against", "openvino:trishape"}), 2,
                "--against: openvino:trishape, expected llama.cpp or openvino; see heed bench decode --help");
  const std::vector<std::string> torch = with(quick, {"--against", "torch"});
  const std::string python = folder / "none";
  CHECK_REFUSED(heed_command(torch, {.environment = {"HEED_PYTHON=" + python}}), 1,
                "--against torch: " + python +
                    ": No such file or directory; scripts/deps.sh peers installs it, HEED_PYTHON names another");

  const std::string opening = "class Peer:\n    version = '1'\n    def __init__(self, setup, channel):\n        ";
  struct Example {
    std::string body, line;
  };
  for (const Example& e :
       {Example{opening + "import no_such_package\n", "the package no_such_package is missing from " +
                                                          (folder / "python") + "; scripts/deps.sh peers installs it"},
        {opening + "raise ValueError('two\\nlines')\n", "ValueError: two lines"},
        {opening + "sys.exit('gone, alas')\n", "ended early with exit code 1: gone, alas"},
        {opening + "os.kill(os.getpid(), 9)\n", "ended by signal 9"}})
    CHECK_REFUSED(heed_command(torch, stand_in(folder, e.body)), 1, "--against torch: " + e.line);
}

TEST_CASE("bench attend --against torch: figures side by side, its answers held to f64") {
  const Folder folder;
  const CommandOptions peer = stand_in(folder, patient);
  // moba's blocks of 64 are whole blocks behind the query; those of 48 are not; streaming has a mask of its own.
  const Finished f = heed_command(
      with(quick, {"--against", "torch", "--dtype", "f32", "--mechanism", "dense", "--mechanism", "streaming:window=20",
                   "--mechanism", "moba:block=64,top_k=1", "--mechanism", "moba:block=48,top_k=1"}),
      peer);
  REQUIRE_MESSAGE(f.code == 0, f.err);
  const auto results = f.json()["results"];
  REQUIRE(results.size() == 4);
  CHECK(results[3]["against"]["torch"].is_null());
  for (size_t i = 0; i < 3; ++i) {
    const auto& torch = results[i]["against"]["torch"];
    CHECK(torch["version"] == "9.8");
    CHECK(torch["function"] == (i == 0 ? "scaled_dot_product_attention" : "flex_attention"));
    CHECK(torch["best_s"] == 0.5);
    CHECK(torch["ours_s"].get<double>() >= results[i]["best_s"].get<double>());
    CHECK(torch["ratio"].get<double>() == doctest::Approx(0.5 / torch["ours_s"].get<double>()));
    CHECK(torch["max_relative_error"].get<double>() > 0.1);  // ones are wrong
    CHECK(results[i]["max_relative_error"].get<double>() < 1e-5);
  }
  const Finished people = heed_command({"bench", "attend", "--length", "128", "--dtype", "f32", "--repeat", "1",
                                        "--mechanism", "dense", "--against", "torch"},
                                       peer);
  CHECK(people.out.find("  torch 9.8 scaled_dot_product_attention") != std::string::npos);
}

TEST_CASE("bench prefill, decode and linear beside a peer") {
  const Folder folder;
  const CommandOptions peer = stand_in(folder, patient);
  const std::string model = folder / "tiny.gguf";
  std::ofstream(model, std::ios::binary) << TinyModel({}).file();
  for (const char* phase : {"prefill", "decode"}) {
    const Finished f =
        heed_command({"bench", phase, model, "--length", "24,40", "--repeat", "2", "--against", "openvino", "--against",
                      "llama.cpp", "--mechanism", "dense", "--mechanism", "streaming", "--json", "-"},
                     peer);
    REQUIRE_MESSAGE(f.code == 0, f.err);
    const auto json = f.json();
    REQUIRE(json["results"].size() == 4);
    for (const auto& r : json["results"])
      for (const char* name : {"openvino", "llama.cpp"}) {
        CHECK(r["against"][name]["version"] == "9.8");
        CHECK(r["against"][name]["tokens_per_s"].get<double>() == r["tokens"].get<double>() / 0.5);
        CHECK(r["against"][name]["ratio"].get<double>() == doctest::Approx(0.5 / r["seconds"].get<double>()));
      }
    CHECK(json["results"][0].contains("share_of_peak") == (std::string(phase) == "prefill"));
  }
  const Finished f = heed_command(
      {"bench", "linear", model, "--rows", "8", "--repeat", "1", "--against", "torch", "--json", "-"}, peer);
  REQUIRE_MESSAGE(f.code == 0, f.err);
  const auto json = f.json();
  for (const auto& r : json["results"]) CHECK(r["against"]["torch"]["seconds"] == 0.5);
}

TEST_CASE("bench backward times a training step, beside torch's") {
  const std::vector<std::string> backward{"bench",
                                          "backward",
                                          "--length",
                                          "128",
                                          "--heads",
                                          "2",
                                          "--head-size",
                                          "16",
                                          "--repeat",
                                          "2",
                                          "--mechanism",
                                          "dense",
                                          "moba:block=16,top_k=2",
                                          "--json",
                                          "-"};
  const Folder folder;
  const Finished f = heed_command(with(backward, {"--against", "torch"}), stand_in(folder, patient));
  REQUIRE_MESSAGE(f.code == 0, f.err);
  const auto results = f.json()["results"];
  REQUIRE(results.size() == 2);
  for (const auto& r : results) {
    CHECK(r["both_s"].get<double>() > r["forward_s"].get<double>());
    CHECK(r["against"]["torch"]["both_s"] == 0.5);
    CHECK(r["against"]["torch"]["ratio"].get<double>() == doctest::Approx(0.5 / r["both_s"].get<double>()));
  }
  CHECK(results[0]["density"] == 1.0);
  CHECK(results[1]["density"].get<double>() < 0.5);
}
