// heed bench prefill|decode: tokens a second of a whole model, on random tokens.

#include <fmt/format.h>

#include <algorithm>
#include <deque>
#include <map>
#include <memory>

#include "cli/bench.h"
#include "cli/models.h"
#include "cli/peer.h"
#include "cli/terminal.h"
#include "heed/base/random.h"
#include "heed/base/threads.h"
#include "heed/kernel/kernels.h"

namespace heed::cli {
namespace {

struct Options {
  std::string path, dtype = "bf16", kv = "bf16", json, lengths = "512,2048";
  std::vector<std::string> mechanisms, against;
  Index chunk = 512, steps = 32;
  int repeat = 3;
};

std::vector<model::Token> random_tokens(Index n, Index vocabulary) {
  Random random(7);
  std::vector<model::Token> ids(static_cast<size_t>(n));
  for (model::Token& id : ids) id = static_cast<model::Token>(random.below(vocabulary));
  return ids;
}

// Another program on the same file and tokens. It runs beside the first mechanism at a length, run for run, and what it
// took then stands beside the others, too.
class Opponent {
 public:
  Opponent(const std::string& name, const std::string& path, Index context)
      : peer_(name, script_of(name), setup_of(name, path, context)) {}

  /// `steps` = 0: reads the first `length` ids; else generates for `steps` ids after them.
  void run(const std::vector<model::Token>& ids, Index length, Index steps, int repeat) {
    Taken& taken = by_length_[length];
    if (taken.runs++ >= repeat) return;
    taken.seconds.add(peer_.run({{"ids", ids}, {"steps", steps}}));
  }
  double best(Index length) const { return by_length_.at(length).seconds.best(); }
  const Peer& peer() const { return peer_; }

 private:
  static std::string script_of(const std::string& name) {
    return name == "llama.cpp" ? "llama_cpp_model" : "openvino_model";
  }
  static Json setup_of(const std::string& name, const std::string& path, Index context) {
    const size_t colon = name.find(':');
    return {{"threads", threads()},
            {"model", path},
            {"context", context},
            {"mode", colon == std::string::npos ? "dense" : name.substr(colon + 1)}};
  }

  struct Taken {
    int runs = 0;
    Runs seconds;
  };
  Peer peer_;
  std::map<Index, Taken> by_length_;
};

// Rows of {mechanism, length, tokens a second, where the time went}.
class Bench {
 public:
  Bench(const Options& o, bool decode) : o_(o), decode_(decode) {
    const DType dtype = dtype_named(o.dtype);
    lengths_ = whole_numbers("--length", o.lengths, 1, Index{1} << 24);
    const Index longest = *std::max_element(lengths_.begin(), lengths_.end());
    for (const std::string& name : o.against) opponents_.emplace_back(name, o.path, longest + (decode ? o.steps : 0));
    model_ = model::Model::load(o.path, dtype);
    if (decode) {
      read_ = bandwidth(threads());
    } else {
      const Peaks machine = peaks();
      peak_ = dtype == DType::bf16 && machine.bf16 > 0 ? machine.bf16 : machine.f32;
      const model::Gguf file = model::Gguf::open(o.path);
      for (const model::GgufTensor& w : file.tensors())
        if (w.name.rfind("blk.", 0) == 0 && w.shape.size() == 2) weights_ += elements(w.shape);
    }
    json_ = {{"machine", machine_name()},
             {"isa", kernels().name},
             {"threads", threads()},
             {"model", o.path},
             {"dtype", o.dtype},
             {"phase", decode ? "decode" : "prefill"},
             {"kv", o.kv}};
    if (decode) json_["read_bytes_per_s"] = read_;
    else json_["peak"] = peak_;
    if (quiet()) return;
    fmt::print("{}, {} threads, {}, KV cache in {}, {}\n", kernels().name, threads(), o.dtype, o.kv,
               model_->info().name);
    if (decode) fmt::print("memory is read at {:.1f} GB/s\n", read_ * 1e-9);
    fmt::print("\n{:<36}{:>9}{:>12}{:>12}{:>12}{:>11}{}\n", "", decode ? "context" : "tokens", "tokens/s", "ms/token",
               "attention", "linear", decode ? fmt::format("{:>13}{:>10}", "K, V GB/s", "of read") : "  % peak");
  }

  void run(const std::string& text) {
    for (Index length : lengths_) {
      const Index tail = decode_ ? o_.steps : 0;
      if (length + tail > model_->info().context)
        fail("--length = {}, expected at most {}: the context is {}", length, model_->info().context - tail,
             model_->info().context);
      model::SessionOptions options;
      options.use.call = MechanismCall::parse(text);
      options.context = length + tail, options.chunk = o_.chunk, options.kv = dtype_named(o_.kv);
      options.rewind = std::max(options.rewind, tail);
      model::Session session(*model_, options);
      const std::vector<model::Token> ids = random_tokens(length + tail, model_->info().vocabulary);
      const std::vector<model::Token> prompt(ids.begin(), ids.begin() + static_cast<std::ptrdiff_t>(length));
      double best = 1e300;
      model::SessionStats stats;
      if (decode_) session.prefill(prompt);
      for (int i = 0; i < o_.repeat; ++i) {
        session.truncate(decode_ ? length : 0);
        session.reset_stats();
        const double start = seconds_now();
        if (decode_)
          for (Index step = 0; step < tail; ++step) session.decode(ids[static_cast<size_t>(length + step)]);
        else session.prefill(prompt);
        const double seconds = seconds_now() - start;
        if (seconds < best) best = seconds, stats = session.stats();
        for (Opponent& other : opponents_) other.run(ids, length, tail, o_.repeat);
      }
      say(text, length, decode_ ? tail : length, best, stats);
    }
  }

