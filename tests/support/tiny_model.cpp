#include "support/tiny_model.h"

#include <cmath>
#include <numbers>

#include "heed/base/random.h"

namespace heed::test {
namespace {

using Vector = std::vector<double>;

std::string layer_name(int layer, const std::string& part) {
  return "blk." + std::to_string(layer) + "." + part + ".weight";
}

}  // namespace

TinyModel::TinyModel(const TinySizes& s, std::uint64_t seed) : sizes(s), state_(seed) {
  const int q = s.heads * s.head_size, kv = s.kv_heads * s.head_size;
  const auto matrix = [&](const std::string& name, int rows, int columns) {
    add(name, {rows, columns}, s.weights, 1 / std::sqrt(columns), 0);
  };
  const auto norm_weight = [&](const std::string& name, int size) { add(name, {size}, WeightFormat::f32, 0.2, 1); };
  add("token_embd.weight", {vocabulary, s.width}, s.weights, s.architecture == "gemma3" ? 0.15 : 1, 0);
  norm_weight("output_norm.weight", s.width);
  if (!s.tied) matrix("output.weight", vocabulary, s.width);
  for (int i = 0; i < s.layers; ++i) {
    norm_weight(layer_name(i, "attn_norm"), s.width);
    norm_weight(layer_name(i, "ffn_norm"), s.width);
    matrix(layer_name(i, "attn_q"), q, s.width);
    matrix(layer_name(i, "attn_k"), kv, s.width);
    matrix(layer_name(i, "attn_v"), kv, s.width);
    matrix(layer_name(i, "attn_output"), s.width, q);
    matrix(layer_name(i, "ffn_gate"), s.ffn, s.width);
    matrix(layer_name(i, "ffn_up"), s.ffn, s.width);
    matrix(layer_name(i, "ffn_down"), s.width, s.ffn);
    if (s.architecture != "gemma3") continue;
    norm_weight(layer_name(i, "attn_q_norm"), s.head_size);
    norm_weight(layer_name(i, "attn_k_norm"), s.head_size);
    norm_weight(layer_name(i, "post_attention_norm"), s.width);
    norm_weight(layer_name(i, "post_ffw_norm"), s.width);
  }
}

void TinyModel::add(const std::string& name, std::vector<std::int64_t> shape, WeightFormat format, double scale,
                    double centre) {
  Matrix m{std::move(shape), format, {}, {}};
  Random random(state_++);
  std::int64_t count = 1;
  for (std::int64_t extent : m.shape) count *= extent;
  for (std::int64_t i = 0; i < count; ++i) m.written.push_back(centre + scale * random.normal());
  m.values = encode(format, m.written).values;
  tensors[name] = std::move(m);
}

GgufWriter TinyModel::metadata(const std::set<std::string>& changed) const {
  GgufWriter w;
  const auto number = [&](const std::string& key, int x) {
    if (changed.count(key) == 0) w.u32(sizes.architecture + "." + key, static_cast<std::uint32_t>(x));
  };
  const auto real = [&](const std::string& key, double x) {
    if (changed.count(key) == 0) w.f32(sizes.architecture + "." + key, static_cast<float>(x));
  };
  if (changed.count("architecture") == 0) w.text("general.architecture", sizes.architecture);
  w.text("general.name", "tiny");
  number("block_count", sizes.layers);
  number("embedding_length", sizes.width);
  number("feed_forward_length", sizes.ffn);
  number("attention.head_count", sizes.heads);
  number("attention.head_count_kv", sizes.kv_heads);
  number("context_length", sizes.context);
  if (sizes.key_length) {
    number("attention.key_length", sizes.head_size);
    number("attention.value_length", sizes.head_size);
  }
  if (sizes.window > 0) number("attention.sliding_window", sizes.window);
  real("attention.layer_norm_rms_epsilon", 1e-5);
  real("rope.freq_base", sizes.rope_base);

  // Byte-level BPE writes the bytes that are no visible characters as U+0100 and following.
  std::vector<std::string> tokens;
  const auto utf8 = [](int c) {
    if (c < 0x80) return std::string(1, static_cast<char>(c));
    return std::string{static_cast<char>(0xc0 | c >> 6), static_cast<char>(0x80 | (c & 0x3f))};
  };
  for (int byte = 0, next = 256; byte < 256; ++byte) {
    const bool visible = (byte >= 33 && byte <= 126) || (byte >= 161 && byte <= 172) || byte >= 174;
    tokens.push_back(utf8(visible ? byte : next++));
  }
  tokens.insert(tokens.end(), {"ab", "<|endoftext|>"});
  std::vector<std::int32_t> kinds(tokens.size(), 1);
  kinds.back() = 3;
  w.text("tokenizer.ggml.model", "gpt2").text("tokenizer.ggml.pre", "smollm").texts("tokenizer.ggml.tokens", tokens);
  w.i32s("tokenizer.ggml.token_type", kinds).texts("tokenizer.ggml.merges", {"a b"});
  w.u32("tokenizer.ggml.eos_token_id", vocabulary - 1).boolean("tokenizer.ggml.add_bos_token", false);
  return w;
}

void TinyModel::write_tensors(GgufWriter& writer) const {
  for (const auto& [name, m] : tensors) writer.tensor(name, m.shape, m.format, m.written);
}

std::string TinyModel::file() const {
  GgufWriter writer = metadata();
  write_tensors(writer);
  return writer.file();
}

Vector TinyModel::multiply(const std::string& name, const Vector& x) const {
  const Matrix& m = tensors.at(name);
  Vector y(static_cast<size_t>(m.shape[0]));
  for (size_t r = 0; r < y.size(); ++r)
    for (size_t c = 0; c < x.size(); ++c) y[r] += m.values[r * x.size() + c] * x[c];
  return y;
}

Vector TinyModel::norm(const std::string& name, Vector x) const {
  double squares = 0;
  for (double v : x) squares += v * v;
  const double root = std::sqrt(squares / static_cast<double>(x.size()) + 1e-5);
  for (size_t i = 0; i < x.size(); ++i) x[i] *= values(name)[i] / root;
  return x;
}

void TinyModel::attention(int layer, std::vector<Vector>& x) const {
  const bool gemma = sizes.architecture == "gemma3", local = gemma && layer % 6 < 5;
  const double base = local ? 1e4 : sizes.rope_base;
  const int d = sizes.head_size, half = d / 2;
  const auto prepared = [&](const std::string& part, const Vector& normed, int heads, size_t position) {
    const Vector row = multiply(layer_name(layer, "attn_" + part), normed);
    Vector out;
    for (int h = 0; h < heads; ++h) {
      Vector head(row.begin() + h * d, row.begin() + (h + 1) * d);
      if (gemma) head = norm(layer_name(layer, "attn_" + part + "_norm"), head);
      Vector turned = head;
      for (int i = 0; i < half; ++i) {
        const double angle = static_cast<double>(position) / std::pow(base, 2.0 * i / d);
        const size_t a = static_cast<size_t>(gemma ? i : 2 * i), b = static_cast<size_t>(gemma ? i + half : 2 * i + 1);
        turned[a] = head[a] * std::cos(angle) - head[b] * std::sin(angle);
        turned[b] = head[b] * std::cos(angle) + head[a] * std::sin(angle);
      }
      out.insert(out.end(), turned.begin(), turned.end());
    }
    return out;
  };
  std::vector<Vector> q, k, v;
  for (size_t t = 0; t < x.size(); ++t) {
    const Vector normed = norm(layer_name(layer, "attn_norm"), x[t]);
    q.push_back(prepared("q", normed, sizes.heads, t));
    k.push_back(prepared("k", normed, sizes.kv_heads, t));
    v.push_back(multiply(layer_name(layer, "attn_v"), normed));
  }
  for (size_t t = 0; t < x.size(); ++t) {
    Vector mixed(static_cast<size_t>(sizes.heads * d));
    const size_t window = static_cast<size_t>(sizes.window), first = local && t + 1 > window ? t + 1 - window : 0;
    for (int h = 0; h < sizes.heads; ++h) {
      const int kv_head = h / (sizes.heads / sizes.kv_heads);
      Vector weight;
      double sum = 0;
      for (size_t j = first; j <= t; ++j) {
        double score = 0;
        for (int i = 0; i < d; ++i)
          score += q[t][static_cast<size_t>(h * d + i)] * k[j][static_cast<size_t>(kv_head * d + i)];
        weight.push_back(std::exp(score / std::sqrt(d)));
        sum += weight.back();
      }
      for (size_t j = first; j <= t; ++j)
        for (int i = 0; i < d; ++i)
          mixed[static_cast<size_t>(h * d + i)] += weight[j - first] / sum * v[j][static_cast<size_t>(kv_head * d + i)];
    }
    Vector out = multiply(layer_name(layer, "attn_output"), mixed);
    if (gemma) out = norm(layer_name(layer, "post_attention_norm"), out);
    for (size_t i = 0; i < out.size(); ++i) x[t][i] += out[i];
  }
}

void TinyModel::feed_forward(int layer, Vector& x) const {
  const bool gemma = sizes.architecture == "gemma3";
  const Vector normed = norm(layer_name(layer, "ffn_norm"), x);
  Vector inner = multiply(layer_name(layer, "ffn_gate"), normed);
  const Vector up = multiply(layer_name(layer, "ffn_up"), normed);
  for (size_t i = 0; i < inner.size(); ++i) {
    const double g = inner[i];
    const double gelu = 0.5 * g * (1 + std::tanh(std::sqrt(2 / std::numbers::pi) * (g + 0.044715 * g * g * g)));
    inner[i] = (gemma ? gelu : g / (1 + std::exp(-g))) * up[i];
  }
  Vector out = multiply(layer_name(layer, "ffn_down"), inner);
  if (gemma) out = norm(layer_name(layer, "post_ffw_norm"), out);
  for (size_t i = 0; i < out.size(); ++i) x[i] += out[i];
}

std::vector<Vector> TinyModel::logits(const std::vector<int>& tokens) const {
  std::vector<Vector> x;
  for (int token : tokens) {
    const auto row = values("token_embd.weight").begin() + token * sizes.width;
    x.emplace_back(row, row + sizes.width);
    if (sizes.architecture == "gemma3")
      for (double& v : x.back()) v *= std::sqrt(sizes.width);
  }
  for (int layer = 0; layer < sizes.layers; ++layer) {
    attention(layer, x);
    for (Vector& row : x) feed_forward(layer, row);
  }
  for (Vector& row : x)
    row = multiply(sizes.tied ? "token_embd.weight" : "output.weight", norm("output_norm.weight", row));
  return x;
}

}  // namespace heed::test
