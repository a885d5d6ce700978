// Reading files, and writing them so that a failure leaves nothing behind.
#include <doctest/doctest.h>

#include <signal.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <string>
#include <vector>

#include "heed/base/error.h"
#include "heed/base/file.h"
#include "heed/base/text.h"
#include "support/folder.h"

using heed::AtomicFile;
using heed::Error;
using heed::MappedFile;
using heed::test::Folder;

namespace {

std::string mapped_text(const std::string& path) {
  const MappedFile file = MappedFile::open(path);
  return {reinterpret_cast<const char*>(file.bytes().data()), file.bytes().size()};
}

}  // namespace

TEST_CASE("a written file comes back, mapped and read") {
  const Folder folder;
  const std::string path = folder / "a", text(300000, 'x');
  heed::write_file(path, text);
  CHECK(mapped_text(path) == text);
  CHECK(heed::read_file(path) == text);
  heed::write_file(path, "");
  CHECK(MappedFile::open(path).bytes().empty());
  CHECK(heed::read_file(path).empty());
  CHECK(folder.names() == std::vector<std::string>{"a"});
}

TEST_CASE("a mapping outlives the object that made it and the file's name") {
  const Folder folder;
  heed::write_file(folder / "a", "content");
  MappedFile copy;
  {
    const MappedFile first = MappedFile::open(folder / "a");
    copy = first;
  }
  heed::write_file(folder / "a", "other");
  CHECK(std::string(reinterpret_cast<const char*>(copy.bytes().data()), copy.bytes().size()) == "content");
}

TEST_CASE("what cannot be read is named") {
  const Folder folder;
  CHECK_THROWS_WITH_AS(MappedFile::open(folder / "no"),
                       (folder / "no: cannot be read: No such file or directory").c_str(), Error);
  CHECK_THROWS_WITH_AS(heed::read_file(folder / "no"),
                       (folder / "no: cannot be read: No such file or directory").c_str(), Error);
  CHECK_THROWS_WITH_AS(MappedFile::open(folder.path()), (folder.path() + ": not a regular file").c_str(), Error);
  REQUIRE(::mkfifo((folder / "pipe").c_str(), 0600) == 0);
  CHECK_THROWS_WITH_AS(MappedFile::open(folder / "pipe"), (folder / "pipe: not a regular file").c_str(), Error);
}

TEST_CASE("a file that is not committed does not appear, and an old one stays") {
  const Folder folder;
  {
    AtomicFile file(folder / "new");
    file.write("abc", 3);
  }
  CHECK(folder.names().empty());
  heed::write_file(folder / "old", "old");
  {
    AtomicFile file(folder / "old");
    file.write("new", 3);
    CHECK(heed::read_file(folder / "old") == "old");
  }
  CHECK(heed::read_file(folder / "old") == "old");
  CHECK(folder.names() == std::vector<std::string>{"old"});
}

TEST_CASE("a file-size limit is an error, not a signal, and leaves nothing behind") {
  const Folder folder;
  rlimit before{};
  REQUIRE(::getrlimit(RLIMIT_FSIZE, &before) == 0);
  rlimit small = before;
  small.rlim_cur = 10000;
  std::string message;
  REQUIRE(::setrlimit(RLIMIT_FSIZE, &small) == 0);
  try {
    heed::write_file(folder / "large", std::string(100000, 'x'));  // the first write is short, the next fails
  } catch (const Error& e) {
    message = e.what();
  }
  ::setrlimit(RLIMIT_FSIZE, &before);
  CHECK(message == folder / "large: cannot be written: File too large");
  CHECK(folder.names().empty());
  // The signal was taken off, and its mask is as it was.
  sigset_t pending, blocked;
  sigpending(&pending);
  pthread_sigmask(SIG_SETMASK, nullptr, &blocked);
  CHECK(sigismember(&pending, SIGXFSZ) == 0);
  CHECK(sigismember(&blocked, SIGXFSZ) == 0);
}

TEST_CASE("a full device is an error") {
  if (::access("/dev/full", W_OK) != 0) return;
  CHECK_THROWS_WITH_AS(heed::write_file("/dev/full", "x"), "/dev/full: cannot be written: No space left on device",
                       Error);
  struct stat status;
  REQUIRE(::stat("/dev/full", &status) == 0);
  CHECK(S_ISCHR(status.st_mode));
}

TEST_CASE("what cannot be written is named") {
  const Folder folder;
  CHECK_THROWS_WITH_AS(heed::write_file(folder / "no/a", "x"),
                       (folder / "no/a: cannot be written: No such file or directory").c_str(), Error);
  CHECK_THROWS_WITH_AS(heed::write_file(folder.path(), "x"),
                       (folder.path() + ": cannot be written: Is a directory").c_str(), Error);
}

TEST_CASE("links are followed and permissions kept") {
  const Folder folder;
  heed::write_file(folder / "real", "old");
  REQUIRE(::chmod((folder / "real").c_str(), 0640) == 0);
  REQUIRE(::symlink("real", (folder / "link").c_str()) == 0);
  heed::write_file(folder / "link", "new");
  struct stat status;
  REQUIRE(::lstat((folder / "link").c_str(), &status) == 0);
  CHECK(S_ISLNK(status.st_mode));
  CHECK(heed::read_file(folder / "real") == "new");
  REQUIRE(::stat((folder / "real").c_str(), &status) == 0);
  CHECK((status.st_mode & 0777) == 0640);
}

TEST_CASE("untrusted text fits into one line") {
  CHECK(heed::printable("plain – ü") == "plain – ü");
  CHECK(heed::printable(std::string_view("a\nb\0c\\\x7f", 7)) == "a\\x0ab\\x00c\\x5c\\x7f");
  CHECK(heed::printable("abcdef", 3) == "abc…");
}
