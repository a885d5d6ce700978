// Language models from GGUF files: sessions, sampling, comparisons. The loops that use them are in heed/model.py.
#include "heed/model/calibration.h"
#include "heed/model/chat.h"
#include "heed/model/compare.h"
#include "heed/model/sampler.h"
#include "python/bindings/bindings.h"

namespace heed::python {
namespace {

using model::Model;
using model::Session;
using model::Token;

// Work without the interpreter's lock that Ctrl-C can end.
template <class Work>
auto interruptible(Work work) {
  bool signalled = false;
  const model::Progress progress = [&](Index, Index) {
    const nb::gil_scoped_acquire held;
    signalled = PyErr_CheckSignals() != 0;
    return !signalled;
  };
  try {
    const nb::gil_scoped_release released;
    return work(progress);
  } catch (const model::Interrupted&) {
    if (signalled) throw nb::python_error();
    throw;
  }
}

struct UseOptions {
  std::string mechanism, layers, phase;
  std::optional<std::string> calibration;
};

model::MechanismUse use_of(const Model& m, const UseOptions& options) {
  model::MechanismUse use;
  use.call = MechanismCall::parse(options.mechanism);
  if (!options.layers.empty()) use.layers = model::parse_layers(options.layers, m.info());
  if (options.phase == "prefill") use.phase = model::Phase::prefill;
  else if (options.phase == "decode") use.phase = model::Phase::decode;
  else if (options.phase != "both") fail("phase = {}, expected prefill, decode or both", options.phase);
  if (options.calibration)
    use.calibration = std::make_shared<const model::Calibration>(model::read_calibration(*options.calibration));
  return use;
}

Index at_least_one(const char* name, Index n) {
  if (n < 1) fail("{} = {}, expected >= 1", name, n);
  return n;
}

std::unique_ptr<Session> make_session(const Model& m, const std::string& mechanism, const std::string& layers,
                                      const std::string& phase, const std::optional<std::string>& calibration,
                                      Index context, Index chunk, const std::string& kv) {
  return std::make_unique<Session>(m, model::SessionOptions{.use = use_of(m, {mechanism, layers, phase, calibration}),
                                                            .context = context,
                                                            .chunk = at_least_one("chunk", chunk),
                                                            .kv = dtype_named("kv", kv)});
}

nb::object logits_of(std::vector<float> logits) {
  const std::vector<size_t> shape{logits.size()};
  return numpy_of(std::move(logits), shape);
}

nb::object prefill(Session& s, const std::vector<Token>& tokens) {
  return logits_of(interruptible([&](const model::Progress& p) { return s.prefill(tokens, p); }));
}

nb::object decode(Session& s, Token token) {
  const nb::gil_scoped_release released;
  std::vector<float> logits = s.decode(token);
  const nb::gil_scoped_acquire held;
  return logits_of(std::move(logits));
}

nb::object score(Session& s, const std::vector<Token>& tokens) {
  std::vector<double> nll = interruptible([&](const model::Progress& p) {
    s.prefill_keeping_hidden(tokens, p);
    return s.score_hidden(p);
  });
  const std::vector<size_t> shape{nll.size()};
  return numpy_of(std::move(nll), shape);
}

double session_density(const Session& s) {
  const model::SessionStats& stats = s.stats();
  return stats.dense_pairs == 0 ? 1 : static_cast<double>(stats.attend.pairs) / static_cast<double>(stats.dense_pairs);
}

nb::dict row_of(const model::CompareRow& r) {
  nb::dict d;
  d["mechanism"] = r.call.text(), d["tokens"] = r.tokens, d["nll"] = r.nll, d["ppl"] = r.ppl;
  d["prefill_s"] = r.prefill_s, d["score_s"] = r.score_s, d["tokens_per_s"] = r.tokens_per_s;
  d["attention_s"] = r.attention_s, d["linear_s"] = r.linear_s, d["plan_s"] = r.plan_s;
  d["density"] = r.density, d["peak_bytes"] = r.peak_bytes;
  nb::list passkey, copy;
  for (const model::PasskeyResult& p : r.passkey) {
    nb::dict one;
    one["length"] = p.length, one["depth"] = p.depth, one["seed"] = p.seed, one["key"] = p.key;
    one["answer"] = nb::bytes(p.answer.data(), p.answer.size()).attr("decode")("utf-8", "replace");
    one["found"] = p.found;
    passkey.append(one);
  }
  for (const model::CopyResult& c : r.copy) {
    nb::dict one;
    one["gap"] = c.gap, one["seed"] = c.seed, one["nll_first"] = c.nll_first, one["nll_second"] = c.nll_second;
    copy.append(one);
  }
  d["passkey"] = passkey, d["copy"] = copy;
  return d;
}

nb::list compare(const Model& m, const std::vector<Token>& tokens, const std::string& document,
                 const std::vector<std::string>& mechanisms, const std::string& layers, const std::string& phase,
                 const std::vector<std::string>& tasks, const std::vector<Index>& passkey_lengths,
                 const std::vector<double>& passkey_depths, const std::vector<Index>& copy_gaps,
                 const std::vector<std::uint64_t>& seeds, Index chunk, const std::string& kv) {
  model::CompareOptions o;
  for (const std::string& mechanism : mechanisms) o.uses.push_back(use_of(m, {mechanism, layers, phase, {}}));
  o.perplexity = false;
  for (const std::string& task : tasks) {
    if (task == "perplexity") o.perplexity = true;
    else if (task == "passkey") o.passkey = true;
    else if (task == "copy") o.copy = true;
    else fail("tasks: {}, expected some of perplexity, passkey, copy", task);
  }
  o.passkey_lengths = passkey_lengths, o.passkey_depths = passkey_depths, o.copy_gaps = copy_gaps, o.seeds = seeds;
  o.chunk = at_least_one("chunk", chunk), o.kv = dtype_named("kv", kv);
  if (tokens.size() < 2) fail("text: {} tokens, expected at least 2", tokens.size());
  const std::vector<model::CompareRow> rows = interruptible([&](const model::Progress& p) {
    o.progress = [&](const std::string&, const std::string&, Index done, Index total) { return p(done, total); };
    return model::compare(m, tokens, document, o);
  });
  nb::list list;
  for (const model::CompareRow& r : rows) list.append(row_of(r));
  return list;
}

nb::dict info_of(const Model& m) {
  const model::ModelInfo& i = m.info();
  nb::dict d;
  d["architecture"] = i.architecture, d["name"] = i.name, d["layers"] = i.layers, d["width"] = i.width;
  d["ffn"] = i.ffn, d["heads"] = i.heads, d["kv_heads"] = i.kv_heads, d["head_size"] = i.head_size;
  d["vocabulary"] = i.vocabulary, d["context"] = i.context, d["window"] = i.window;
  d["weight_bytes"] = i.weight_bytes;
  return d;
}

std::vector<Token> encode(const Model& m, const std::string& text, bool special) {
  return m.tokenizer().encode(text, special);
}

nb::bytes decode_bytes(const Model& m, const std::vector<Token>& ids, bool special) {
  const std::string text = m.tokenizer().decode(ids, special);
  return nb::bytes(text.data(), text.size());
}

nb::bytes piece(const Model& m, Token id) {
  const std::string text = m.tokenizer().decode(id);
  return nb::bytes(text.data(), text.size());
}

std::vector<Token> chat(const Model& m, const std::string& user) {
  return model::ChatTemplate::from(m.chat_template()).encode(m.tokenizer(), {{"user", user}}, true);
}

std::unique_ptr<model::Sampler> make_sampler(double temperature, Index top_k, double top_p, double min_p,
                                             std::uint64_t seed) {
  return std::make_unique<model::Sampler>(model::SamplerOptions{temperature, top_k, top_p, min_p, seed});
}

Token draw_token(model::Sampler& s,
                 const nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>& logits) {
  return s.next(std::vector<float>(logits.data(), logits.data() + logits.shape(0)));
}

}  // namespace

void bind_model(nb::module_& m) {
  nb::class_<Model>(m, "Model")
      .def("info", info_of)
      .def("encode", encode, nb::arg("text"), nb::arg("special"))
      .def("decode", decode_bytes, nb::arg("ids"), nb::arg("special"))
      .def("piece", piece, nb::arg("id"))
      .def_prop_ro("bos", [](const Model& x) { return x.tokenizer().bos(); })
      .def_prop_ro("has_chat", [](const Model& x) { return !x.chat_template().empty(); })
      .def("chat", chat, nb::arg("user"))
      .def(
          "ends_text", [](const Model& x, Token id) { return x.tokenizer().ends_text(id); }, nb::arg("id"))
      .def("compare", compare, nb::arg("tokens"), nb::arg("document"), nb::arg("mechanisms"), nb::arg("layers"),
           nb::arg("phase"), nb::arg("tasks"), nb::arg("passkey_lengths"), nb::arg("passkey_depths"),
           nb::arg("copy_gaps"), nb::arg("seeds"), nb::arg("chunk"), nb::arg("kv"));
  m.def(
      "load_model",
      [](const std::string& path, const std::string& dtype) {
        const DType arithmetic = dtype_named("dtype", dtype);
        const nb::gil_scoped_release released;
        return Model::load(path, arithmetic);
      },
      nb::arg("path"), nb::arg("dtype"));

  nb::class_<Session>(m, "Session")
      .def("prefill", prefill, nb::arg("tokens"))
      .def("decode", decode, nb::arg("token"))
      .def("score", score, nb::arg("tokens"))
      .def("truncate", &Session::truncate, nb::arg("size"))
      .def_prop_ro("size", &Session::size)
      .def_prop_ro("density", session_density);
  m.def("make_session", make_session, nb::keep_alive<0, 1>(), nb::arg("model"), nb::arg("mechanism"), nb::arg("layers"),
        nb::arg("phase"), nb::arg("calibration").none(), nb::arg("context"), nb::arg("chunk"), nb::arg("kv"));

  nb::class_<model::Sampler>(m, "Sampler").def("next", draw_token, nb::arg("logits"));
  m.def("make_sampler", make_sampler, nb::arg("temperature"), nb::arg("top_k"), nb::arg("top_p"), nb::arg("min_p"),
        nb::arg("seed"));
}

}  // namespace heed::python
