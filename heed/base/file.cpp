#include "heed/base/file.h"

#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdlib>
#include <system_error>
#include <utility>

#include "heed/base/error.h"

namespace heed {
namespace {

std::string reason(int error) { return std::generic_category().message(error); }

// Closes a descriptor when a read fails.
class Descriptor {
 public:
  explicit Descriptor(int number) : number_(number) {}
  ~Descriptor() {
    if (number_ >= 0) ::close(number_);
  }
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;
  int number() const { return number_; }

 private:
  int number_;
};

// O_NONBLOCK only keeps open() from waiting for a pipe's other end before its kind is known.
int open_to_read(const std::string& path, int flags) {
  const int descriptor = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | flags);
  if (descriptor < 0) fail("{}: cannot be read: {}", path, reason(errno));
  return descriptor;
}

// Holds back the signal that a file-size limit raises in the writing thread, so that write() returns
// EFBIG instead; one that came meanwhile is taken off before the mask is restored.
class HoldSizeSignal {
 public:
  HoldSizeSignal() {
    sigset_t pending;
    sigemptyset(&pending);
    sigpending(&pending);
    was_pending_ = sigismember(&pending, SIGXFSZ) == 1;
    sigemptyset(&signal_);
    sigaddset(&signal_, SIGXFSZ);
    pthread_sigmask(SIG_BLOCK, &signal_, &before_);
  }
  ~HoldSizeSignal() {
    sigset_t pending;
    sigemptyset(&pending);
    sigpending(&pending);
    int taken = 0;
    if (!was_pending_ && sigismember(&pending, SIGXFSZ) == 1) sigwait(&signal_, &taken);
    pthread_sigmask(SIG_SETMASK, &before_, nullptr);
  }
  HoldSizeSignal(const HoldSizeSignal&) = delete;
  HoldSizeSignal& operator=(const HoldSizeSignal&) = delete;

 private:
  sigset_t signal_, before_;
  bool was_pending_ = false;
};

std::string resolve(const std::string& path) {
  char* resolved = ::realpath(path.c_str(), nullptr);
  if (resolved == nullptr) return path;
  std::string target = resolved;
  std::free(resolved);
  return target;
}

}  // namespace

MappedFile MappedFile::open(const std::string& path) {
  const Descriptor file(open_to_read(path, O_NONBLOCK));
  struct stat status;
  if (::fstat(file.number(), &status) != 0) fail("{}: cannot be read: {}", path, reason(errno));
  if (!S_ISREG(status.st_mode)) fail("{}: not a regular file", path);
  MappedFile mapped;
  const auto count = static_cast<size_t>(status.st_size);
  if (count == 0) return mapped;
  void* start = ::mmap(nullptr, count, PROT_READ, MAP_PRIVATE, file.number(), 0);
  if (start == MAP_FAILED) fail("{}: cannot be mapped: {}", path, reason(errno));
  mapped.mapping_ = std::shared_ptr<void>(start, [count](void* p) { ::munmap(p, count); });
  mapped.bytes_ = {static_cast<const std::byte*>(start), count};
  return mapped;
}

std::string read_file(const std::string& path) {
  const bool standard = path == "-";
  const Descriptor file(standard ? -1 : open_to_read(path, 0));
  const int descriptor = standard ? STDIN_FILENO : file.number();
  std::string content;
  size_t held = 0;
  for (;;) {
    if (content.size() == held) content.resize(std::max<size_t>(1 << 16, 2 * held));
    const ssize_t n = ::read(descriptor, content.data() + held, content.size() - held);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) fail("{}: cannot be read: {}", standard ? "standard input" : path, reason(errno));
    if (n == 0) break;
    held += static_cast<size_t>(n);
  }
  content.resize(held);
  return content;
}

AtomicFile::AtomicFile(const std::string& path) : path_(path), target_(resolve(path)) {
  struct stat status;
  const bool exists = ::stat(target_.c_str(), &status) == 0;
  if (exists && S_ISDIR(status.st_mode)) fail("{}: cannot be written: {}", path_, reason(EISDIR));
  // The rename would succeed on a file that its owner has made read-only.
  if (exists && ::access(target_.c_str(), W_OK) != 0) fail("{}: cannot be written: {}", path_, reason(errno));
  if (exists && !S_ISREG(status.st_mode)) {
    descriptor_ = ::open(target_.c_str(), O_WRONLY | O_CLOEXEC);
    if (descriptor_ < 0) fail("{}: cannot be written: {}", path_, reason(errno));
    return;
  }
  static std::atomic<unsigned> serial{0};
  int error = EEXIST;
  for (int attempt = 0; descriptor_ < 0 && error == EEXIST && attempt < 100; ++attempt) {
    temporary_ = fmt::format("{}.{}-{}.part", target_, ::getpid(), serial++);
    descriptor_ = ::open(temporary_.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
    error = errno;
  }
  if (descriptor_ < 0) {
    temporary_.clear();
    fail("{}: cannot be written: {}", path_, reason(error));
  }
  // Best effort: a file system without permissions refuses.
  if (exists && ::fchmod(descriptor_, status.st_mode & 07777) != 0) errno = 0;
}

AtomicFile::~AtomicFile() { discard(); }

void AtomicFile::discard() noexcept {
  if (descriptor_ >= 0) ::close(descriptor_);
  descriptor_ = -1;
  if (!temporary_.empty()) ::unlink(temporary_.c_str());
  temporary_.clear();
}

void AtomicFile::write(const void* data, size_t count) {
  // Linux writes at most 2^31 bytes at once anyway.
  constexpr size_t most = size_t{1} << 30;
  const HoldSizeSignal hold;
  const char* p = static_cast<const char*>(data);
  while (count > 0) {
    const ssize_t n = ::write(descriptor_, p, std::min(count, most));
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) {
      const int error = n < 0 ? errno : ENOSPC;
      discard();
      fail("{}: cannot be written: {}", path_, reason(error));
    }
    p += n;
    count -= static_cast<size_t>(n);
  }
}

void AtomicFile::commit() {
  const int descriptor = std::exchange(descriptor_, -1);
  if (::close(descriptor) != 0 || (!temporary_.empty() && ::rename(temporary_.c_str(), target_.c_str()) != 0)) {
    const int error = errno;
    discard();
    fail("{}: cannot be written: {}", path_, reason(error));
  }
  temporary_.clear();
}

void write_file(const std::string& path, std::string_view content) {
  AtomicFile file(path);
  file.write(content.data(), content.size());
  file.commit();
}

}  // namespace heed
