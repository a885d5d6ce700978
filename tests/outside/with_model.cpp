// A program that uses the installed libheed_model: it refuses what is not a GGUF file.

#include <heed/model/gguf.h>

#include <array>
#include <cstddef>
#include <cstdio>

int main() {
  const std::array<std::byte, 8> bytes{};
  try {
    heed::model::Gguf::parse(bytes, "eight zeros");
  } catch (const heed::Error& e) {
    std::printf("refused: %s\n", e.what());
    return 0;
  }
  return 1;
}
