#include "heed/model/calibration.h"

#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <cstring>

#include "heed/model/safetensors.h"

namespace heed::model {
namespace {

constexpr std::string_view prefix = "layers.", shared_prefix = "all.";

std::string title_of(const ModelInfo& info) { return info.architecture + " " + info.name; }

// "layers.3.wk" into 3 and "wk".
bool take_apart(const std::string& text, Index& layer, std::string& name) {
  if (!text.starts_with(prefix)) return false;
  const char *begin = text.data() + prefix.size(), *end = text.data() + text.size();
  const auto [dot, error] = std::from_chars(begin, end, layer);
  if (error != std::errc() || layer < 0 || dot == end || *dot != '.' || dot + 1 == end) return false;
  name.assign(dot + 1, end);
  return true;
}

Tensor copy_of(const TensorView& x) {
  Tensor copy(x.dtype, x.shape);
  if (copy.bytes() > 0) std::memcpy(copy.data(), x.data, static_cast<size_t>(copy.bytes()));  // files hold no strides
  return copy;
}

}  // namespace

MechanismCall Calibration::complete(const MechanismCall& call) const {
  if (call.name != mechanism)
    fail_usage("--calibration: made for {}, expected one for the mechanism {}", mechanism, call.name);
  MechanismCall completed = call;
  for (const auto& [name, value] : params)
    if (std::none_of(call.params.begin(), call.params.end(),
                     [&, n = name](const auto& given) { return given.first == n; }))
      completed.params.emplace_back(name, value);
  return completed;
}

Calibration read_calibration(const std::string& path) {
  const SafetensorsFile file = SafetensorsFile::open(path);
  const SafetensorsMetadata& metadata = file.metadata();
  const auto mechanism = metadata.find("mechanism");
  if (mechanism == metadata.end())
    fail("{}: no \"mechanism\" in its metadata, expected a file that heed calibrate wrote", path);
  Calibration c;
  c.mechanism = mechanism->second;
  if (const auto model = metadata.find("model"); model != metadata.end()) c.model = model->second;
  if (const auto params = metadata.find("params"); params != metadata.end() && !params->second.empty())
    c.params = MechanismCall::parse(c.mechanism + ":" + params->second).params;
  for (const std::string& text : file.names()) {
    Index layer = 0;
    std::string name;
    if (take_apart(text, layer, name)) c.layers[layer].emplace(name, copy_of(file.tensor(text)));
    else if (text.starts_with(shared_prefix) && text.size() > shared_prefix.size())
      c.all.emplace(text.substr(shared_prefix.size()), copy_of(file.tensor(text)));
    else fail("{}: tensor {}, expected names such as layers.0.NAME or all.NAME", path, text);
  }
  return c;
}

void write_calibration(const std::string& path, const Calibration& calibration) {
  std::vector<std::pair<std::string, TensorView>> tensors;
  for (const auto& [layer, named] : calibration.layers)
    for (const auto& [name, tensor] : named)
      tensors.emplace_back(fmt::format("{}{}.{}", prefix, layer, name), tensor.view());
  for (const auto& [name, tensor] : calibration.all)
    tensors.emplace_back(fmt::format("{}{}", shared_prefix, name), tensor.view());
  std::string params;
  for (const auto& [name, value] : calibration.params) params += (params.empty() ? "" : ",") + name + "=" + value;
  write_safetensors(path, tensors,
                    {{"mechanism", calibration.mechanism}, {"model", calibration.model}, {"params", params}});
}

Calibration calibrate(const Model& model, const MechanismUse& use, const std::vector<Token>& tokens, Index chunk,
                      DType kv, const Progress& progress) {
  const Mechanism& m = find_mechanism(use.call.name);
  check_calibrates(m);
  const Params params(m.name, m.params, use.call.params);
  const ModelInfo& info = model.info();

  MechanismUse dense = use;
  dense.call = {"dense", {}}, dense.phase = Phase::both, dense.calibration = nullptr;
  Session session(model, {.use = dense, .context = static_cast<Index>(tokens.size()), .chunk = chunk, .kv = kv});
  Calibration c;
  c.mechanism = m.name, c.model = title_of(info);
  std::vector<NamedTensors> learned;
  std::vector<Index> layers;
  session.observe_inputs([&](Index layer, const Inputs& in) {
    layers.push_back(layer);
    learned.push_back(m.calibrate(params, in));
  });
  session.prefill(tokens, progress);

  // What the user said of the parameters holds when the calibration is used, too.
  c.params = use.call.params;
  if (m.settle != nullptr)
    for (const auto& [name, value] : m.settle(params, learned)) {
      std::erase_if(c.params, [&, n = name](const auto& p) { return p.first == n; });
      c.params.emplace_back(name, value);
    }
  for (size_t i = 0; i < layers.size(); ++i) c.layers[layers[i]] = std::move(learned[i]);
  return c;
}

}  // namespace heed::model
