// Where the real model files and texts are that some tests read.
#pragma once

#include <doctest/doctest.h>

#include <unistd.h>

#include <cstdlib>
#include <string>

namespace heed::test {

/// The path of a downloaded file; the test case fails when it is not there.
inline std::string cached(const std::string& name) {
  const auto setting = [](const char* variable) {
    const char* text = std::getenv(variable);
    return std::string(text != nullptr ? text : "");
  };
  std::string folder = setting("HEED_CACHE");
  if (folder.empty())
    folder = (setting("XDG_CACHE_HOME").empty() ? setting("HOME") + "/.cache" : setting("XDG_CACHE_HOME")) + "/heed";
  const std::string path = folder + "/" + name;
  REQUIRE_MESSAGE(::access(path.c_str(), R_OK) == 0, path, " is missing: run scripts/fetch.sh first");
  return path;
}

}  // namespace heed::test
