#include "cli/peer.h"

#include <fmt/format.h>
#include <spawn.h>
#include <stdio.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <thread>
#include <utility>

#include "heed/base/error.h"

extern char** environ;

namespace heed::cli {
namespace {

namespace fs = std::filesystem;

struct Places {
  fs::path scripts, python;
};

// Beside the sources that the command was built from (build/bin/heed), or where it is installed (bin/heed).
Places places() {
  std::error_code ignored;
  const fs::path bin = fs::read_symlink("/proc/self/exe", ignored).parent_path();
  const fs::path sources = bin.parent_path().parent_path();
  Places p;
  if (fs::exists(sources / "scripts/peers/peer.py", ignored))
    p = {sources / "scripts/peers", sources / ".venv/bin/python"};
  else p = {bin.parent_path() / "share/heed/peers", "python3"};
  const char* python = std::getenv("HEED_PYTHON");
  if (python != nullptr && *python != 0) p.python = python;
  return p;
}

constexpr const char* remedy = "scripts/deps.sh peers installs it";

}  // namespace

void add_against(CLI::App& command, std::vector<std::string>& chosen, std::vector<std::string> peers) {
  const std::string text =
      fmt::format("Another program's figure beside heed's, run by run: {}; may be repeated", fmt::join(peers, ", "));
  command.add_option("--against", chosen, text)
      ->check(one_of(std::move(peers)))
      ->type_name("PEER")
      ->allow_extra_args(false)
      ->take_all();
}

Peer::Peer(std::string name, const std::string& script, const Json& setup,
           const std::vector<std::span<const std::byte>>& tensors)
    : name_(std::move(name)) {
  const Places place = places();
  const std::string path = (place.scripts / (script + ".py")).string();
  python_ = place.python.string();
  if (!fs::exists(path)) fail("--against {}: {} is missing, expected it with heed", name_, path);

  // One socket is the peer's input and output: writing to one that has gone is an error there, where a pipe would
  // send a signal.
  int ends[2];
  if (::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) != 0)
    fail("--against {}: no socket: {}", name_, std::strerror(errno));
  socket_ = ends[0];
  std::FILE* log = std::tmpfile();
  if (log != nullptr) log_ = ::dup(::fileno(log)), std::fclose(log);

  posix_spawn_file_actions_t actions;
  posix_spawn_file_actions_init(&actions);
  posix_spawn_file_actions_adddup2(&actions, ends[1], STDIN_FILENO);
  posix_spawn_file_actions_adddup2(&actions, ends[1], STDOUT_FILENO);
  if (log_ >= 0) posix_spawn_file_actions_adddup2(&actions, log_, STDERR_FILENO);
  std::string bare = "-B", file = path;  // no compiled copies beside the scripts
  char* argv[] = {python_.data(), bare.data(), file.data(), nullptr};
  const int failure = ::posix_spawnp(&process_, python_.c_str(), &actions, nullptr, argv, environ);
  posix_spawn_file_actions_destroy(&actions);
  ::close(ends[1]);
  try {
    if (failure != 0) {
      process_ = -1;
      fail("--against {}: {}: {}; {}, HEED_PYTHON names another", name_, python_, std::strerror(failure), remedy);
    }
    const std::string line = setup.dump() + "\n";
    send(line.data(), line.size());
    for (const auto& bytes : tensors) send(bytes.data(), bytes.size());
    const std::string answer = receive();
    version_ = Json::parse(answer).at("version").get<std::string>();
  } catch (...) {
    stop();
    throw;
  }
}

Peer::~Peer() { stop(); }

void Peer::stop() noexcept {
  if (socket_ >= 0) ::close(std::exchange(socket_, -1));
  if (log_ >= 0) ::close(std::exchange(log_, -1));
  if (process_ < 0) return;
  // Its input has ended, so it ends; whatever hangs all the same is ended.
  for (int i = 0; i < 500; ++i) {
    if (::waitpid(process_, nullptr, WNOHANG) != 0) return void(process_ = -1);
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
  }
  ::kill(process_, SIGKILL);
  ::waitpid(std::exchange(process_, -1), nullptr, 0);
}

void Peer::send(const void* data, size_t count) {
  const auto* p = static_cast<const char*>(data);
  while (count > 0) {
    const ssize_t n = ::send(socket_, p, count, MSG_NOSIGNAL);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) return;  // it has gone: receive() tells why, as it may have said so before
    p += n, count -= static_cast<size_t>(n);
  }
}

std::string Peer::receive() {
  size_t end;
  while ((end = pending_.find('\n')) == std::string::npos) {
    char buffer[1 << 16];
    const ssize_t n = ::recv(socket_, buffer, sizeof buffer, 0);
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) died();
    pending_.append(buffer, static_cast<size_t>(n));
  }
  const std::string line = pending_.substr(0, end);
  pending_.erase(0, end + 1);
  const Json answer = Json::parse(line, nullptr, false);
  if (answer.is_discarded()) fail("--against {}: answered {}, expected JSON", name_, line);
  if (answer.contains("missing"))
    fail("--against {}: the package {} is missing from {}; {}", name_, answer["missing"].get<std::string>(), python_,
         remedy);
  if (answer.contains("error")) fail("--against {}: {}", name_, answer["error"].get<std::string>());
  return line;
}

void Peer::died() {
  int status = 0;
  ::waitpid(std::exchange(process_, -1), &status, 0);
  std::string said;
  char buffer[2000];
  const off_t length = log_ < 0 ? 0 : ::lseek(log_, 0, SEEK_END);
  const off_t from = std::max<off_t>(0, length - static_cast<off_t>(sizeof buffer));
  const ssize_t n = log_ < 0 ? 0 : ::pread(log_, buffer, sizeof buffer, from);
  if (n > 0) said.assign(buffer, static_cast<size_t>(n));
  while (!said.empty() && said.back() == '\n') said.pop_back();
  said.erase(0, said.rfind('\n') + 1);
  fail("--against {}: {} {}{}{}", name_, WIFSIGNALED(status) ? "ended by signal" : "ended early with exit code",
       WIFSIGNALED(status) ? WTERMSIG(status) : WEXITSTATUS(status), said.empty() ? "" : ": ", said);
}

Json Peer::ask(const Json& request, std::span<const std::byte> tensor) {
  const std::string line = request.dump() + "\n";
  send(line.data(), line.size());
  if (!tensor.empty()) send(tensor.data(), tensor.size());
  return Json::parse(receive());
}

double Peer::run(const Json& request) {
  const double seconds = ask(request).at("seconds").get<double>();
  // OpenMP's threads spin some milliseconds after their work, and would take that time from what we run next.
  std::this_thread::sleep_for(std::chrono::milliseconds(20));
  return seconds;
}

}  // namespace heed::cli
