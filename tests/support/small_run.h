// A training run small enough for a test, on a text of its own.
#pragma once

#include <string>
#include <vector>

#include "heed/base/file.h"
#include "heed/nn/trainer.h"
#include "support/folder.h"

namespace heed::test {

struct SmallRun {
  Folder folder;
  nn::TrainConfig config;
  SmallRun(const std::string& text, std::vector<std::string> mechanisms, const ParamTexts& settings) {
    write_file(folder / "text", text);
    config.file = folder / "text";
    config.mechanisms = std::move(mechanisms);
    for (const auto& [name, value] : ParamTexts{{"layers", "2"},
                                                {"width", "32"},
                                                {"ffn", "48"},
                                                {"heads", "4"},
                                                {"kv_heads", "2"},
                                                {"head_size", "8"},
                                                {"context", "256"},
                                                {"length", "64"},
                                                {"batch", "4"},
                                                {"steps", "8"},
                                                {"warmup", "2"},
                                                {"lr", "1e-2"},
                                                {"eval_tokens", "512"}})
      nn::set(config.settings, name, value);
    for (const auto& [name, value] : settings) nn::set(config.settings, name, value);
  }
};

}  // namespace heed::test
