// The command on tensors: output, exit codes, one line for every failure, nothing half written.
#include <doctest/doctest.h>

#include <signal.h>

#include <cmath>
#include <cstring>

#include "heed/base/file.h"
#include "heed/model/safetensors.h"
#include "support/command.h"
#include "support/folder.h"
#include "support/gradients.h"

using namespace heed;
using namespace heed::test;

namespace {

const std::vector<std::string> commands{"run",  "compare",  "list",    "explain", "attend",
                                        "plan", "tokenize", "inspect", "bench"};

bool one_line(const std::string& text) { return text.rfind("heed: ", 0) == 0 && text.find('\n') == text.size() - 1; }

void write_case(const std::string& path, const Case& c) {
  model::write_safetensors(path, {{"q", c.q.view()}, {"k", c.k.view()}, {"v", c.v.view()}});
}

Got read_output(const std::string& path) {
  const auto file = model::SafetensorsFile::open(path);
  Got got;
  for (const auto& [name, values] : {std::pair{"o", &got.o}, std::pair{"lse", &got.lse}}) {
    const TensorView& x = file.tensor(name);
    REQUIRE(x.dtype == DType::f32);
    const float* p = static_cast<const float*>(x.data);
    values->assign(p, p + elements(x.shape));
  }
  return got;
}

const Sizes awkward{.B = 2, .Hq = 4, .Hk = 2, .N = 77, .M = 150, .D = 24, .Dv = 40};

std::uint32_t big_endian(const std::string& bytes, size_t at) {
  std::uint32_t x = 0;
  for (size_t i = 0; i < 4; ++i) x = x << 8 | static_cast<unsigned char>(bytes[at + i]);
  return x;
}

}  // namespace

TEST_CASE("help and version") {
  const Finished bare = heed_command({}), help = heed_command({"--help"});
  CHECK(bare.code == 0);
  CHECK(bare.out == help.out);
  CHECK(bare.err.empty());
  for (const std::string& name : commands) {
    CHECK(help.out.find("\n  " + name + " ") != std::string::npos);
    const Finished f = heed_command({name, "--help"});
    CHECK(f.code == 0);
    CHECK(f.out.find("Usage: heed " + name) != std::string::npos);
    CHECK(f.out.find("--threads N") != std::string::npos);
  }
  const Finished version = heed_command({"--version"});
  CHECK(version.code == 0);
  CHECK(version.out.rfind("heed ", 0) == 0);
}

TEST_CASE("a wrong command line is one line and exit code 2") {
  CHECK_REFUSED(heed_command({"forget"}), 2, "forget: no such command or option; heed --help lists them");
  CHECK_REFUSED(heed_command({"list", "--fast"}), 2,
                "--fast: not an option or argument of heed list; heed list --help lists them");
  CHECK_REFUSED(heed_command({"list", "--threads", "0"}), 2,
                "--threads: 0, expected an integer 1 … 4096; see heed list --help");
  CHECK_REFUSED(heed_command({"attend", "a", "b", "--mechanism", "dense", "--dtype", "f64"}), 2,
                "--dtype: f64, expected f32 or bf16; see heed attend --help");
  CHECK_REFUSED(heed_command({"attend", "a", "b", "--mechanism", "moba:top_k=0"}), 2, "moba: top_k = 0, expected >= 1");
  CHECK_REFUSED(heed_command({"attend", "a", "b", "--mechanism", "moba", "--set", "top_k=0"}), 2,
                "moba: top_k = 0, expected >= 1");
  CHECK_REFUSED(heed_command({"attend", "a", "b", "--mechanism", "moba", "--set", "top_k"}), 2,
                "--set: top_k, expected parameter=value");
  for (const std::vector<std::string>& arguments : {std::vector<std::string>{"attend"},
                                                    {"attend", "a", "b"},
                                                    {"attend", "a", "b", "--mechanism", "nothing"},
                                                    {"bench"},
                                                    {"run"},
                                                    {"run", "m"},
                                                    {"compare", "m"},
                                                    {"list", "--json", "--markdown"},
                                                    {"explain", "nothing"},
                                                    {"--threads"},
                                                    {"compare", "m", "--file", "f", "--set", "a=b"},
                                                    {"compare", "m", "--file", "f", "--task", "sing"},
                                                    {"run", "m", "--prompt", "a", "--temp", "-1"},
                                                    {"run", "m", "--prompt", "a", "--top-p", "2"}}) {
    const Finished f = heed_command(arguments);
    CHECK_MESSAGE(f.code == 2, arguments.front(), ": ", f.err);
    CHECK_MESSAGE(one_line(f.err), f.err);
    CHECK(f.out.empty());
  }
}

