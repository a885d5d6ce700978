// Pictures of plans as PNG images.
#pragma once

#include <string>

#include "heed/exec/picture.h"

namespace heed::cli {

struct PngStyle {
  Index margin = 0;     // light pixels around the picture
  Index least = 0;  // a smaller picture has every pixel drawn as a square, so that its longer side comes near this
};

/// The bytes of a PNG file: queries from top to bottom, keys from left to right. The more of a
/// cell's pairs are attended, the deeper its colour; grey is what causality forbids.
std::string encode_png(const Picture& picture, const PngStyle& style);

}  // namespace heed::cli
