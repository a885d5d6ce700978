// heed lab as a user runs it: tables, verdicts and pages of experiments small enough to be quick.
#include <doctest/doctest.h>

#include <cmath>

#include "heed/base/file.h"
#include "support/command.h"
#include "support/folder.h"

using namespace heed;
using namespace heed::test;

namespace {

std::string lines(int count) {
  std::string text;
  for (int i = 0; i < count; ++i) text += "line " + std::to_string(i * i % 97) + " of a text.\n";
  return text;
}

std::vector<std::string> small(const std::string& top_k = "2") {
  std::vector<std::string> list;
  for (const char* setting : {"steps=20", "batch=2", "length=64", "block=16", "layers=1", "width=16", "ffn=24",
                              "heads=2", "kv_heads=1", "head_size=8", "eval_tokens=256"})
    list.insert(list.end(), {"--set", setting});
  list.insert(list.end(), {"--set", "top_k=" + top_k});
  return list;
}

std::vector<std::string> with(std::vector<std::string> arguments, const std::vector<std::string>& more) {
  arguments.insert(arguments.end(), more.begin(), more.end());
  return arguments;
}

}  // namespace

TEST_CASE("the moba experiment: three runs that learn, figures that agree with each other, a page") {
  const Folder folder;
  write_file(folder / "text", lines(600));
  const Finished f = heed_command(
      with({"lab", "moba", "--file", folder / "text", "--json", "-", "--html", folder / "p.html"}, small()));
  REQUIRE_MESSAGE(f.code == 0, f.err);
  const auto json = f.json();
  REQUIRE(json["rows"].size() == 3);
  CHECK(json["rows"][1][0] == "moba:block=16,top_k=2");
  CHECK(json["rows"][2][0] == "streaming:sink=0,window=32");
  for (const auto& [name, y] : json["charts"][0]["lines"].items()) {
    REQUIRE(y.size() == 10);
    CHECK_MESSAGE(y[9].get<double>() < y[0].get<double>() - 0.3, name);  // it learns
    double mean = 0;
    for (const auto& value : json["charts"][1]["lines"][name]) mean += value.get<double>() / 64;
    CHECK(mean == doctest::Approx(y[9].get<double>()).epsilon(1e-9));  // by position and as a whole
  }
  const auto last = [&](const char* name) { return json["charts"][0]["lines"][name][9].get<double>(); };
  const double gap = last("moba:block=16,top_k=2") - last("dense");
  CHECK(json["findings"][0]["holds"] == (std::abs(gap) <= 0.02));
  const std::string page = read_file(folder / "p.html");
  CHECK(page.find("</html>") != std::string::npos);
  CHECK(page.find("<polyline") != std::string::npos);
}

TEST_CASE("blocks that hold everything are dense attention: the runs agree") {
  const Folder folder;
  write_file(folder / "text", lines(600));
  const Finished f = heed_command(with({"lab", "moba", "--file", folder / "text", "--json", "-"}, small("4")));
  REQUIRE_MESSAGE(f.code == 0, f.err);
  const auto lines = f.json()["charts"][0]["lines"];
  CHECK(lines["moba:block=16,top_k=4"][9].get<double>() ==
        doctest::Approx(lines["dense"][9].get<double>()).epsilon(1e-4));
}

TEST_CASE("moba-continued starts from a model and measures both kinds of attention along the way") {
  const Folder folder;
  write_file(folder / "text", lines(600));
  REQUIRE(heed_command({"train",       "--file",     folder / "text",
                        "--out",       folder / "m", "--layers",
                        "1",           "--width",    "16",
                        "--ffn",       "24",         "--heads",
                        "2",           "--kv-heads", "1",
                        "--head-size", "8",          "--length",
                        "64",          "--batch",    "2",
                        "--steps",     "10",         "--eval-tokens",
                        "64"})
              .code == 0);
  const Finished f = heed_command({"lab",    "moba-continued", "--model", folder / "m/model.gguf",
                                   "--file", folder / "text",  "--json",  "-",
                                   "--set",  "steps=4",        "--set",   "length=64",
                                   "--set",  "block=16",       "--set",   "top_k=2",
                                   "--set",  "scores=2",       "--set",   "eval_tokens=256"});
  REQUIRE_MESSAGE(f.code == 0, f.err);
  const auto json = f.json();
  REQUIRE(json["rows"].size() == 3);
  CHECK(json["rows"][0][0] == "0");
  CHECK(json["rows"][2][0] == "256");
  CHECK(json["rows"][0][4] == "0 %");
}

