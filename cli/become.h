// The other program beside this one, for what needs libtorch: loading that would cost every command its start.
#pragma once

#include <string>

namespace heed::cli {

/// Becomes heed-torch, with the same arguments. Throws Error, naming `what` was asked for, where this heed was built
/// without it, or when it cannot be run.
[[noreturn]] void become_torch(const std::string& what, char** argv);

}  // namespace heed::cli
