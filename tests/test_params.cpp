// Mechanism calls and parameters as text, and every refusal word for word.
#include <doctest/doctest.h>

#include <cmath>
#include <limits>

#include "support/naive.h"

using namespace heed;
using namespace heed::test;

namespace {

using Given = std::vector<std::pair<std::string, std::string>>;

std::vector<ParamSpec> specs() {
  return {integer("block", 256, 1, "tokens per block"),
          integer("sink_blocks", 1, 0, 1, "first blocks"),
          number("mass", 0.9, 0, 1, "cumulative share"),
          boolean("force_first", true, "whether block 0 is kept"),
          choice("pool", "mean", {"mean", "max"}, "how a block is summed up"),
          list("kernel_size", "3x5", 2, "kernel per axis")};
}

Params make(const Given& given) { return Params("demo", specs(), given); }

}  // namespace

TEST_CASE("a call is a name and parameters") {
  const MechanismCall plain = MechanismCall::parse("dense");
  CHECK(plain.name == "dense");
  CHECK(plain.params.empty());
  const MechanismCall call = MechanismCall::parse("moba:block=64,top_k=8,tie=higher");
  CHECK(call.name == "moba");
  CHECK(call.params == Given{{"block", "64"}, {"top_k", "8"}, {"tie", "higher"}});
  CHECK(call.text() == "moba:block=64,top_k=8,tie=higher");
  CHECK(plain.text() == "dense");
  // A comma starts a parameter only before name=.
  const MechanismCall levels = MechanismCall::parse("psa:ratios=1:.10,2:.15,4:.15,block=64");
  CHECK(levels.params == Given{{"ratios", "1:.10,2:.15,4:.15"}, {"block", "64"}});
  CHECK(MechanismCall::parse("a:x=1=2").params == Given{{"x", "1=2"}});
  CHECK(MechanismCall::parse("a:x=").params == Given{{"x", ""}});
  CHECK(MechanismCall::parse("flash-moba:top_k=2").name == "flash-moba");
}

TEST_CASE("text that is no call is refused") {
  CHECK_FAILS(MechanismCall::parse(""), UsageError, "mechanism = , expected NAME or NAME:parameter=value,…");
  CHECK_FAILS(MechanismCall::parse(":block=2"), UsageError,
              "mechanism = :block=2, expected NAME or NAME:parameter=value,…");
  CHECK_FAILS(MechanismCall::parse("moba:"), UsageError, "mechanism = moba:, expected parameter=value after the colon");
  CHECK_FAILS(MechanismCall::parse("moba:block"), UsageError,
              "mechanism = moba:block, expected parameter=value after moba:");
  CHECK_FAILS(MechanismCall::parse("moba:=3"), UsageError, "mechanism = moba:=3, expected parameter=value after moba:");
  CHECK_FAILS(MechanismCall::parse("moba:,block=3"), UsageError,
              "mechanism = moba:,block=3, expected parameter=value after moba:");
  // A comma with nothing after it belongs to the value, which the parameter then refuses.
  CHECK_THROWS_AS(Params("moba", specs(), MechanismCall::parse("moba:block=3,").params), UsageError);
  CHECK_THROWS_AS(Params("moba", specs(), MechanismCall::parse("moba:block=3,4").params), UsageError);
}

TEST_CASE("parameters have defaults and are read by kind") {
  const Params p = make({});
  CHECK(p.owner() == "demo");
  CHECK(p.integer("block") == 256);
  CHECK(p.integer("sink_blocks") == 1);
  CHECK(p.number("mass") == 0.9);
  CHECK(p.boolean("force_first"));
  CHECK(p.text("pool") == "mean");
  CHECK(p.list("kernel_size") == std::vector<Index>{3, 5});
  CHECK(!p.given("block"));
  const Params q =
      make({{"mass", "1e-3"}, {"block", "1"}, {"force_first", "false"}, {"pool", "max"}, {"kernel_size", "7"}});
  CHECK(q.integer("block") == 1);
  CHECK(q.number("mass") == 1e-3);
  CHECK(!q.boolean("force_first"));
  CHECK(q.text("pool") == "max");
  CHECK(q.list("kernel_size") == std::vector<Index>{7});
  CHECK(q.given("block"));
  CHECK(!q.given("sink_blocks"));
  // In the order of the specs.
  REQUIRE(q.values().size() == 6);
  CHECK(q.values()[0] == std::pair<std::string, std::string>{"block", "1"});
  CHECK(q.values()[1] == std::pair<std::string, std::string>{"sink_blocks", "1"});
}

