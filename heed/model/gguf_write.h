// Writing GGUF model files: the inverse of heed/model/gguf.h.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "heed/model/gguf.h"
#include "heed/model/model.h"

namespace heed::model {

using GgufMetadata = std::map<std::string, MetaValue, std::less<>>;

/// Writes a version 3 file that appears only when it is complete. Metadata in the order of its keys, each number in
/// 32 bits where they hold it exactly, else in 64; arrays of integers read from booleans stay integers. Tensors in the
/// order given, each with shape, format and bytes (rows · row_bytes). The alignment is 32, so general.alignment may
/// not be among the metadata. Throws Error, with nothing written, for that key, an empty or duplicate name, 0 or more
/// than 4 axes, and bytes that do not fit shape and format; and for a failing write.
void write_gguf(const std::string& path, const GgufMetadata& metadata, const std::vector<GgufTensor>& tensors);

/// The metadata that such a model has beside its vocabulary's: what read_info() reads back as `info`.
GgufMetadata metadata_of(const ModelInfo& info);
/// tokenizer.ggml.*: what Vocabulary::from() reads back as `vocabulary`.
GgufMetadata metadata_of(const Vocabulary& vocabulary);

}  // namespace heed::model
