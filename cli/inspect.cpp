// heed inspect: what a model file holds.

#include <fmt/format.h>

#include <map>
#include <memory>

#include "cli/commands.h"
#include "cli/options.h"
#include "cli/terminal.h"
#include "cli/utf8.h"
#include "heed/base/text.h"
#include "heed/model/chat.h"
#include "heed/model/weights.h"

namespace heed::cli {
namespace {

constexpr size_t longest_text = 72;

struct FormatSum {
  Index tensors = 0, elements = 0, bytes = 0;
};

std::map<std::string, FormatSum> formats_of(const model::Gguf& file) {
  std::map<std::string, FormatSum> sums;
  for (const model::GgufTensor& t : file.tensors()) {
    FormatSum& sum = sums[std::string(name_of(t.format))];
    ++sum.tensors;
    sum.elements += elements(t.shape);
    sum.bytes += static_cast<Index>(t.bytes.size());
  }
  return sums;
}

// Long arrays (vocabularies) are given by their length.
Json value_json(const model::MetaValue& value) {
  return std::visit(
      [](const auto& x) -> Json {
        using T = std::decay_t<decltype(x)>;
        if constexpr (std::is_same_v<T, std::string>) return valid_utf8(x);
        else if constexpr (!std::is_arithmetic_v<T>)
          if (x.size() > 64) return {{"array", x.size()}};
        return x;
      },
      value);
}

std::string value_text(const model::MetaValue& value) {
  return std::visit(
      [](const auto& x) -> std::string {
        using T = std::decay_t<decltype(x)>;
        if constexpr (std::is_same_v<T, std::string>) return printable(valid_utf8(x), longest_text);
        else if constexpr (std::is_arithmetic_v<T>) return fmt::format("{}", x);
        else return fmt::format("{} values", x.size());
      },
      value);
}

// The sizes of a model that heed can run, or why it cannot.
Json model_json(const model::Gguf& file) {
  try {
    const model::ModelInfo m = model::read_info(file);
    Json windows = nullptr;
    if (m.window > 0) {
      windows = {{"window", m.window}, {"layers", Json::array()}};
      for (Index i = 0; i < m.layers; ++i)
        if (m.local[static_cast<size_t>(i)]) windows["layers"].push_back(i);
    }
    const model::ChatTemplate chat = model::ChatTemplate::from(file);
    return {{"supported", true},
            {"architecture", m.architecture},
            {"name", m.name},
            {"layers", m.layers},
            {"width", m.width},
            {"ffn", m.ffn},
            {"heads", m.heads},
            {"kv_heads", m.kv_heads},
            {"head_size", m.head_size},
            {"vocabulary", m.vocabulary},
            {"context", m.context},
            {"sliding_window", windows},
            {"tied_output", m.tied_output},
            {"chat_template", chat.known()       ? "chatml"
                              : chat.available() ? "unsupported"
                                                 : "none"},
            {"bytes_in_memory",
             {{"bf16", model::estimate_weight_bytes(file, DType::bf16)},
              {"f32", model::estimate_weight_bytes(file, DType::f32)}}},
            {"kv_bytes_per_token",
             {{"bf16", model::kv_bytes_per_token(m, DType::bf16)}, {"f32", model::kv_bytes_per_token(m, DType::f32)}}}};
  } catch (const Error& error) {
    return {{"supported", false}, {"reason", error.what()}};
  }
}

void print_json(const model::Gguf& file) {
  Json metadata = Json::object(), types = Json::object(), tensors = Json::array();
  for (const auto& [key, value] : file.metadata()) metadata[key] = value_json(value);
  for (const auto& [name, sum] : formats_of(file))
    types[name] = {{"tensors", sum.tensors}, {"elements", sum.elements}, {"bytes", sum.bytes}};
  for (const model::GgufTensor& t : file.tensors())
    tensors.push_back({{"name", t.name}, {"type", name_of(t.format)}, {"shape", t.shape}});
  print(json_text({{"file", file.name()},
                   {"bytes", file.file_bytes()},
                   {"gguf_version", file.version()},
                   {"model", model_json(file)},
                   {"types", types},
                   {"metadata", metadata},
                   {"tensors", tensors}}));
}

void print_text(const model::Gguf& file) {
  const auto heading = [](const std::string& text) { print(toned(text, Tone::bold) + "\n"); };
  heading(fmt::format("{}: GGUF version {}, {}", file.name(), file.version(), bytes_text(file.file_bytes())));
  const Json m = model_json(file);
  if (m["supported"].get<bool>()) {
    const auto number = [&](const char* key) { return count_text(m[key].get<Index>()); };
    print(fmt::format(
        "  {} {}: {} layers, width {}, feed-forward {}, {} heads of {} ({} of keys), vocabulary {}, context {}\n",
        m["architecture"].get<std::string>(), printable(m["name"].get<std::string>()), number("layers"),
        number("width"), number("ffn"), number("heads"), number("head_size"), number("kv_heads"), number("vocabulary"),
        number("context")));
    if (!m["sliding_window"].is_null())
      print(fmt::format("  {} layers with a sliding window of {} tokens of their own\n",
                        m["sliding_window"]["layers"].size(), m["sliding_window"]["window"].get<Index>()));
    print(fmt::format("  output {}; chat template: {}\n",
                      m["tied_output"].get<bool>() ? "tied to the embedding" : "a matrix of its own",
                      m["chat_template"].get<std::string>()));
    print(fmt::format("  in memory: {} in bf16, {} in f32; KV cache {} a token in bf16\n",
                      bytes_text(m["bytes_in_memory"]["bf16"].get<Index>()),
                      bytes_text(m["bytes_in_memory"]["f32"].get<Index>()),
                      bytes_text(m["kv_bytes_per_token"]["bf16"].get<Index>())));
  } else {
    print(fmt::format("  cannot be run: {}\n", m["reason"].get<std::string>()));
  }

  std::vector<std::vector<Cell>> rows{{{"  type"}, {"tensors"}, {"elements"}, {"size"}}};
  for (const auto& [name, sum] : formats_of(file))
    rows.push_back({{"  " + name}, {count_text(sum.tensors)}, {count_text(sum.elements)}, {bytes_text(sum.bytes)}});
  print("\n" + table(rows) + "\n");

  heading("Metadata");
  std::vector<std::vector<Cell>> lines{{{"  key"}, {"value"}}};
  for (const auto& [key, value] : file.metadata())
    lines.push_back({{"  " + printable(valid_utf8(key))}, {value_text(value)}});
  print(table(lines, 2));
}

}  // namespace

void add_inspect(CLI::App& app, Job& job) {
  CLI::App* command = app.add_subcommand("inspect", "What a model file holds: sizes, types, metadata");
  struct Options {
    std::string model;
    bool json = false;
  };
  const auto options = std::make_shared<Options>();
  command->add_option("MODEL", options->model, "A GGUF file")->required();
  command->add_flag("--json", options->json,
                    "Everything as one object, every tensor included; arrays of more than 64 values by their length");
  command->callback([&job, options] {
    job = [options] {
      const model::Gguf file = model::Gguf::open(options->model);
      options->json ? print_json(file) : print_text(file);
    };
  });
  command->footer("Example:\n  heed inspect model.gguf");
}

}  // namespace heed::cli