TEST_CASE("values out of range or of the wrong kind are refused by name") {
  CHECK_FAILS(make({{"block", "0"}}), UsageError, "demo: block = 0, expected >= 1");
  CHECK_FAILS(make({{"block", "-7"}}), UsageError, "demo: block = -7, expected >= 1");
  for (const std::string bad : {"", "x", "1.5", "3 ", " 3", "0x10", "99999999999999999999", "1e3", "+"})
    CHECK_FAILS(make({{"block", bad}}), UsageError, "demo: block = " + bad + ", expected an integer");
  CHECK_FAILS(make({{"sink_blocks", "2"}}), UsageError, "demo: sink_blocks = 2, expected 0 … 1");
  CHECK_FAILS(make({{"mass", "1.01"}}), UsageError, "demo: mass = 1.01, expected 0 … 1");
  CHECK_FAILS(make({{"mass", "-1"}}), UsageError, "demo: mass = -1, expected 0 … 1");
  for (const std::string bad : {"", "half", "nan", "inf", "0.5x", "1e999"})
    CHECK_FAILS(make({{"mass", bad}}), UsageError, "demo: mass = " + bad + ", expected a number");
  CHECK_FAILS(make({{"force_first", "yes"}}), UsageError, "demo: force_first = yes, expected true or false");
  CHECK_FAILS(make({{"pool", "median"}}), UsageError, "demo: pool = median, expected one of mean, max");
  for (const std::string bad : {"x", "3x", "x3", "3xx5", "3,5", "1x2x3x4x5"})
    CHECK_FAILS(make({{"kernel_size", bad}}), UsageError,
                "demo: kernel_size = " + bad + ", expected a number or numbers joined by x, such as 4x6");
  CHECK_FAILS(make({{"kernel_size", "3x1"}}), UsageError, "demo: kernel_size = 3x1, expected values >= 2");
  CHECK_FAILS(
      make({{"blok", "3"}}), UsageError,
      "demo: blok = 3, expected one of the parameters block, sink_blocks, mass, force_first, pool, kernel_size");
  CHECK_FAILS(make({{"block", "3"}, {"block", "4"}}), UsageError, "demo: block = 4, expected once, was also 3");
  CHECK_FAILS(Params("bare", {}, {{"block", "3"}}), UsageError, "bare: block = 3, expected no parameters");
  ParamSpec needed = integer("window", 1, 1, "tokens of the window");
  needed.required = true;
  CHECK_FAILS(Params("demo", {needed}, {}), UsageError, "demo: window is missing, expected tokens of the window");
}

TEST_CASE("attend refuses unknown mechanisms and parameters") {
  const Case c({1, 1, 1, 4, 4, 8, 8});
  CHECK_THROWS_AS(attend("mobs", c.input()), UsageError);
  try {
    static_cast<void>(attend("mobs", c.input()));
  } catch (const UsageError& e) {
    CHECK(std::string(e.what()).find("mechanism = mobs, expected") == 0);
    CHECK(std::string(e.what()).find("moba") != std::string::npos);
    CHECK(std::string(e.what()).find('\n') == std::string::npos);
  }
  CHECK_FAILS(attend("dense:block=3", c.input()), UsageError, "dense: block = 3, expected no parameters");
  CHECK_FAILS(attend("streaming:sinks=3", c.input()), UsageError,
              "streaming: sinks = 3, expected one of the parameters sink, window");
  CHECK_FAILS(attend("streaming:window=0", c.input()), UsageError, "streaming: window = 0, expected >= 1");
  CHECK_FAILS(attend("moba:tie=middle", c.input()), UsageError, "moba: tie = middle, expected one of lower, higher");
}

