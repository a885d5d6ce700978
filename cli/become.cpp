#include "cli/become.h"

#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <filesystem>

#include "heed/base/error.h"

namespace heed::cli {

void become_torch(const std::string& what, char** argv) {
  const std::filesystem::path path = std::filesystem::read_symlink("/proc/self/exe").replace_filename("heed-torch");
  // torch's OpenMP threads would spin between its loops on the cores that heed's own threads need.
  ::setenv("OMP_WAIT_POLICY", "passive", 0);
  ::execv(path.c_str(), argv);
  if (errno == ENOENT)
    fail("{}: this heed was built without libtorch, expected one built with it, as make python does", what);
  fail("{}: cannot be run: {}", path.string(), std::strerror(errno));
}

}  // namespace heed::cli
