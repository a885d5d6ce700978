// Files: mapped for reading, and written so that a failure leaves nothing behind.
#pragma once

#include <cstddef>
#include <memory>
#include <span>
#include <string>
#include <string_view>

#include "heed/base/types.h"

namespace heed {

/// A read-only mapping of a whole regular file. Copies share it; the bytes live as long as one of
/// them. Shrinking the file in the meantime is the caller's to prevent.
class MappedFile {
 public:
  MappedFile() = default;
  /// Throws Error naming the path: missing, not readable, not a regular file. An empty file gives
  /// an empty span.
  static MappedFile open(const std::string& path);
  std::span<const std::byte> bytes() const { return bytes_; }

 private:
  std::shared_ptr<void> mapping_;
  std::span<const std::byte> bytes_;
};

/// The whole of a file, or of standard input for "-". Throws Error naming the path.
std::string read_file(const std::string& path);

/// A file that appears under its name only when it is complete: bytes go to a temporary file beside
/// it, which commit() renames and the destructor otherwise removes. A link is followed, an existing
/// file keeps its permissions; devices and pipes are written directly. A full disk, a quota or a
/// file-size limit is an Error, never a signal.
class AtomicFile {
 public:
  /// Throws Error when the file cannot be created or replaced.
  explicit AtomicFile(const std::string& path);
  ~AtomicFile();
  AtomicFile(const AtomicFile&) = delete;
  AtomicFile& operator=(const AtomicFile&) = delete;

  /// Appends; unbuffered, so hand over large pieces.
  void write(const void* data, size_t count);
  /// Closes the file and gives it its name. Nothing may be written after.
  void commit();

 private:
  void discard() noexcept;
  std::string path_;       // as given, for messages
  std::string target_;     // with links resolved
  std::string temporary_;  // empty: written directly
  int descriptor_ = -1;
};

/// Writes `content` as the whole of `path`, atomically.
void write_file(const std::string& path, std::string_view content);

}  // namespace heed