TEST_CASE("attend refuses tensors that do not fit together") {
  const Case c({2, 4, 2, 6, 9, 16, 8});
  const AttendInput good = c.input(true);
  const auto with = [&](auto change) {
    AttendInput in = good;
    change(in);
    return in;
  };
  static_cast<void>(attend("dense", good));
  CHECK_FAILS(attend("dense", with([](AttendInput& in) { in.q.dtype = DType::i32; })), Error,
              "q: dtype = i32, expected f32, f16 or bf16");
  CHECK_FAILS(attend("dense", with([](AttendInput& in) { in.v.dtype = DType::u8; })), Error,
              "v: dtype = u8, expected f32, f16 or bf16");
  CHECK_FAILS(attend("dense", with([](AttendInput& in) { in.k.shape.pop_back(), in.k.stride.pop_back(); })), Error,
              "k: shape = [2, 2, 9], expected [B, Hk, M, D]");
  CHECK_THROWS_AS(attend("dense", with([](AttendInput& in) { in.k.shape[3] = 15; })), Error);
  CHECK_THROWS_AS(attend("dense", with([](AttendInput& in) { in.k.shape[0] = 1; })), Error);
  CHECK_THROWS_AS(attend("dense", with([](AttendInput& in) { in.v.shape[2] = 8; })), Error);
  CHECK_THROWS_AS(attend("dense", with([](AttendInput& in) { in.v.shape[1] = 1; })), Error);
  for (const size_t axis : {size_t{0}, size_t{1}, size_t{2}, size_t{3}}) {
    CHECK_THROWS_AS(attend("dense", with([&](AttendInput& in) { in.q.shape[axis] = 0; })), Error);
    CHECK_THROWS_AS(attend("dense", with([&](AttendInput& in) { in.k.shape[axis] = 0; })), Error);
    CHECK_THROWS_AS(attend("dense", with([&](AttendInput& in) { in.v.shape[axis] = 0; })), Error);
  }
  CHECK_FAILS(attend("dense", Case({1, 3, 2, 4, 4, 8, 8}).input()), Error,
              "q: 3 heads, expected a multiple of the 2 heads of k");
  CHECK_FAILS(attend("dense", Case({1, 1, 1, 5, 4, 8, 8}).input(true)), Error,
              "q: 5 queries, expected at most the 4 keys when causal");
  CHECK_FAILS(attend("moba", Case({1, 1, 1, 5, 4, 8, 8}).input()), Error,
              "q: 5 queries, expected at most the 4 keys when causal");
  CHECK_THROWS_AS(attend("dense", with([](AttendInput& in) { in.arithmetic = DType::f16; })), Error);
  CHECK_THROWS_AS(attend("dense", with([](AttendInput& in) { in.scale = std::numeric_limits<float>::quiet_NaN(); })),
                  Error);
}

TEST_CASE("values beyond the length are clamped: the result is dense") {
  const Case c({1, 2, 1, 70, 90, 16, 16});
  const Naive dense = naive_attention(c, dense_sees(c, true));
  for (const std::string huge : {"91", "100000", "2147483647", "2147483648", "1099511627776", "9223372036854775807"})
    for (const std::string& call : {"streaming:window=" + huge, "streaming:window=1,sink=" + huge, "moba:block=" + huge,
                                    "moba:block=16,top_k=" + huge, "moba:block=16,top_k=1,sink=" + huge,
                                    "power:block=" + huge, "power:block=16,window_blocks=" + huge}) {
      CAPTURE(call);
      CHECK_AGREES(run(call, c.input()), dense, c);
    }
}

TEST_CASE("more queries than keys are fine where nothing is causal") {
  const Case c({1, 2, 1, 40, 3, 16, 16});
  CHECK_AGREES(run("dense", c.input(false)), naive_attention(c, dense_sees(c, false)), c);
}

TEST_CASE("NaN and infinity are refused by the tensor's name") {
  const double nan = std::numeric_limits<double>::quiet_NaN(), inf = std::numeric_limits<double>::infinity();
  for (const DType element : {DType::f32, DType::bf16})
    for (const Layout layout : {Layout::packed, Layout::reversed}) {
      const Case c({1, 2, 1, 300, 300, 16, 8}, element, DType::f32, layout);
      Case bad = c;
      bad.q.set(0, 1, 299, 15, inf);
      CHECK_FAILS(attend("dense", bad.input()), Error, "q: holds inf, expected finite values");
      bad = c;
      bad.k.set(0, 0, 0, 0, -inf);
      CHECK_FAILS(attend("moba", bad.input()), Error, "k: holds -inf, expected finite values");
      bad = c;
      if (element == DType::bf16) continue;
      bad.v.set(0, 0, 150, 3, nan);
      CHECK_FAILS(attend("power", bad.input()), Error, "v: holds nan, expected finite values");
      bad = c;
      bad.q.set(0, 0, 0, 0, nan);
      CHECK_FAILS(attend("streaming", bad.input()), Error, "q: holds nan, expected finite values");
    }
}

