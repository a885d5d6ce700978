#include "heed/model/safetensors.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <set>

#include <nlohmann/json.hpp>

#include "heed/base/file.h"
#include "heed/base/text.h"

static_assert(std::endian::native == std::endian::little, "safetensors fields are read as little endian");

namespace heed::model {
namespace {

using Json = nlohmann::ordered_json;

constexpr std::array dtypes{DType::f32, DType::f16, DType::bf16, DType::i32, DType::u8};

constexpr std::string_view header_name(DType t) {
  switch (t) {
    case DType::f32: return "F32";
    case DType::f16: return "F16";
    case DType::bf16: return "BF16";
    case DType::i32: return "I32";
    case DType::u8: return "U8";
    case DType::i8: return "I8";
  }
  return "?";
}

// One tensor as the header describes it; nothing is checked against the file yet.
struct Entry {
  std::string name, dtype;
  std::vector<std::uint64_t> shape, offsets;
};

// Takes the header's events in the only order that they may come in: an object of objects, whose
// members are texts or arrays of numbers. Anything deeper ends the parse where it starts, so
// nesting costs nothing.
class HeaderReader {
 public:
  explicit HeaderReader(const std::string& file) : file_(file) {}

  std::vector<Entry> entries;
  SafetensorsMetadata metadata;

  bool start_object(size_t) {
    if (at_ == At::outside) at_ = At::top;
    else if (at_ == At::top) at_ = in_metadata_ ? At::metadata : At::tensor;
    else unexpected("an object");
    return true;
  }

  bool end_object() {
    if (at_ == At::metadata) in_metadata_ = false;
    else if (at_ == At::tensor) complete();
    at_ = at_ == At::top ? At::done : At::top;
    return true;
  }

  bool key(std::string& k) {
    key_ = k;
    if (at_ != At::top) return true;
    in_metadata_ = k == "__metadata__";
    if (!in_metadata_) {
      entries.emplace_back();
      entries.back().name = k;
      seen_.clear();
    } else if (std::exchange(seen_metadata_, true)) {
      fail("{}: header: duplicate __metadata__", file_);
    }
    return true;
  }

  bool string(std::string& text) {
    if (at_ == At::metadata) {
      if (!metadata.emplace(key_, std::move(text)).second) fail("{}: duplicate key in __metadata__", where());
    } else if (at_ == At::tensor && key_ == "dtype") {
      once();
      entries.back().dtype = std::move(text);
    } else {
      unexpected("text");
    }
    return true;
  }

  bool start_array(size_t) {
    if (at_ != At::tensor || (key_ != "shape" && key_ != "data_offsets")) unexpected("an array");
    once();
    list_ = key_ == "shape" ? &entries.back().shape : &entries.back().offsets;
    at_ = At::array;
    return true;
  }

  bool end_array() {
    at_ = At::tensor;
    return true;
  }

  bool number_unsigned(std::uint64_t x) {
    if (at_ != At::array) unexpected("a number");
    list_->push_back(x);
    return true;
  }

  bool number_integer(std::int64_t x) { refuse(fmt::format("{}", x)); }
  bool number_float(double, const std::string& text) { refuse(printable(text)); }
  bool null() { unexpected("null"); }
  bool boolean(bool) { unexpected("a boolean"); }
  bool binary(std::vector<std::uint8_t>&) { unexpected("binary data"); }

  template <class Exception>
  bool parse_error(size_t position, const std::string&, const Exception&) {
    fail("{}: header is not valid JSON at byte {}", file_, 8 + position);
  }

 private:
  enum class At { outside, top, metadata, tensor, array, done };

  std::string where() const {
    switch (at_) {
      case At::tensor:
      case At::array: return fmt::format("{}: tensor {}: {}", file_, printable(entries.back().name), printable(key_));
      case At::top:
      case At::metadata: return fmt::format("{}: header: {}", file_, printable(key_));
      default: return fmt::format("{}: header", file_);
    }
  }

  [[noreturn]] void unexpected(std::string_view what) const {
    switch (at_) {
      case At::tensor: fail("{}: {}, expected dtype (text), shape or data_offsets (arrays)", where(), what);
      case At::array: fail("{}: holds {}, expected integers >= 0", where(), what);
      case At::metadata: fail("{}: {}, expected text", where(), what);
      default: fail("{}: {}, expected an object", where(), what);
    }
  }

  [[noreturn]] void refuse(const std::string& number) const {
    if (at_ != At::array) unexpected("a number");
    fail("{}: holds {}, expected integers 0 … 2^64 - 1", where(), number);
  }