TEST_CASE("list and explain know every mechanism") {
  const Finished json = heed_command({"list", "--json"});
  CHECK(json.code == 0);
  const auto list = json.json();
  REQUIRE(list.size() == mechanisms().size());
  const std::string table = heed_command({"list"}).out, markdown = heed_command({"list", "--markdown"}).out;
  for (size_t i = 0; i < list.size(); ++i) {
    const Mechanism& m = *mechanisms()[i];
    for (const char* key : {"name", "title", "paper", "arxiv", "year", "kind", "training", "params"})
      CHECK(list[i].contains(key));
    CHECK(list[i]["name"] == m.name);
    CHECK(list[i]["params"].size() == m.params.size());
    CHECK(table.find("\n" + m.name + " ") != std::string::npos);
    CHECK(markdown.find("| `" + m.name + "` |") != std::string::npos);
    const Finished f = heed_command({"explain", m.name});
    CHECK(f.code == 0);
    for (const ParamSpec& p : m.params) CHECK(f.out.find("  " + p.name + " ") != std::string::npos);
  }
}

TEST_CASE("attend writes what the definition says, and counts it") {
  const Folder folder;
  const Case c(awkward);
  write_case(folder / "in", c);
  struct Example {
    std::vector<std::string> arguments;
    std::string name;
    Naive want;
  };
  const Naive causal = naive_attention(c, dense_sees(c, true));
  for (const Example& e : {Example{{"--mechanism", "dense"}, "dense", naive_attention(c, dense_sees(c, false))},
                           Example{{"--mechanism", "dense", "--causal", "--scale", "0.5"},
                                   "dense",
                                   naive_attention(c, dense_sees(c, true), {.scale = 0.5})},
                           Example{{"--mechanism", "streaming:sink=2", "--set", "window=9", "--threads", "1"},
                                   "streaming",
                                   naive_attention(c, streaming_sees(c, 2, 9))}}) {
    std::vector<std::string> arguments{"attend", folder / "in", folder / "out", "--json"};
    arguments.insert(arguments.end(), e.arguments.begin(), e.arguments.end());
    const Finished f = heed_command(arguments);
    REQUIRE_MESSAGE(f.code == 0, f.err);
    CHECK(f.err.empty());
    CHECK_AGREES(read_output(folder / "out"), e.want, c);
    const auto json = f.json();
    CHECK(json["mechanism"] == e.name);
    CHECK(json["pairs"] == e.want.pairs);
    CHECK(json["flops"] == 2 * (24 + 40) * e.want.pairs);
    const Index all = e.arguments.size() == 2 ? 2 * 4 * 77 * 150 : causal.pairs;
    CHECK(json["density"].get<double>() ==
          doctest::Approx(static_cast<double>(e.want.pairs) / static_cast<double>(all)));
    for (const char* key :
         {"params", "isa", "threads", "dtype", "shapes", "tiles_planned", "tiles_visited", "panels_visited",
          "pairs_computed", "flops_computed", "plan_s", "attend_s", "scratch_bytes"})
      CHECK(json.contains(key));
    if (e.name == "streaming") {
      CHECK(json["params"]["window"] == 9);
      CHECK(json["threads"] == 1);
    }
  }
  const Finished people = heed_command({"attend", folder / "in", folder / "out", "--mechanism", "dense"});
  CHECK(people.code == 0);
  CHECK(people.out.find("100 % of the pairs") != std::string::npos);
}

TEST_CASE("attend --grad writes gradients beside the output") {
  const Folder folder;
  const Case c(awkward);
  const Sizes& s = c.size;
  const Sample dout(DType::f32, s.B, s.Hq, s.N, s.Dv, Layout::packed, 8);
  const Sample bias(DType::f32, 1, 1, s.N, s.M, Layout::packed, 9);
  const std::vector<std::string> command{"attend", folder / "in", folder / "out", "--mechanism",
                                         "dense",  "--causal",    "--grad",       "--json"};
  write_case(folder / "in", c);
  CHECK_REFUSED(heed_command(command), 1, (folder / "in") + ": tensor do is missing");
  model::write_safetensors(
      folder / "in",
      {{"q", c.q.view()}, {"k", c.k.view()}, {"v", c.v.view()}, {"do", dout.view()}, {"bias", bias.view()}});
  const Finished f = heed_command(command);
  REQUIRE_MESSAGE(f.code == 0, f.err);
  CHECK(f.json()["backward_s"].get<double>() >= 0);
  GradientOptions options;
  options.bias = &bias;
  const Gradients want = naive_gradients(c, met_keys(c, dense_sees(c, true)), dout, options);
  const auto file = model::SafetensorsFile::open(folder / "out");
  const auto compare = [&](const char* name, const std::vector<double>& x) {
    const TensorView view = file.tensor(name);
    Tensor got(DType::f32, view.shape);
    std::memcpy(got.data(), view.data, static_cast<size_t>(got.bytes()));
    CHECK_GRADIENT(name, got, x, 1e-4);
  };
  compare("o", want.o), compare("dq", want.dq), compare("dk", want.dk), compare("dv", want.dv);
  compare("dbias", want.dbias);
  CHECK(file.tensor("dk").shape == c.k.view().shape);
}