TEST_CASE("extra tensors are checked by name, type and shape") {
  const Case c({2, 4, 2, 6, 9, 16, 8});
  std::vector<float> bias(2 * 4 * 6 * 9, 0);
  std::vector<std::int32_t> doc(18, 3);
  std::vector<std::uint8_t> mask(18, 1);
  const auto with = [&](const std::string& name, const TensorView& x) {
    AttendInput in = c.input(true);
    in.extra[name] = x;
    return in;
  };
  static_cast<void>(attend("dense", with("bias", {bias.data(), DType::f32, {2, 4, 6, 9}})));
  static_cast<void>(attend("dense", with("doc", {doc.data(), DType::i32, {2, 9}})));
  CHECK_FAILS(attend("dense", with("biases", {bias.data(), DType::f32, {2, 4, 6, 9}})), Error,
              "dense: tensor biases is not one it reads, expected bias, doc, key_mask");
  CHECK_FAILS(attend("power", with("doc", {doc.data(), DType::i32, {2, 9}})), Error,
              "power: tensor doc is not one it reads, expected no extra tensors");
  CHECK_FAILS(attend("streaming", with("bias", {bias.data(), DType::f32, {2, 4, 6, 9}})), Error,
              "streaming: tensor bias is not one it reads, expected doc, key_mask");
  CHECK_FAILS(attend("dense", with("bias", {bias.data(), DType::f32, {2, 2, 6, 9}})), Error,
              "bias: shape = [2, 2, 6, 9], expected [B|1, Hq|1, N, M]");
  CHECK_FAILS(attend("dense", with("bias", {bias.data(), DType::f32, {6, 9}})), Error,
              "bias: shape = [6, 9], expected [B|1, Hq|1, N, M]");
  CHECK_FAILS(attend("dense", with("doc", {doc.data(), DType::f32, {2, 9}})), Error, "doc: dtype = f32, expected i32");
  CHECK_FAILS(attend("dense", with("doc", {doc.data(), DType::i32, {2, 6}})), Error,
              "doc: shape = [2, 6], expected [B, M]");
  CHECK_FAILS(attend("streaming", with("key_mask", {mask.data(), DType::u8, {1, 9}})), Error,
              "key_mask: shape = [1, 9], expected [B, M]");
  doc[4] = 8;
  CHECK_FAILS(attend("moba", with("doc", {doc.data(), DType::i32, {2, 9}})), Error,
              "doc = 3 at token 5, expected each document's tokens to stand together");
  bias[100] = -std::numeric_limits<float>::infinity();
  static_cast<void>(attend("dense", with("bias", {bias.data(), DType::f32, {2, 4, 6, 9}})));
  bias[7] = std::numeric_limits<float>::infinity();
  CHECK_FAILS(attend("dense", with("bias", {bias.data(), DType::f32, {2, 4, 6, 9}})), Error,
              "bias: holds inf, expected finite values or -inf");
  bias[7] = std::numeric_limits<float>::quiet_NaN();
  CHECK_FAILS(attend("dense", with("bias", {bias.data(), DType::f32, {2, 4, 6, 9}})), Error,
              "bias: holds nan, expected finite values or -inf");
}

TEST_CASE("a mechanism's own account is complete") {
  std::vector<std::string> names;
  for (const Mechanism* m : mechanisms()) {
    CAPTURE(m->name);
    CHECK(!m->title.empty());
    CHECK(m->paper.starts_with("arXiv:"));
    CHECK(m->year >= 2017);
    CHECK(!m->stage.empty());
    CHECK(!m->idea.empty());
    CHECK(!m->equations.empty());
    CHECK(!m->cost.empty());
    CHECK((m->plan != nullptr));
    CHECK(std::find(names.begin(), names.end(), m->name) == names.end());
    names.push_back(m->name);
    // Defaults pass their own checks.
    std::vector<ParamSpec> optional;
    Given defaults;
    for (const ParamSpec& s : m->params) {
      CHECK(!s.help.empty());
      if (s.required) continue;
      optional.push_back(s);
      if (!s.fallback.empty()) defaults.emplace_back(s.name, s.fallback);
    }
    CHECK_NOTHROW(Params(m->name, optional, defaults));
  }
}
