#include "heed/model/gguf_write.h"

#include <cstring>
#include <limits>
#include <set>
#include <type_traits>

#include "heed/base/file.h"
#include "heed/base/text.h"

namespace heed::model {
namespace {

constexpr Index alignment = 32;

// The format's type numbers of metadata values.
enum class MetaType : std::uint32_t {
  u32 = 4,
  i32 = 5,
  f32 = 6,
  boolean = 7,
  text = 8,
  array = 9,
  u64 = 10,
  i64 = 11,
  f64 = 12
};

// Pieces of the file before its tensors' data.
class Header {
 public:
  template <class T>
  void number(T x) {
    const size_t at = bytes.size();
    bytes.resize(at + sizeof x);
    std::memcpy(bytes.data() + at, &x, sizeof x);
  }
  void type(MetaType t) { number(static_cast<std::uint32_t>(t)); }
  void text(std::string_view x) {
    number<std::uint64_t>(x.size());
    bytes += x;
  }

  void value(std::uint64_t x) {
    if (x > std::numeric_limits<std::uint32_t>::max()) return type(MetaType::u64), number(x);
    type(MetaType::u32), number(static_cast<std::uint32_t>(x));
  }
  void value(std::int64_t x) {
    integers({&x, 1}, [](auto) {});
  }
  void value(double x) {
    reals({&x, 1}, [](auto) {});
  }
  void value(bool x) { type(MetaType::boolean), number<std::uint8_t>(x ? 1 : 0); }
  void value(const std::string& x) { type(MetaType::text), text(x); }
  void value(const std::vector<std::int64_t>& x) {
    type(MetaType::array);
    integers(x, [&](MetaType) { number<std::uint64_t>(x.size()); });
  }
  void value(const std::vector<double>& x) {
    type(MetaType::array);
    reals(x, [&](MetaType) { number<std::uint64_t>(x.size()); });
  }
  void value(const std::vector<std::string>& x) {
    type(MetaType::array), type(MetaType::text);
    number<std::uint64_t>(x.size());
    for (const std::string& s : x) text(s);
  }

  std::string bytes;

