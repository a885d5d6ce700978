// Replays what the fuzzers start from and what they once found, in every build.
#include <doctest/doctest.h>

#include <filesystem>

#include "heed/base/file.h"

// Each fuzzer is a file of its own with the entry point that libFuzzer looks for; here each gets another name.
#define LLVMFuzzerTestOneInput fuzz_gguf
#include "fuzz/fuzz_gguf.cpp"
#undef LLVMFuzzerTestOneInput
#define LLVMFuzzerTestOneInput fuzz_safetensors
#include "fuzz/fuzz_safetensors.cpp"
#undef LLVMFuzzerTestOneInput
#define LLVMFuzzerTestOneInput fuzz_tokenizer
#include "fuzz/fuzz_tokenizer.cpp"
#undef LLVMFuzzerTestOneInput

namespace {

// Runs every file of a corpus; the number of files.
int replay(const char* name, int (*fuzz)(const std::uint8_t*, size_t)) {
  int files = 0;
  const auto folder = std::filesystem::path(HEED_SOURCE_DIR) / "tests/fuzz/corpus" / name;
  for (const auto& entry : std::filesystem::directory_iterator(folder)) {
    CAPTURE(entry.path().string());
    const std::string bytes = heed::read_file(entry.path().string());
    CHECK(fuzz(reinterpret_cast<const std::uint8_t*>(bytes.data()), bytes.size()) == 0);
    ++files;
  }
  return files;
}

}  // namespace

TEST_CASE("the corpus of GGUF files") { CHECK(replay("gguf", fuzz_gguf) > 0); }
TEST_CASE("the corpus of safetensors files") { CHECK(replay("safetensors", fuzz_safetensors) > 0); }
TEST_CASE("the corpus of texts") { CHECK(replay("tokenizer", fuzz_tokenizer) > 0); }
