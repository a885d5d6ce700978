#include "heed/model/gguf.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#include "heed/base/file.h"
#include "heed/base/text.h"

static_assert(std::endian::native == std::endian::little, "GGUF fields are read as little endian");

namespace heed::model {
namespace {

// The format's type numbers of metadata values.
enum class MetaType : std::uint32_t { u8, i8, u16, i16, u32, i32, f32, boolean, text, array, u64, i64, f64 };

std::string_view kind_of(const MetaValue& value) {
  constexpr std::string_view kinds[] = {
      "an integer",           "an integer",          "a number",        "a boolean", "text",
      "an array of integers", "an array of numbers", "an array of text"};
  return kinds[value.index()];
}

// Takes a file apart from front to back. Every claim is checked against the bytes that are left
// before anything is allocated for it, so memory stays within a small multiple of the file.
class Parser {
 public:
  Parser(std::span<const std::byte> bytes, const std::string& name) : bytes_(bytes), name_(name) {}

  int version = 0;
  std::map<std::string, MetaValue, std::less<>> metadata;
  std::vector<GgufTensor> tensors;
  std::map<std::string, size_t, std::less<>> by_name;

  void run() {
    where_ = "header";
    if (bytes_.size() < 4 || std::memcmp(bytes_.data(), "GGUF", 4) != 0) fail("{}: not a GGUF file", name_);
    position_ = 4;
    const auto claimed = number<std::uint32_t>();
    if (claimed != 2 && claimed != 3) fail("{}: GGUF version {}, expected 2 or 3 (little endian)", name_, claimed);
    version = static_cast<int>(claimed);
    // Least bytes: a tensor is a name of 1, one extent, type and offset; a key is a name of 1, type and value of 1.
    const auto tensor_count = count("tensors", 8 + 1 + 4 + 8 + 4 + 8);
    const auto key_count = count("metadata keys", 8 + 1 + 4 + 1);
    for (std::uint64_t i = 0; i < key_count; ++i) read_metadata(i);
    const std::uint64_t alignment = read_alignment();
    std::vector<std::uint64_t> offsets;
    offsets.reserve(tensor_count);
    for (std::uint64_t i = 0; i < tensor_count; ++i) offsets.push_back(read_tensor(i));
    place_tensors(offsets, alignment);
  }

 private:
  std::uint64_t left() const { return bytes_.size() - position_; }

  template <class... A>
  [[noreturn]] void bad(fmt::format_string<A...> format, A&&... args) const {
    fail("{}: {}: {}", name_, where_, fmt::format(format, std::forward<A>(args)...));
  }

  void need(std::uint64_t bytes) const {
    if (bytes > left())
      bad("{} bytes at byte {}, expected at most the {} that the file has left", bytes, position_, left());
  }

  template <class T>
  T number() {
    need(sizeof(T));
    T x;
    std::memcpy(&x, bytes_.data() + position_, sizeof(T));
    position_ += sizeof(T);
    return x;
  }

  // A count of things that take at least `least` bytes each.
  std::uint64_t count(std::string_view what, std::uint64_t least) {
    const auto n = number<std::uint64_t>();
    if (n > left() / least)
      bad("{} {} at byte {}, expected at most the {} that fit into the file", n, what, position_ - 8, left() / least);
    return n;
  }

  std::string_view text() {
    const auto length = number<std::uint64_t>();
    need(length);
    const auto* start = reinterpret_cast<const char*>(bytes_.data() + position_);
    position_ += length;
    return {start, static_cast<size_t>(length)};
  }

  // Calls visit(T{}) with the type that is stored for `type`; false for text, arrays and unknown numbers.
  template <class Visit>
  static bool with_number(MetaType type, Visit visit) {
    switch (type) {
      case MetaType::u8: visit(std::uint8_t{}); return true;
      case MetaType::i8: visit(std::int8_t{}); return true;
      case MetaType::u16: visit(std::uint16_t{}); return true;
      case MetaType::i16: visit(std::int16_t{}); return true;
      case MetaType::u32: visit(std::uint32_t{}); return true;
      case MetaType::i32: visit(std::int32_t{}); return true;
      case MetaType::f32: visit(float{}); return true;
      case MetaType::u64: visit(std::uint64_t{}); return true;
      case MetaType::i64: visit(std::int64_t{}); return true;
      case MetaType::f64: visit(double{}); return true;
      default: return false;
    }
  }

  bool boolean() {
    const auto x = number<std::uint8_t>();
    if (x > 1) bad("boolean = {}, expected 0 or 1", x);
    return x == 1;
  }

  [[noreturn]] void bad_type(MetaType type) const {
    bad("value type {}, expected 0 … 12", static_cast<std::uint32_t>(type));
  }