 private:
  // All in one width: the narrow one when it holds every number exactly. `after_type` writes what follows the type.
  template <class Narrow, class Wide, class After>
  void numbers(std::span<const Wide> x, MetaType narrow, MetaType wide, const After& after_type) {
    bool fits = true;
    for (const Wide v : x) {
      if constexpr (std::is_integral_v<Wide>)
        fits = fits && v >= std::numeric_limits<Narrow>::min() && v <= std::numeric_limits<Narrow>::max();
      else fits = fits && (static_cast<Wide>(static_cast<Narrow>(v)) == v || v != v);
    }
    type(fits ? narrow : wide);
    after_type(fits ? narrow : wide);
    for (const Wide v : x) {
      if (fits) number(static_cast<Narrow>(v));
      else number(v);
    }
  }
  template <class After>
  void integers(std::span<const std::int64_t> x, const After& after) {
    numbers<std::int32_t>(x, MetaType::i32, MetaType::i64, after);
  }
  template <class After>
  void reals(std::span<const double> x, const After& after) {
    numbers<float>(x, MetaType::f32, MetaType::f64, after);
  }
};

void check(const std::string& path, const GgufMetadata& metadata, const std::vector<GgufTensor>& tensors) {
  for (const auto& [key, value] : metadata) {
    if (key.empty()) fail("{}: a metadata key without a name", path);
    if (key == "general.alignment") fail("{}: general.alignment among the metadata, expected none: it is 32", path);
  }
  std::set<std::string_view> seen;
  for (const GgufTensor& t : tensors) {
    const std::string name = printable(t.name);
    if (t.name.empty()) fail("{}: a tensor without a name", path);
    if (!seen.insert(t.name).second) fail("{}: tensor {}: duplicate name", path, name);
    if (t.shape.empty() || t.shape.size() > 4)
      fail("{}: tensor {}: {} dimensions, expected 1 … 4", path, name, t.shape.size());
    for (const Index extent : t.shape)
      if (extent < 1) fail("{}: tensor {}: shape = {}, expected every extent >= 1", path, name, to_string(t.shape));
    if (t.columns() % block_layout(t.format).elements != 0)
      fail("{}: tensor {}: rows of {} elements of {}, expected a multiple of {}", path, name, t.columns(),
           name_of(t.format), block_layout(t.format).elements);
    if (static_cast<Index>(t.bytes.size()) != t.rows() * t.row_bytes())
      fail("{}: tensor {}: {} bytes, expected {}", path, name, t.bytes.size(), t.rows() * t.row_bytes());
  }
}

}  // namespace

void write_gguf(const std::string& path, const GgufMetadata& metadata, const std::vector<GgufTensor>& tensors) {
  check(path, metadata, tensors);
  Header header;
  header.bytes = "GGUF";
  header.number<std::uint32_t>(3);
  header.number<std::uint64_t>(tensors.size());
  header.number<std::uint64_t>(metadata.size());
  for (const auto& [key, value] : metadata) {
    header.text(key);
    std::visit([&](const auto& x) { header.value(x); }, value);
  }
  Index offset = 0;
  for (const GgufTensor& t : tensors) {
    header.text(t.name);
    header.number(static_cast<std::uint32_t>(t.shape.size()));
    for (size_t axis = t.shape.size(); axis-- > 0;) header.number(static_cast<std::uint64_t>(t.shape[axis]));
    header.number(static_cast<std::uint32_t>(t.format));
    header.number(static_cast<std::uint64_t>(offset));
    offset = round_up(offset + static_cast<Index>(t.bytes.size()), alignment);
  }
  header.bytes.resize(static_cast<size_t>(round_up(static_cast<Index>(header.bytes.size()), alignment)));

  AtomicFile file(path);
  file.write(header.bytes.data(), header.bytes.size());
  constexpr std::byte padding[alignment]{};
  for (const GgufTensor& t : tensors) {
    const auto size = static_cast<Index>(t.bytes.size());
    file.write(t.bytes.data(), t.bytes.size());
    file.write(padding, static_cast<size_t>(round_up(size, alignment) - size));
  }
  file.commit();
}

GgufMetadata metadata_of(const ModelInfo& info) {
  GgufMetadata m;
  const auto size = [&](const char* name, Index n) {
    m[info.architecture + "." + name] = static_cast<std::uint64_t>(n);
  };
  // As f32, in which such files hold their constants.
  const auto real = [&](const char* name, double x) {
    m[info.architecture + "." + name] = double{static_cast<float>(x)};
  };
  m["general.architecture"] = info.architecture;
  if (!info.name.empty()) m["general.name"] = info.name;
  size("block_count", info.layers);
  size("embedding_length", info.width);
  size("feed_forward_length", info.ffn);
  size("attention.head_count", info.heads);
  size("attention.head_count_kv", info.kv_heads);
  size("attention.key_length", info.head_size);
  size("attention.value_length", info.head_size);
  size("rope.dimension_count", info.head_size);
  size("context_length", info.context);
  size("vocab_size", info.vocabulary);
  real("attention.layer_norm_rms_epsilon", info.rms_eps);
  real("rope.freq_base", info.rope_base);
  if (info.window > 0) {
    size("attention.sliding_window", info.window);
    real("rope.freq_base_swa", info.rope_base_local);
    // The last layer of every period is global.
    Index period = 1;
    while (period <= info.layers && info.local[static_cast<size_t>(period - 1)]) ++period;
    size("attention.sliding_window_pattern", period);
  }
  return m;
}

GgufMetadata metadata_of(const Vocabulary& v) {
  GgufMetadata m;
  const auto key = [](const char* name) { return std::string("tokenizer.ggml.") + name; };
  const auto id = [&](const char* name, std::optional<Token> token) {
    if (token) m[key(name)] = static_cast<std::uint64_t>(*token);
  };
  m[key("model")] = v.model;
  m[key("tokens")] = v.tokens;
  std::vector<std::int64_t> kinds;
  for (const TokenKind kind : v.kinds) kinds.push_back(static_cast<std::int64_t>(kind));
  m[key("token_type")] = std::move(kinds);
  if (v.model == "llama") {
    m[key("scores")] = std::vector<double>(v.scores.begin(), v.scores.end());
    m[key("add_space_prefix")] = v.add_space_prefix;
  } else {
    m[key("pre")] = v.pre;
    m[key("merges")] = v.merges;
  }
  id("bos_token_id", v.bos);
  id("eos_token_id", v.eos);
  id("unknown_token_id", v.unknown);
  m[key("add_bos_token")] = v.add_bos;
  return m;
}

}  // namespace heed::model
