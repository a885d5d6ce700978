// The command on small models whose numbers are known.
#include <doctest/doctest.h>

#include <signal.h>

#include <algorithm>
#include <cmath>

#include "heed/base/file.h"
#include "support/command.h"
#include "support/folder.h"
#include "support/tiny_model.h"

using namespace heed;
using namespace heed::test;

namespace {

const std::string text =
    "In the beginning God created the heaven and the earth.\nAnd the earth was without form, and void.\n";

// A folder with a model, a document and what it says about it.
struct Desk {
  explicit Desk(const TinySizes& sizes = {}) : model(sizes) {
    write_file(model_path, model.file());
    write_file(document, text);
  }
  Folder folder;
  const std::string model_path = folder / "tiny.gguf", document = folder / "text";
  TinyModel model;

  Finished run(std::vector<std::string> arguments, const CommandOptions& options = {}) const {
    arguments.insert(arguments.begin() + 1, model_path);
    return heed_command(arguments, options);
  }
};

// Every byte is a token of its own in the order of Unicode's first characters; "ab" is one, too.
std::vector<int> ids_of(const std::string& bytes) {
  std::vector<int> ids;
  for (size_t i = 0; i < bytes.size(); ++i) {
    const bool pair = bytes.compare(i, 2, "ab") == 0;
    ids.push_back(pair ? 256 : static_cast<unsigned char>(bytes[i]));
    i += pair;
  }
  return ids;
}

double mean_nll(const std::vector<std::vector<double>>& logits, const std::vector<int>& ids) {
  double sum = 0;
  for (size_t t = 0; t + 1 < ids.size(); ++t) {
    double total = 0;
    for (double x : logits[t]) total += std::exp(x);
    sum += std::log(total) - logits[t][static_cast<size_t>(ids[t + 1])];
  }
  return sum / static_cast<double>(ids.size() - 1);
}

bool one_line(const std::string& line) { return line.rfind("heed: ", 0) == 0 && line.find('\n') == line.size() - 1; }

std::vector<std::string> keys_of(const nlohmann::ordered_json& object) {
  std::vector<std::string> keys;
  for (const auto& [key, value] : object.items()) keys.push_back(key);
  return keys;
}

const TinySizes long_context{.context = 1 << 20};

}  // namespace

TEST_CASE("tokenize gives ids, from a file and from standard input") {
  const Desk desk;
  const Finished f = desk.run({"tokenize", "--file", desk.document, "--json"});
  REQUIRE_MESSAGE(f.code == 0, f.err);
  CHECK(f.json()["ids"] == ids_of(text));
  CHECK(f.json()["bos"].is_null());
  const std::string odd = "\xef\xbb\xbf"
                          "cab\r\n<|endoftext|>";
  CHECK(desk.run({"tokenize", "--file", "-", "--json"}, {.in = odd}).json()["ids"] == ids_of(odd));
  const auto special = desk.run({"tokenize", "--file", "-", "--json", "--special"}, {.in = odd}).json()["ids"];
  CHECK(special.back() == 257);
  const Finished lines = desk.run({"tokenize", "--file", "-"}, {.in = "ab\n"});
  CHECK(lines.out == "256\t\"ab\"\n10\t\"\\n\"\n");
  const Finished broken = desk.run({"tokenize", "--file", "-", "--json"}, {.in = "ab\xff"});
  CHECK(broken.code == 1);
  CHECK_MESSAGE(one_line(broken.err), broken.err);
  CHECK(broken.err.find("2") != std::string::npos);
}

TEST_CASE("inspect counts what the file holds") {
  const Desk desk;
  const auto json = desk.run({"inspect", "--json"}).json();
  CHECK(json["tensors"].size() == desk.model.tensors.size());
  CHECK(json["types"]["F32"]["tensors"] == desk.model.tensors.size());
  CHECK(json["model"]["layers"] == 2);
  CHECK(json["model"]["kv_heads"] == 2);
  CHECK(json["metadata"]["tokenizer.ggml.tokens"]["array"] == 258);
  const Finished people = desk.run({"inspect"});
  CHECK(people.code == 0);
  CHECK(people.out.find("2 layers") != std::string::npos);

  // A model that heed cannot run can still be looked at.
  GgufWriter other = desk.model.metadata({"architecture"});
  other.text("general.architecture", "abacus");
  desk.model.write_tensors(other);
  write_file(desk.folder / "abacus.gguf", other.file());
  const Finished strange = heed_command({"inspect", desk.folder / "abacus.gguf"});
  CHECK(strange.code == 0);
  CHECK(strange.out.find("cannot be run") != std::string::npos);
}