  void read_metadata(std::uint64_t i) {
    where_ = fmt::format("metadata key {}", i);
    const std::string_view key = text();
    if (key.empty()) bad("empty name");
    where_ = printable(key);
    if (metadata.find(key) != metadata.end()) bad("duplicate metadata key");
    const auto type = static_cast<MetaType>(number<std::uint32_t>());
    MetaValue value;
    const bool numeric = with_number(type, [&]<class T>(T) {
      if constexpr (std::is_floating_point_v<T>) value = static_cast<double>(number<T>());
      else if constexpr (std::is_unsigned_v<T>) value = std::uint64_t{number<T>()};
      else value = std::int64_t{number<T>()};
    });
    if (!numeric) switch (type) {
        case MetaType::boolean: value = boolean(); break;
        case MetaType::text: value = std::string(text()); break;
        case MetaType::array: value = read_array(); break;
        default: bad_type(type);
      }
    metadata.emplace(key, std::move(value));
  }

  MetaValue read_array() {
    const auto type = static_cast<MetaType>(number<std::uint32_t>());
    MetaValue value;
    const bool numeric = with_number(type, [&]<class T>(T) {
      using Wide = std::conditional_t<std::is_floating_point_v<T>, double, std::int64_t>;
      std::vector<Wide> items(count("elements", sizeof(T)));
      for (Wide& item : items) {
        const T x = number<T>();
        if constexpr (std::is_same_v<T, std::uint64_t>) {
          if (x > std::numeric_limits<std::int64_t>::max()) bad("element = {}, expected less than 2^63", x);
          item = static_cast<std::int64_t>(x);
        } else {
          item = Wide{x};
        }
      }
      value = std::move(items);
    });
    if (numeric) return value;
    switch (type) {
      case MetaType::boolean: {
        std::vector<std::int64_t> items(count("elements", 1));
        for (std::int64_t& item : items) item = boolean() ? 1 : 0;
        return items;
      }
      case MetaType::text: {
        std::vector<std::string> items(count("elements", 8));
        for (std::string& item : items) item = text();
        return items;
      }
      case MetaType::array: bad("array of arrays, expected an array of numbers, booleans or text");
      default: bad_type(type);
    }
  }

  std::uint64_t read_alignment() {
    where_ = "general.alignment";
    const auto found = metadata.find(where_);
    if (found == metadata.end()) return 32;
    const auto* alignment = std::get_if<std::uint64_t>(&found->second);
    if (alignment == nullptr) bad("{}, expected an unsigned integer", kind_of(found->second));
    if (!std::has_single_bit(*alignment) || *alignment > std::uint64_t{1} << 30)
      bad("{}, expected a power of two up to 2^30", *alignment);
    return *alignment;
  }

  // Reads a tensor's description and returns its offset within the data.
  std::uint64_t read_tensor(std::uint64_t i) {
    where_ = fmt::format("tensor {}", i);
    const std::string_view tensor_name = text();
    if (tensor_name.empty()) bad("empty name");
    where_ = fmt::format("tensor {}", printable(tensor_name));
    if (by_name.find(tensor_name) != by_name.end()) bad("duplicate tensor name");
    const auto rank = number<std::uint32_t>();
    if (rank < 1 || rank > 4) bad("{} dimensions, expected 1 … 4", rank);
    GgufTensor t;
    t.name = tensor_name;
    t.shape.resize(rank);
    std::uint64_t size = 1;
    constexpr std::uint64_t most = std::uint64_t{1} << 60;  // elements: bytes still fit into 64 bits
    for (std::uint32_t axis = rank; axis-- > 0;) {  // the file stores the innermost extent first
      const auto extent = number<std::uint64_t>();
      if (extent == 0) bad("extent 0, expected >= 1");
      if (extent > most / size) bad("extent {} after {} elements, expected at most 2^60 in all", extent, size);
      size *= extent;
      t.shape[axis] = static_cast<Index>(extent);
    }
    const auto type = number<std::uint32_t>();
    if (!weight_format(type, t.format)) bad("tensor type {}, expected one of {}", type, supported_weight_formats());
    const Index block = block_layout(t.format).elements;
    if (t.columns() % block != 0)
      bad("rows of {} elements of {}, expected a multiple of {}", t.columns(), name_of(t.format), block);
    by_name.emplace(t.name, tensors.size());
    tensors.push_back(std::move(t));
    return number<std::uint64_t>();
  }

  void place_tensors(const std::vector<std::uint64_t>& offsets, std::uint64_t alignment) {
    if (tensors.empty()) return;
    const std::uint64_t start = (position_ + alignment - 1) / alignment * alignment;
    const std::uint64_t room = start < bytes_.size() ? bytes_.size() - start : 0;
    for (size_t i = 0; i < tensors.size(); ++i) {
      GgufTensor& t = tensors[i];
      where_ = fmt::format("tensor {}", printable(t.name));
      if (offsets[i] % alignment != 0) bad("offset {}, expected a multiple of {}", offsets[i], alignment);
      const auto size = static_cast<std::uint64_t>(t.rows() * t.row_bytes());
      if (offsets[i] > room || size > room - offsets[i])
        bad("{} bytes at offset {}, expected to lie within the {} bytes of tensor data", size, offsets[i], room);
      t.bytes = bytes_.subspan(static_cast<size_t>(start + offsets[i]), static_cast<size_t>(size));
    }
    // Overlapping tensors would let a small file ask for any amount of packed weights.
    std::vector<const GgufTensor*> order;
    order.reserve(tensors.size());
    for (const GgufTensor& t : tensors) order.push_back(&t);
    const auto start_of = [](const GgufTensor* t) { return t->bytes.data(); };
    std::sort(order.begin(), order.end(), [&](const auto* a, const auto* b) { return start_of(a) < start_of(b); });
    for (size_t i = 1; i < order.size(); ++i) {
      where_ = fmt::format("tensor {}", printable(order[i]->name));
      if (order[i - 1]->bytes.data() + order[i - 1]->bytes.size() > order[i]->bytes.data())
        bad("overlaps tensor {}", printable(order[i - 1]->name));
    }
  }

