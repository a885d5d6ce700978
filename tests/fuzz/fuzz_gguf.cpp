// Any bytes as a GGUF file: they parse or throw heed::Error, and what parses can be read.

#include <cstdint>
#include <cstdlib>
#include <vector>

#include "heed/base/error.h"
#include "heed/model/gguf.h"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, size_t size) {
  try {
    const auto file = heed::model::Gguf::parse({reinterpret_cast<const std::byte*>(data), size}, "input");
    std::vector<float> row;
    for (const auto& t : file.tensors()) {
      if (file.find(t.name) != &t || static_cast<heed::Index>(t.bytes.size()) != t.rows() * t.row_bytes()) std::abort();
      row.resize(static_cast<size_t>(t.columns()));
      t.read_row(0, row.data());
      t.read_row(t.rows() - 1, row.data());
    }
    for (const auto& [key, value] : file.metadata()) file.number_or(key, 0);
  } catch (const heed::Error&) {
  }
  return 0;
}