  // Notes a member of the tensor that is being read.
  void once() {
    if (!seen_.insert(key_).second) fail("{}: duplicate key", where());
  }

  void complete() const {
    for (const char* member : {"dtype", "shape", "data_offsets"})
      if (seen_.count(member) == 0) fail("{}: tensor {}: {} is missing", file_, printable(entries.back().name), member);
  }

  const std::string& file_;
  At at_ = At::outside;
  bool in_metadata_ = false, seen_metadata_ = false;
  std::string key_;
  std::set<std::string> seen_;  // members of the tensor that is being read
  std::vector<std::uint64_t>* list_ = nullptr;
};

DType dtype_of(const Entry& entry, const std::string& file) {
  for (const DType t : dtypes)
    if (entry.dtype == header_name(t)) return t;
  if (entry.dtype == "F64") fail("{}: tensor {}: dtype = f64, expected f32, f16 or bf16", file, printable(entry.name));
  fail("{}: tensor {}: dtype = {}, expected F32, F16, BF16, I32 or U8", file, printable(entry.name),
       printable(entry.dtype));
}

struct Placed {
  TensorView view;
  std::uint64_t bytes;
};

// The entry as a view into `data`, the part of the file behind the header.
Placed place(const Entry& entry, std::span<const std::byte> data, const std::string& file) {
  const auto bad = [&](const std::string& what) { fail("{}: tensor {}: {}", file, printable(entry.name), what); };
  const DType dtype = dtype_of(entry, file);
  const auto& offsets = entry.offsets;
  if (offsets.size() != 2) bad(fmt::format("{} data_offsets, expected 2", offsets.size()));
  const std::uint64_t first = offsets[0], last = offsets[1];
  if (first > last || last > data.size())
    bad(fmt::format("data_offsets = [{}, {}], expected to ascend within the {} bytes of data", first, last,
                    data.size()));

  const auto width = static_cast<std::uint64_t>(size_of(dtype));
  // Extents are bounded even beside a zero, so that strides cannot overflow.
  constexpr std::uint64_t most = std::uint64_t{1} << 62;
  std::uint64_t size = width, bound = 1;
  Shape shape;
  for (const std::uint64_t extent : entry.shape) {
    const std::uint64_t factor = std::max<std::uint64_t>(extent, 1);
    if (factor > most / width / bound) bad("shape of more than 2^62 bytes");
    bound *= factor;
    size *= extent;
    shape.push_back(static_cast<Index>(extent));
  }
  if (size != last - first)
    bad(fmt::format("data_offsets = [{}, {}] hold {} bytes, expected {} for shape {} of {}", first, last, last - first,
                    size, to_string(shape), name_of(dtype)));
  return {TensorView(data.data() + first, dtype, std::move(shape)), size};
}

std::vector<Index> contiguous_strides(const Shape& shape) { return TensorView(nullptr, DType::u8, shape).stride; }

// Sends the elements of a strided view to a file in row-major order, through a buffer.
class ElementWriter {
 public:
  explicit ElementWriter(AtomicFile& file) : file_(file) { buffer_.reserve(capacity); }

  void write(const TensorView& t) {
    if (elements(t.shape) == 0) return;
    if (t.stride == contiguous_strides(t.shape)) {
      flush();
      file_.write(t.data, static_cast<size_t>(elements(t.shape) * size_of(t.dtype)));
    } else {
      axis(t, 0, static_cast<const std::byte*>(t.data));
    }
  }

  void flush() {
    file_.write(buffer_.data(), buffer_.size());
    buffer_.clear();
  }

 private:
  static constexpr size_t capacity = size_t{1} << 20;

  void axis(const TensorView& t, size_t a, const std::byte* p) {
    const auto width = static_cast<size_t>(size_of(t.dtype));
    if (a == t.shape.size()) {
      if (buffer_.size() + width > capacity) flush();
      buffer_.insert(buffer_.end(), p, p + width);
      return;
    }
    for (Index i = 0; i < t.shape[a]; ++i) axis(t, a + 1, p + i * t.stride[a] * static_cast<Index>(width));
  }

