// Any bytes as a safetensors file: they parse or throw heed::Error, and what parses can be read.

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <vector>

#include "heed/base/error.h"
#include "heed/model/safetensors.h"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, size_t size) {
  try {
    const auto file = heed::model::SafetensorsFile::parse({reinterpret_cast<const std::byte*>(data), size}, "input");
    for (const std::string& name : file.names()) {
      const heed::TensorView& t = file.tensor(name);
      const heed::Index width = heed::size_of(t.dtype), bytes = heed::elements(t.shape) * width;
      if (reinterpret_cast<std::uintptr_t>(t.data) % static_cast<std::uintptr_t>(width) != 0) std::abort();
      const auto* p = static_cast<const std::uint8_t*>(t.data);
      const std::vector<std::uint8_t> copy(p, p + bytes);
      if (!std::equal(copy.begin(), copy.end(), p)) std::abort();
    }
  } catch (const heed::Error&) {
  }
  return 0;
}