  std::span<const std::byte> bytes_;
  const std::string& name_;
  std::uint64_t position_ = 0;
  std::string where_;  // the culprit of whatever is wrong next
};

}  // namespace

Index GgufTensor::rows() const { return elements(shape) / columns(); }

Index GgufTensor::row_bytes() const {
  const BlockLayout layout = block_layout(format);
  return columns() / layout.elements * layout.bytes;
}

void GgufTensor::read_row(Index r, float* out) const {
  dequantize(format, bytes.data() + r * row_bytes(), columns(), out);
}

Gguf Gguf::open(const std::string& path) {
  auto file = std::make_shared<MappedFile>(MappedFile::open(path));
  Gguf parsed = parse(file->bytes(), path);
  parsed.mapping_ = std::move(file);
  return parsed;
}

Gguf Gguf::parse(std::span<const std::byte> bytes, const std::string& name) {
  Parser parser(bytes, name);
  parser.run();
  Gguf file;
  file.name_ = name;
  file.bytes_ = bytes;
  file.version_ = parser.version;
  file.metadata_ = std::move(parser.metadata);
  file.tensors_ = std::move(parser.tensors);
  file.by_name_ = std::move(parser.by_name);
  return file;
}

const MetaValue& Gguf::value(std::string_view key) const {
  const auto found = metadata_.find(key);
  if (found == metadata_.end()) fail("{}: {} is missing", name_, key);
  return found->second;
}

void Gguf::wrong_type(std::string_view key, std::string_view expected) const {
  fail("{}: {} is {}, expected {}", name_, key, kind_of(value(key)), expected);
}

template <class T>
const T& Gguf::typed(std::string_view key, std::string_view expected) const {
  const T* x = std::get_if<T>(&value(key));
  if (x == nullptr) wrong_type(key, expected);
  return *x;
}

Index Gguf::integer(std::string_view key) const {
  const MetaValue& v = value(key);
  if (const auto* x = std::get_if<std::int64_t>(&v)) return *x;
  const auto x = typed<std::uint64_t>(key, "an integer");
  if (x > std::numeric_limits<Index>::max()) fail("{}: {} = {}, expected less than 2^63", name_, key, x);
  return static_cast<Index>(x);
}

double Gguf::number(std::string_view key) const {
  const MetaValue& v = value(key);
  if (const auto* x = std::get_if<std::int64_t>(&v)) return static_cast<double>(*x);
  if (const auto* x = std::get_if<std::uint64_t>(&v)) return static_cast<double>(*x);
  return typed<double>(key, "a number");
}

Index Gguf::integer_or(std::string_view key, Index otherwise) const { return has(key) ? integer(key) : otherwise; }
double Gguf::number_or(std::string_view key, double otherwise) const { return has(key) ? number(key) : otherwise; }
bool Gguf::boolean_or(std::string_view key, bool otherwise) const {
  return has(key) ? typed<bool>(key, "a boolean") : otherwise;
}
const std::string& Gguf::text(std::string_view key) const { return typed<std::string>(key, "text"); }
std::string Gguf::text_or(std::string_view key, std::string otherwise) const {
  if (has(key)) return text(key);
  return otherwise;
}
const std::vector<std::string>& Gguf::texts(std::string_view key) const {
  return typed<std::vector<std::string>>(key, "an array of text");
}
const std::vector<double>& Gguf::numbers(std::string_view key) const {
  return typed<std::vector<double>>(key, "an array of numbers");
}
const std::vector<std::int64_t>& Gguf::integers(std::string_view key) const {
  return typed<std::vector<std::int64_t>>(key, "an array of integers");
}

const GgufTensor* Gguf::find(std::string_view tensor_name) const {
  const auto found = by_name_.find(tensor_name);
  return found == by_name_.end() ? nullptr : &tensors_[found->second];
}

const GgufTensor& Gguf::tensor(std::string_view tensor_name, const Shape& expected) const {
  const GgufTensor* t = find(tensor_name);
  if (t == nullptr) fail("{}: tensor {} is missing, expected shape {}", name_, tensor_name, to_string(expected));
  if (t->shape != expected)
    fail("{}: tensor {}: shape = {}, expected {}", name_, tensor_name, to_string(t->shape), to_string(expected));
  return *t;
}

}  // namespace heed::model