  const Json& json() const { return json_; }

 private:
  bool quiet() const { return o_.json == "-"; }

  // The layers' matrices meet every token, the output's the last one; attention counts the pairs it attended.
  double prefill_flops(Index tokens, const model::SessionStats& s) const {
    const model::ModelInfo& m = model_->info();
    Index pairs = s.attend.pairs;
    for (bool local : m.local) {
      const Index reach = std::min(tokens, m.window);  // keys of the last query; the first ones have fewer
      if (local) pairs += m.heads * (reach * (reach + 1) / 2 + (tokens - reach) * reach);
    }
    return 2.0 * (static_cast<double>(weights_) * static_cast<double>(tokens) +
                  static_cast<double>(m.width * m.vocabulary) + 2.0 * static_cast<double>(pairs * m.head_size));
  }

  void say(const std::string& text, Index length, Index tokens, double seconds, const model::SessionStats& s) {
    const double rate = static_cast<double>(tokens) / seconds;
    const double kv_rate = static_cast<double>(s.kv_read_bytes) / s.attention_s;
    const double flops = decode_ ? 0 : prefill_flops(length, s);
    if (!quiet())
      fmt::print("{:<36}{:>9}{:>12.1f}{:>12.3f}{:>10.0f} %{:>9.0f} %{}\n", text, length, rate, 1e3 / rate,
                 100 * s.attention_s / seconds, 100 * (s.linear_s + s.output_s) / seconds,
                 decode_ ? fmt::format("{:>13.1f}{:>8.0f} %", kv_rate * 1e-9, 100 * kv_rate / read_)
                         : fmt::format("{:>8.1f}", 100 * flops / seconds / peak_));
    json_["results"].push_back({{"mechanism", text},
                                {"length", length},
                                {"tokens", tokens},
                                {"seconds", seconds},
                                {"tokens_per_s", rate},
                                {"attention_s", s.attention_s},
                                {"linear_s", s.linear_s},
                                {"output_s", s.output_s},
                                {"plan_s", s.plan_s},
                                {"kv_bytes", s.kv_bytes},
                                {"kv_read_bytes", s.kv_read_bytes}});
    if (!decode_) {
      json_["results"].back()["flops"] = flops;
      json_["results"].back()["share_of_peak"] = flops / seconds / peak_;
    }
    for (const Opponent& other : opponents_) {
      const double theirs = other.best(length), ratio = theirs / seconds;
      if (!quiet())
        fmt::print("  {:<34}{:>9}{:>12.1f}{:>12.3f}{:>10.2f} ×\n", other.peer().title(), length,
                   static_cast<double>(tokens) / theirs, 1e3 * theirs / static_cast<double>(tokens), ratio);
      json_["results"].back()["against"][other.peer().name()] = {{"version", other.peer().version()},
                                                                 {"seconds", theirs},
                                                                 {"tokens_per_s", static_cast<double>(tokens) / theirs},
                                                                 {"ratio", ratio}};
    }
  }

  const Options& o_;
  bool decode_;
  double read_ = 0;  // bytes a second, of memory
  double peak_ = 0;  // flops a second
  Index weights_ = 0;  // of the layers' matrices
  std::vector<Index> lengths_;
  std::deque<Opponent> opponents_;
  std::unique_ptr<model::Model> model_;
  Json json_;
};

void add(CLI::App& bench, Job& job, bool decode) {
  CLI::App* command = decode ? bench.add_subcommand("decode", "Tokens a second of generating after a context")
                             : bench.add_subcommand("prefill", "Tokens a second of reading a prompt");
  const auto o = std::make_shared<Options>();
  command->add_option("MODEL", o->path, "A GGUF file")->required();
  command->add_option("--mechanism", o->mechanisms, "NAME[:p=v,…], may be given several times [dense]")->take_all();
  command->add_option("--length", o->lengths, decode ? "Tokens held before" : "Tokens of the prompt")
      ->type_name("N,…")
      ->capture_default_str();
  if (decode)
    command->add_option("--steps", o->steps, "Tokens generated")
        ->check(whole_number(1, 1 << 20))
        ->capture_default_str();
  else command->add_option("--chunk", o->chunk, "Tokens per step")->check(whole_number(1))->capture_default_str();
  command->add_option("--dtype", o->dtype, "Arithmetic: bf16 or f32")
      ->check(one_of({"f32", "bf16"}))
      ->capture_default_str();
  command->add_option("--kv,--kv-type", o->kv, "Numbers of the KV cache: bf16, f32 or q8_0")
      ->check(one_of({"f32", "bf16", "q8_0"}))
      ->capture_default_str();
  command->add_option("--repeat", o->repeat, "Timed runs")->check(whole_number(1, 1000))->capture_default_str();
  if (decode) add_against(*command, o->against, {"llama.cpp", "openvino"});
  else add_against(*command, o->against, {"llama.cpp", "openvino", "openvino:trishape", "openvino:xattention"});
  command->add_option("--json", o->json, "Write the figures as JSON to this file (- for standard output)")
      ->type_name("F");
  command->callback([&job, o, decode] {
    job = [o, decode] {
      Bench bench_(*o, decode);
      for (const std::string& text : o->mechanisms.empty() ? std::vector<std::string>{"dense"} : o->mechanisms)
        bench_.run(text);
      write_json(o->json, bench_.json());
    };
  });
}

}  // namespace

void add_bench_model(CLI::App& bench, Job& job) {
  add(bench, job, false);
  add(bench, job, true);
}

}  // namespace heed::cli
