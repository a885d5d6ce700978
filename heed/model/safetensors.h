// safetensors files: named tensors behind a JSON header, read in place through mmap with every
// length checked, and written atomically.
#pragma once

#include <map>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "heed/base/tensor.h"

namespace heed::model {

/// Free text beside the tensors ("__metadata__" in the header).
using SafetensorsMetadata = std::map<std::string, std::string, std::less<>>;

/// A parsed file. Views are contiguous, aligned to their elements, and live as long as this object.
class SafetensorsFile {
 public:
  /// Maps and parses `path`. Throws Error naming the path and the culprit: a header that is not
  /// the JSON it should be, a dtype other than f32, f16, bf16, i32 and u8, offsets outside the file
  /// or at odds with shape and dtype, a duplicate name.
  static SafetensorsFile open(const std::string& path);
  /// Parses bytes that the caller keeps alive; `name` stands for the path in messages.
  static SafetensorsFile parse(std::span<const std::byte> bytes, const std::string& name);

  const std::string& name() const { return name_; }
  /// Ascending.
  std::vector<std::string> names() const;
  /// nullptr when there is no such tensor.
  const TensorView* find(std::string_view tensor) const;
  /// Throws Error when it is missing.
  const TensorView& tensor(std::string_view tensor) const;
  const SafetensorsMetadata& metadata() const { return metadata_; }

 private:
  std::string name_;
  std::shared_ptr<void> mapping_;
  std::map<std::string, TensorView, std::less<>> tensors_;
  SafetensorsMetadata metadata_;
  // Tensors that stand at an address their elements cannot be read from are copied here.
  std::vector<std::shared_ptr<std::byte[]>> realigned_;
};

/// Writes the tensors (any strides) as one file that appears only when it is complete. Wider
/// elements go first so that all are aligned; otherwise the given order is kept. Throws Error, with
/// nothing written, for a duplicate or reserved name, text that is not UTF-8, or a failing write.
void write_safetensors(const std::string& path, const std::vector<std::pair<std::string, TensorView>>& tensors,
                       const SafetensorsMetadata& metadata = {});

}  // namespace heed::model
