#include "cli/png.h"

#include <png.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <vector>

#include "heed/base/error.h"

namespace heed::cli {
namespace {

struct Rgb {
  double r, g, b;
};

// Indices of the palette; from `ramp` on it goes from "hardly anything" to "everything".
constexpr int paper = 0, forbidden = 1, frame = 2, skipped = 3, ramp = 4, entries = 256;

std::array<std::uint8_t, entries * 3> make_palette() {
  std::array<std::uint8_t, entries * 3> bytes{};
  const auto set = [&](int entry, Rgb c) {
    size_t at = static_cast<size_t>(entry) * 3;
    for (double channel : {c.r, c.g, c.b}) bytes[at++] = static_cast<std::uint8_t>(std::lround(channel));
  };
  set(paper, {255, 255, 255});
  set(forbidden, {233, 234, 238});
  set(frame, {188, 192, 202});
  set(skipped, {252, 252, 250});
  // Sand, rose, violet, ink: lightness falls all the way, so the order shows in grey as well.
  const std::array<Rgb, 4> stops{{{248, 221, 190}, {228, 128, 116}, {140, 52, 122}, {36, 18, 84}}};
  for (int i = ramp; i < entries; ++i) {
    const double t = static_cast<double>(i - ramp) / (entries - 1 - ramp) * (stops.size() - 1);
    const auto k = std::min(static_cast<size_t>(t), stops.size() - 2);
    const double f = t - static_cast<double>(k);
    const Rgb &a = stops[k], &b = stops[k + 1];
    set(i, {a.r + f * (b.r - a.r), a.g + f * (b.g - a.g), a.b + f * (b.b - a.b)});
  }
  return bytes;
}

std::uint8_t entry_of(float share) {
  if (std::isnan(share)) return forbidden;
  if (share <= 0) return skipped;
  // A root, so that a few sink columns in a cell of many keys are not lost to the eye.
  const double t = std::sqrt(static_cast<double>(std::min(share, 1.0f)));
  return static_cast<std::uint8_t>(ramp + std::lround(t * (entries - 1 - ramp)));
}

}  // namespace

std::string encode_png(const Picture& picture, const PngStyle& style) {
  const Index zoom = std::max<Index>(1, style.least / std::max(picture.width, picture.height));
  const Index border = style.margin > 0 ? 1 : 0, edge = style.margin + border;
  const Index width = picture.width * zoom + 2 * edge, height = picture.height * zoom + 2 * edge;
  std::vector<std::uint8_t> pixels(static_cast<size_t>(width * height), paper);
  for (Index y = style.margin; y < height - style.margin; ++y)
    std::fill_n(pixels.begin() + y * width + style.margin, width - 2 * style.margin, static_cast<std::uint8_t>(frame));
  for (Index y = 0; y < picture.height * zoom; ++y)
    for (Index x = 0; x < picture.width * zoom; ++x)
      pixels[static_cast<size_t>((y + edge) * width + x + edge)] =
          entry_of(picture.share[static_cast<size_t>(y / zoom * picture.width + x / zoom)]);

  const auto palette = make_palette();
  png_image image{};
  image.version = PNG_IMAGE_VERSION;
  image.width = static_cast<png_uint_32>(width), image.height = static_cast<png_uint_32>(height);
  image.format = PNG_FORMAT_RGB_COLORMAP;
  image.colormap_entries = entries;
  png_alloc_size_t count = 0;
  const auto write = [&](void* memory) {
    if (png_image_write_to_memory(&image, memory, &count, 0, pixels.data(), 0, palette.data()) == 0)
      fail("picture: {} x {} pixels cannot be made a PNG: {}", width, height, image.message);
  };
  write(nullptr);
  std::string bytes(count, '\0');
  write(bytes.data());
  bytes.resize(count);
  return bytes;
}

}  // namespace heed::cli