  AtomicFile& file_;
  std::vector<std::byte> buffer_;
};

}  // namespace

SafetensorsFile SafetensorsFile::open(const std::string& path) {
  auto file = std::make_shared<MappedFile>(MappedFile::open(path));
  SafetensorsFile parsed = parse(file->bytes(), path);
  parsed.mapping_ = std::move(file);
  return parsed;
}

SafetensorsFile SafetensorsFile::parse(std::span<const std::byte> bytes, const std::string& name) {
  std::uint64_t header_bytes = 0;
  if (bytes.size() < sizeof(header_bytes))
    fail("{}: {} bytes, expected a safetensors file of at least 8", name, bytes.size());
  std::memcpy(&header_bytes, bytes.data(), sizeof(header_bytes));
  const std::span<const std::byte> rest = bytes.subspan(sizeof(header_bytes));
  if (header_bytes > rest.size())
    fail("{}: header of {} bytes, expected at most the {} that the file has left", name, header_bytes, rest.size());
  const auto* text = reinterpret_cast<const char*>(rest.data());
  if (header_bytes == 0 || text[0] != '{') fail("{}: not a safetensors file: the header does not start with {{", name);

  HeaderReader reader(name);
  Json::sax_parse(text, text + header_bytes, &reader);

  SafetensorsFile file;
  file.name_ = name;
  file.metadata_ = std::move(reader.metadata);
  const std::span<const std::byte> data = rest.subspan(static_cast<size_t>(header_bytes));
  std::uint64_t copied = 0;
  for (const Entry& entry : reader.entries) {
    Placed placed = place(entry, data, name);
    const auto address = reinterpret_cast<std::uintptr_t>(placed.view.data);
    if (address % static_cast<std::uintptr_t>(size_of(placed.view.dtype)) != 0) {
      // Copies of overlapping tensors could exceed the file by any factor.
      if (placed.bytes > data.size() - copied)
        fail("{}: tensor {}: overlaps other tensors and is not aligned to its elements", name, printable(entry.name));
      copied += placed.bytes;
      auto copy = std::shared_ptr<std::byte[]>(new std::byte[placed.bytes + 1]);
      if (placed.bytes > 0) std::memcpy(copy.get(), placed.view.data, placed.bytes);
      placed.view.data = copy.get();
      file.realigned_.push_back(std::move(copy));
    }
    if (!file.tensors_.emplace(entry.name, std::move(placed.view)).second)
      fail("{}: tensor {}: duplicate name", name, printable(entry.name));
  }
  return file;
}

std::vector<std::string> SafetensorsFile::names() const {
  std::vector<std::string> list;
  list.reserve(tensors_.size());
  for (const auto& [tensor_name, view] : tensors_) list.push_back(tensor_name);
  return list;
}

const TensorView* SafetensorsFile::find(std::string_view tensor_name) const {
  const auto found = tensors_.find(tensor_name);
  return found == tensors_.end() ? nullptr : &found->second;
}

const TensorView& SafetensorsFile::tensor(std::string_view tensor_name) const {
  const TensorView* view = find(tensor_name);
  if (view == nullptr) fail("{}: tensor {} is missing", name_, tensor_name);
  return *view;
}

void write_safetensors(const std::string& path, const std::vector<std::pair<std::string, TensorView>>& tensors,
                       const SafetensorsMetadata& metadata) {
  using Named = const std::pair<std::string, TensorView>*;
  std::vector<Named> order;
  order.reserve(tensors.size());
  for (const Index width : {4, 2, 1})
    for (const auto& named : tensors)
      if (size_of(named.second.dtype) == width) order.push_back(&named);

  Json header = Json::object();
  if (!metadata.empty()) header["__metadata__"] = metadata;
  std::set<std::string_view> seen{"__metadata__"};
  Index offset = 0;
  for (const Named named : order) {
    const auto& [tensor_name, view] = *named;
    if (!seen.insert(tensor_name).second)
      fail("{}: tensor {}: duplicate or reserved name", path, printable(tensor_name));
    const Index end = offset + elements(view.shape) * size_of(view.dtype);
    header[tensor_name] = {{"dtype", header_name(view.dtype)}, {"shape", view.shape}, {"data_offsets", {offset, end}}};
    offset = end;
  }
  std::string text;
  try {
    text = header.dump();
  } catch (const Json::exception&) {
    fail("{}: a tensor name or metadata text is not UTF-8", path);
  }
  text.resize(static_cast<size_t>(round_up(static_cast<Index>(text.size()), 8)), ' ');

  AtomicFile file(path);
  const std::uint64_t header_bytes = text.size();
  text.insert(0, reinterpret_cast<const char*>(&header_bytes), sizeof(header_bytes));
  file.write(text.data(), text.size());
  ElementWriter writer(file);
  for (const Named named : order) writer.write(named->second);
  writer.flush();
  file.commit();
}

}  // namespace heed::model