TEST_CASE("the gate experiment: equal parameters, shares that begin even, verdicts that follow from its figures") {
  const Folder folder;
  write_file(folder / "text", lines(600));
  std::vector<std::string> arguments{"lab",    "gate", "--file", folder / "text",
                                     "--json", "-",    "--html", folder / "p.html"};
  for (const char* setting : {"steps=20", "batch=2", "length=32", "layers=2", "width=24", "ffn=48", "heads=2",
                              "kv_heads=1", "head_size=12", "lr=1e-2", "eval_tokens=256", "controls=true", "seeds=2"})
    arguments.insert(arguments.end(), {"--set", setting});
  const Finished f = heed_command(arguments);
  REQUIRE_MESSAGE(f.code == 0, f.err);
  const auto json = f.json();
  const char* names[] = {"dense",         "gate",        "gate a head", "gate on values", "gate from 1/2 up",
                         "dense, lr × 4", "gate, lr × 4"};
  REQUIRE(json["rows"].size() == 7);
  const auto cell = [&](size_t row, size_t column) { return json["rows"][row][column].get<std::string>(); };
  for (size_t i = 0; i < 7; ++i) {
    CHECK(cell(i, 0) == names[i]);
    // Within a row of each layer's feed-forward.
    CHECK(std::abs(std::stol(cell(i, 6)) - std::stol(cell(0, 6))) <= 2 * 3 * 24);
    CHECK((cell(i, 5) == "") == (i == 0 || i == 5));
  }
  CHECK(std::abs(std::stod(cell(1, 5)) - 0.5) < 0.2);  // gates begin half open
  CHECK(std::stod(cell(4, 5)) > 0.5);
  double even = 0;
  for (int t = 1; t < 32; ++t) even += 100.0 / 31 / (t + 1);
  const auto losses = json["charts"][0]["lines"], shares = json["charts"][1]["lines"];
  for (const char* name : names) {
    CAPTURE(name);
    REQUIRE(losses[name].size() == 10);
    REQUIRE(shares[name].size() == 11);
    CHECK(losses[name][9].get<double>() < losses[name][0].get<double>());
    CHECK(std::abs(shares[name][0].get<double>() - even) < 0.5 * even);  // weights that know nothing yet
  }
  CHECK(shares["dense"][0] != shares["dense"][10]);
  const double gain = losses["gate"][9].get<double>() - losses["dense"][9].get<double>();
  CHECK(json["findings"][0]["holds"] == (gain <= -0.01));
  CHECK(json["findings"].size() == 4);
  CHECK(read_file(folder / "p.html").find("</html>") != std::string::npos);
}

TEST_CASE("a run that diverges ends as a line of the gate experiment's table") {
  const Folder folder;
  write_file(folder / "text", lines(600));
  std::vector<std::string> arguments{"lab", "gate", "--file", folder / "text", "--json", "-"};
  for (const char* setting : {"steps=20", "batch=2", "length=32", "layers=1", "width=16", "ffn=24", "heads=2",
                              "kv_heads=1", "head_size=8", "eval_tokens=256", "lr_factor=1e30"})
    arguments.insert(arguments.end(), {"--set", setting});
  const Finished f = heed_command(arguments);
  REQUIRE_MESSAGE(f.code == 0, f.err);
  const auto json = f.json();
  CHECK(json["rows"][2][1] == "diverged");
  CHECK(json["rows"][3][1] == "diverged");
  CHECK(json["findings"][3]["measured"] == "diverges without, diverges with it, the worst seed");
  CHECK(json["findings"][3]["holds"] == false);
  CHECK(json["charts"][0]["lines"].size() == 2);
}

TEST_CASE("what cannot be run is said in one line") {
  const Folder folder;
  write_file(folder / "text", lines(600));
  CHECK(heed_command({"lab"}).out.find("moba-continued") != std::string::npos);
  CHECK(heed_command({"lab", "moba", "--params"}).out.find("top_k") != std::string::npos);
  CHECK_REFUSED(heed_command({"lab", "mabo"}), 2,
                "lab: no experiment mabo, expected one of gate, moba, moba-continued");
  CHECK_REFUSED(heed_command({"lab", "moba"}), 2, "lab: --file is missing, expected a text to learn from");
  CHECK_REFUSED(heed_command({"lab", "moba", "--file", folder / "text", "--set", "steps=0"}), 2,
                "lab moba: steps = 0, expected >= 1");
  CHECK_REFUSED(heed_command({"lab", "moba-continued", "--file", folder / "text"}), 2,
                "lab: --model is missing, expected a GGUF model: moba-continued trains one");
}