TEST_CASE("run prints the logits of the reference") {
  const Desk desk;
  const auto logits = desk.model.logits(ids_of(text)).back();
  std::vector<int> order(logits.size());
  for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<int>(i);
  std::sort(order.begin(), order.end(),
            [&](int a, int b) { return logits[static_cast<size_t>(a)] > logits[static_cast<size_t>(b)]; });

  const Finished f = desk.run({"run", "--file", desk.document, "--logits", "4", "--json", "--dtype", "f32"});
  REQUIRE_MESSAGE(f.code == 0, f.err);
  CHECK(f.json()["ids"] == ids_of(text));
  const auto top = f.json()["logits"];
  REQUIRE(top.size() == 4);
  for (size_t i = 0; i < 4; ++i) {
    CHECK(top[i][0] == order[i]);
    CHECK(top[i][1].get<double>() == doctest::Approx(logits[static_cast<size_t>(order[i])]).epsilon(1e-4));
  }
  // Document, empty line, prompt; and a document that was cut.
  const auto both = desk.run({"run", "--file", desk.document, "--prompt", "Why?", "--logits", "1", "--json"}).json();
  CHECK(both["ids"] == ids_of(text + "\nWhy?"));
  const auto cut = desk.run({"run", "--file", desk.document, "--tokens", "10", "--logits", "1", "--json"}).json();
  CHECK(cut["ids"] == ids_of(text.substr(0, 10)));
  const auto cut_both =
      desk.run({"run", "--file", desk.document, "--tokens", "10", "--prompt", "Why?", "--logits", "1", "--json"})
          .json();
  CHECK(cut_both["ids"] == ids_of(text.substr(0, 10) + "\n\nWhy?"));
}

TEST_CASE("run writes, the same for the same seed") {
  const Desk desk;
  const std::vector<std::string> greedy{"run", "--prompt", "In the", "-n", "20"};
  const Finished a = desk.run(greedy), b = desk.run(greedy);
  REQUIRE_MESSAGE(a.code == 0, a.err);
  CHECK(a.out == b.out);
  CHECK(a.err.rfind("prefill: 6 tokens", 0) == 0);
  CHECK(a.err.find("decode: ") != std::string::npos);
  // What was written is UTF-8, although the tokens are single bytes: a JSON text would not hold it otherwise.
  CHECK_NOTHROW(static_cast<void>(nlohmann::json(a.out).dump()));
  const std::vector<std::string> drawn{"run",    "--prompt", "In the",  "-n", "40",
                                       "--temp", "20",       "--top-k", "50", "--seed"};
  const auto with_seed = [&](const char* seed) {
    std::vector<std::string> arguments = drawn;
    arguments.push_back(seed);
    return desk.run(arguments).out;
  };
  CHECK(with_seed("1") == with_seed("1"));
  CHECK(with_seed("1") != with_seed("2"));
  CHECK(desk.run({"run", "--prompt", "In the", "-n", "0"}).out == "\n");
}

