// Language models from GGUF files, and back into them.
#pragma once

#include <memory>
#include <optional>
#include <string>

#include "heed/model/calibration.h"
#include "heed/model/gguf_write.h"
#include "heed/nn/language_model.h"

namespace heed::nn {

/// "blk.3.attn.q" → "blk.3.attn_q.weight", "output_norm" → "output_norm.weight".
std::string gguf_name(const std::string& parameter);

/// The model of a file, its weights widened to f32; mixers replace the attention of the layers that have no sliding
/// window of their own (see mixers_of). What mechanisms learn begins anew, a landmark as the mean of all embeddings.
/// Throws as Model::load does for files that it refuses, UsageError as mixers_of and for gated-attention, as a gate
/// must be there from the start.
std::shared_ptr<LanguageModel> read_model(const model::Gguf& file, const std::vector<std::string>& mixers,
                                          const LayerOptions& options = {});

/// Writes a file that `heed run` loads: weights in f32, `vocabulary`, and the mixers of all layers for the record
/// (heed.mechanisms). What mechanisms learned has no place in such a file: calibration_of() says it. Throws Error when
/// the file cannot be written, and for layers that `heed run` could not compute alike (why_not_exported).
void write_model(const std::string& path, const LanguageModel& model, const model::Vocabulary& vocabulary,
                 const std::string& chat_template = "");

/// What the model's mechanisms learned, as `heed run --calibration` takes it; nullopt when they learned nothing. Throws
/// Error when two different mechanisms learned something: such a file is one mechanism's.
std::optional<model::Calibration> calibration_of(const LanguageModel& model);

}  // namespace heed::nn