TEST_CASE("plan draws a PNG and counts pairs") {
  const Folder folder;
  const Case c(awkward);
  write_case(folder / "in", c);
  const Finished f = heed_command({"plan", folder / "in", "--mechanism", "streaming:sink=3,window=30", "--png",
                                   folder / "p.png", "--json", "--head", "3"});
  REQUIRE_MESSAGE(f.code == 0, f.err);
  CHECK(f.json()["pairs"] == naive_attention(c, streaming_sees(c, 3, 30)).pairs);
  CHECK(f.json()["dense_pairs"] == naive_attention(c, dense_sees(c, true)).pairs);
  const std::string png = read_file(folder / "p.png");
  REQUIRE(png.size() > 100);
  CHECK(png.substr(0, 8) == "\x89PNG\r\n\x1a\n");
  // 150 keys by 77 queries, each pixel a square of 5, in a frame.
  CHECK(big_endian(png, 16) == 150 * 5 + 2 * 25);
  CHECK(big_endian(png, 20) == 77 * 5 + 2 * 25);
  CHECK_REFUSED(heed_command({"plan", folder / "in", "--mechanism", "dense", "--png", folder / "q.png", "--head", "4"}),
                2, "plan: --head = 4, expected 0 … 3");
  CHECK(folder.names() == std::vector<std::string>{"in", "p.png"});
}

TEST_CASE("bad tensors are one line, exit code 1, and no output") {
  const Folder folder;
  Case c(awkward);
  const auto attend = [&](const std::string& in) {
    return heed_command({"attend", folder / in, folder / "out", "--mechanism", "dense"});
  };
  CHECK_REFUSED(attend("missing"), 1, (folder / "missing") + ": cannot be read: No such file or directory");
  write_file(folder / "text", "no tensors here, only words");
  write_file(folder / "empty", "");
  for (const char* name : {"text", "empty"}) {
    const Finished f = attend(name);
    CHECK(f.code == 1);
    CHECK_MESSAGE(one_line(f.err), f.err);
  }
  model::write_safetensors(folder / "lacking", {{"q", c.q.view()}, {"k", c.k.view()}});
  CHECK(attend("lacking").code == 1);
  model::write_safetensors(folder / "shapes", {{"q", c.q.view()}, {"k", c.q.view()}, {"v", c.v.view()}});
  CHECK_REFUSED(attend("shapes"), 1, "v: shape = [2, 2, 150, 40], expected [2, 4, 77, Dv] as k = [2, 4, 77, 24] says");
  model::write_safetensors(folder / "extra",
                           {{"q", c.q.view()}, {"k", c.k.view()}, {"v", c.v.view()}, {"extra\nline", c.v.view()}});
  const Finished extra = attend("extra");
  CHECK(extra.code == 1);
  CHECK_MESSAGE(one_line(extra.err), extra.err);
  c.q.set(1, 2, 33, 4, std::nan(""));
  write_case(folder / "nan", c);
  CHECK_REFUSED(attend("nan"), 1, "q: holds nan, expected finite values");
  CHECK(folder.names() == std::vector<std::string>{"empty", "extra", "lacking", "nan", "shapes", "text"});
}

TEST_CASE("a write that fails leaves nothing and says so") {
  const Folder folder;
  write_case(folder / "in", Case(awkward));
  const std::vector<std::string> arguments{"attend", folder / "in", folder / "out", "--mechanism", "dense"};
  const Finished limited = heed_command(arguments, {.file_limit = 4096});
  CHECK_REFUSED(limited, 1, (folder / "out") + ": cannot be written: File too large");
  CHECK(folder.names() == std::vector<std::string>{"in"});
  const Finished nowhere = heed_command({"attend", folder / "in", folder / "no/out", "--mechanism", "dense"});
  CHECK_REFUSED(nowhere, 1, (folder / "no/out") + ": cannot be written: No such file or directory");

  // An output that was there stays as it was.
  write_file(folder / "out", "before");
  CHECK(heed_command(arguments, {.file_limit = 4096}).code == 1);
  CHECK(read_file(folder / "out") == "before");
}

TEST_CASE("a closed pipe is silent") {
  const Finished f = heed_command({"list", "--json"}, {.closed_output = true});
  CHECK(f.err.empty());
  CHECK(f.signal == SIGPIPE);
}

TEST_CASE("colour only where it is wanted") {
  CHECK(heed_command({"list"}).out.find('\x1b') == std::string::npos);
  CHECK(heed_command({"list", "--color", "always"}).out.find('\x1b') != std::string::npos);
  CHECK(heed_command({"--color", "always", "list"}).out.find('\x1b') != std::string::npos);
  CHECK(heed_command({"list", "--color", "never"}).out.find('\x1b') == std::string::npos);
}

TEST_CASE("-v says what is used, HEED_ISA is checked") {
  const Finished f = heed_command({"list", "-v", "--threads", "3"}, {.environment = {"HEED_ISA=portable"}});
  CHECK(f.code == 0);
  CHECK(f.err.find("instruction set portable") != std::string::npos);
  CHECK(f.err.find("3 threads") != std::string::npos);
  const Finished unknown = heed_command({"list", "-v"}, {.environment = {"HEED_ISA=abacus"}});
  CHECK(unknown.code == 2);
  CHECK(unknown.err.rfind("heed: HEED_ISA = abacus, expected one that this machine has: ", 0) == 0);
}