TEST_CASE("run refuses what it cannot do, before it loads") {
  const Desk desk(long_context);
  CHECK_REFUSED(desk.run({"run"}), 2, "run: nothing to read, expected --prompt or --file");
  CHECK_REFUSED(desk.run({"run", "--prompt", "a", "--json"}), 2, "run: --json, expected only with --logits");
  CHECK_REFUSED(desk.run({"run", "--prompt", "a", "--ctx", "2000000"}), 1,
                "--ctx = 2000000, expected at most the model's context, 1048576");
  CHECK_REFUSED(
      desk.run({"run", "--file", desk.document, "--tokens", "1000"}), 1,
      desk.document + ": holds " + std::to_string(ids_of(text).size()) + " tokens, expected at least --tokens = 1000");
  CHECK_REFUSED(desk.run({"run", "--prompt", "abc", "--ctx", "1"}), 1,
                "run: the prompt holds 2 tokens, expected at most the context, 1");
  for (const std::vector<std::string>& arguments :
       {std::vector<std::string>{"--layers", "2"}, {"--layers", "1-0"}, {"--mechanism", "moba:block=0"}}) {
    std::vector<std::string> all{"run", "--prompt", "a"};
    all.insert(all.end(), arguments.begin(), arguments.end());
    const Finished f = desk.run(all);
    CHECK_MESSAGE(f.code == 2, f.err);
    CHECK_MESSAGE(one_line(f.err), f.err);
  }
  const Finished missing = heed_command({"run", desk.folder / "missing.gguf", "--prompt", "a"});
  CHECK(missing.code == 1);
  CHECK_MESSAGE(one_line(missing.err), missing.err);
}

TEST_CASE("a job that needs more memory than there is does not start") {
  const Desk desk({.layers = 2, .context = 1 << 30});
  const Finished f = desk.run({"run", "--prompt", "a", "--ctx", "1073741824"});
  CHECK(f.code == 1);
  CHECK_MESSAGE(one_line(f.err), f.err);
  CHECK(f.err.find("GiB for 1073741824 tokens, expected at most the ") != std::string::npos);
}

TEST_CASE("compare: perplexity of the reference, the schema, a table, a page") {
  const Desk desk;
  const std::vector<std::string> base{
      "compare", "--file",      desk.document,         "--tokens", "90", "--dtype", "f32", "--mechanism",
      "dense",   "--mechanism", "moba:block=8,top_k=2"};
  std::vector<std::string> arguments = base;
  arguments.insert(arguments.end(), {"--json", "-", "--html", desk.folder / "r.html", "--chunk", "32"});
  const Finished f = desk.run(arguments);
  REQUIRE_MESSAGE(f.code == 0, f.err);
  CHECK(f.err.empty());
  const auto json = f.json();
  CHECK(keys_of(json) ==
        std::vector<std::string>{"machine", "isa", "threads", "dtype", "model", "file", "tokens", "mechanisms"});
  REQUIRE(json["mechanisms"].size() == 2);
  for (const auto& row : json["mechanisms"]) {
    CHECK(keys_of(row) == std::vector<std::string>{"name", "params", "tokens", "nll", "ppl", "prefill_s", "score_s",
                                                   "tokens_per_s", "attention_s", "linear_s", "plan_s", "density",
                                                   "peak_bytes", "tasks"});
    CHECK(keys_of(row["tasks"]) == std::vector<std::string>{"passkey", "copy"});
    CHECK(row["tokens"] == 90);
    CHECK(row["prefill_s"].get<double>() > 0);
  }
  std::vector<int> ids = ids_of(text);
  ids.resize(90);
  CHECK(json["mechanisms"][0]["nll"].get<double>() ==
        doctest::Approx(mean_nll(desk.model.logits(ids), ids)).epsilon(1e-4));
  CHECK(json["mechanisms"][0]["density"] == 1.0);
  // Own block and one past block of 8, causal: counted by hand over the 90 queries.
  double pairs = 0, dense = 0;
  for (int t = 0; t < 90; ++t) pairs += t % 8 + 1 + (t >= 8 ? 8 : 0), dense += t + 1;
  CHECK(json["mechanisms"][1]["density"].get<double>() == doctest::Approx(pairs / dense));

  const std::string page = read_file(desk.folder / "r.html");
  CHECK(page.find("moba:block=8,top_k=2") != std::string::npos);
  CHECK(page.find("data:image/png;base64,") != std::string::npos);
  CHECK(page.find("<svg") != std::string::npos);
  for (const char* outside : {"<script", "src=\"http", "href=", "@import", "url("})
    CHECK(page.find(outside) == std::string::npos);

  const Finished table = desk.run(base);
  CHECK(table.out.find("moba:block=8,top_k=2") != std::string::npos);
  CHECK(table.out.find("1.00x") != std::string::npos);
  CHECK(table.out.find('\x1b') == std::string::npos);
  CHECK(std::count(table.out.begin(), table.out.end(), '\n') == 3);
  const Finished alone = desk.run({"compare", "--file", desk.document, "--mechanism", "streaming:sink=1,window=8"});
  CHECK(alone.out.find("1.00x") == std::string::npos);
}

TEST_CASE("compare: tasks are asked of every mechanism") {
  const Desk desk({.context = 1024});
  std::string longer;
  for (int i = 0; i < 12; ++i) longer += text;
  write_file(desk.document, longer);
  const Finished f = desk.run({"compare", "--file", desk.document, "--tokens", "64", "--task", "passkey,copy",
                               "--passkey-length", "400", "--passkey-depths", "0,1", "--copy-gap", "100", "--seeds",
                               "3,4", "--mechanism", "dense", "--json", "-"});
  REQUIRE_MESSAGE(f.code == 0, f.err);
  const auto row = f.json()["mechanisms"][0];
  CHECK(row["nll"].is_null());
  REQUIRE(row["tasks"]["passkey"].size() == 4);
  CHECK(keys_of(row["tasks"]["passkey"][0]) ==
        std::vector<std::string>{"length", "depth", "seed", "key", "answer", "found"});
  CHECK(row["tasks"]["passkey"][0]["key"].get<std::string>().size() == 5);
  CHECK(row["tasks"]["passkey"][3]["depth"] == 1.0);
  CHECK(row["tasks"]["passkey"][3]["seed"] == 4);
  REQUIRE(row["tasks"]["copy"].size() == 2);
  CHECK(keys_of(row["tasks"]["copy"][0]) == std::vector<std::string>{"gap", "seed", "nll_first", "nll_second"});
}

TEST_CASE("compare refuses what it cannot do and writes nothing") {
  const Desk desk;
  const auto compare = [&](std::vector<std::string> more) {
    more.insert(more.begin(), {"compare", "--file", desk.document, "--html", desk.folder / "r.html"});
    return desk.run(more);
  };
  CHECK_REFUSED(compare({"--tokens", "513"}), 1, "--tokens = 513, expected at most the context, 512");
  CHECK(compare({"--tokens", "500"}).code == 1);
  CHECK_REFUSED(compare({"--task", "passkey", "--passkey-length", "511"}), 1,
                "--passkey-length = 511, expected at most 504: the context is 512");
  CHECK_REFUSED(compare({"--passkey-depths", "2"}), 2, "--passkey-depths: 2, expected a number 0 … 1");
  CHECK(compare({"--json", desk.folder / "no/r.json"}).code == 1);
  CHECK(compare({"--tokens", "90"}).code == 0);
  std::filesystem::remove(desk.folder / "r.html");
  const Finished limited =
      desk.run({"compare", "--file", desk.document, "--html", desk.folder / "r.html"}, {.file_limit = 4096});
  CHECK_REFUSED(limited, 1, (desk.folder / "r.html") + ": cannot be written: File too large");
  CHECK(desk.folder.names() == std::vector<std::string>{"text", "tiny.gguf"});
}

TEST_CASE("Ctrl-C ends generation cleanly") {
  const Desk desk(long_context);
  const Finished f =
      desk.run({"run", "--prompt", "In the", "-n", "1000000", "--temp", "20", "--top-k", "200", "--dtype", "f32"},
               {.interrupt_with = SIGINT, .interrupt_when = [](const std::string& out) { return out.size() > 10; }});
  CHECK(f.code == 130);
  CHECK(f.out.back() == '\n');
  CHECK(f.err.find("decode: ") != std::string::npos);
}

TEST_CASE("Ctrl-C leaves no half file") {
  const Desk desk(long_context);
  std::string longer;
  for (int i = 0; i < 3000; ++i) longer += text;
  write_file(desk.document, longer);
  const auto writing = [&](const std::string&) { return desk.folder.names().size() > 2; };
  const Finished f = desk.run({"compare", "--file", desk.document, "--tokens", "200000", "--mechanism", "dense",
                               "--json", desk.folder / "r.json"},
                              {.interrupt_with = SIGINT, .interrupt_when = writing});
  CHECK(f.code == 130);
  CHECK(f.err == "heed: interrupted\n");
  CHECK(desk.folder.names() == std::vector<std::string>{"text", "tiny.gguf"});
}
