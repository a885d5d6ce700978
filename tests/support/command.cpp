#include "support/command.h"

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <stdexcept>

namespace heed::test {
namespace {

struct Pipe {
  int read = -1, write = -1;
  Pipe() {
    int ends[2];
    if (::pipe2(ends, O_CLOEXEC) != 0) throw std::runtime_error("no pipe");
    read = ends[0], write = ends[1];
  }
  ~Pipe() { close_read(), close_write(); }
  Pipe(const Pipe&) = delete;
  Pipe& operator=(const Pipe&) = delete;
  void close_read() { close(read); }
  void close_write() { close(write); }

 private:
  static void close(int& end) {
    if (end >= 0) ::close(end);
    end = -1;
  }
};

[[noreturn]] void become_heed(const std::vector<std::string>& arguments, const CommandOptions& options, int in, int out,
                              int err) {
  ::dup2(in, 0), ::dup2(out, 1), ::dup2(err, 2);
  for (const char* name : {"HEED_ISA", "NO_COLOR"}) ::unsetenv(name);
  ::setenv("HEED_THREADS", "1", 1);  // small models, and other tests run beside this one
  for (const std::string& setting : options.environment) ::putenv(const_cast<char*>(setting.c_str()));
  if (options.file_limit >= 0) {
    const rlimit limit{static_cast<rlim_t>(options.file_limit), static_cast<rlim_t>(options.file_limit)};
    ::setrlimit(RLIMIT_FSIZE, &limit);
  }
  std::vector<char*> argv{const_cast<char*>("heed")};
  for (const std::string& argument : arguments) argv.push_back(const_cast<char*>(argument.c_str()));
  argv.push_back(nullptr);
  ::execv(HEED_COMMAND, argv.data());
  ::_exit(127);
}

// Reads both ends until they are closed.
void collect(Pipe& out, Pipe& err, pid_t process, const CommandOptions& options, Finished& finished) {
  bool waiting = options.interrupt_with != 0;
  std::array<pollfd, 2> ends{{{out.read, POLLIN, 0}, {err.read, POLLIN, 0}}};
  std::array<std::string*, 2> texts{&finished.out, &finished.err};
  while (ends[0].fd >= 0 || ends[1].fd >= 0) {
    ::poll(ends.data(), ends.size(), waiting ? 5 : -1);
    for (size_t i = 0; i < ends.size(); ++i) {
      if (ends[i].fd < 0 || ends[i].revents == 0) continue;
      std::array<char, 4096> buffer;
      const ssize_t n = ::read(ends[i].fd, buffer.data(), buffer.size());
      if (n > 0) texts[i]->append(buffer.data(), static_cast<size_t>(n));
      else ends[i].fd = -1;
    }
    if (waiting && options.interrupt_when(finished.out)) {
      ::kill(process, options.interrupt_with);
      waiting = false;
    }
  }
}

}  // namespace

Finished heed_command(const std::vector<std::string>& arguments, const CommandOptions& options) {
  Pipe in, out, err;
  // A command that does not read its input must not end the test.
  struct sigaction ignore{}, before{};
  ignore.sa_handler = SIG_IGN;
  ::sigaction(SIGPIPE, &ignore, &before);
  const pid_t process = ::fork();
  if (process == 0) {
    ::signal(SIGPIPE, SIG_DFL);
    if (options.closed_output) out.close_read();
    become_heed(arguments, options, in.read, out.write, err.write);
  }
  in.close_read(), out.close_write(), err.close_write();
  if (options.closed_output) out.close_read();
  if (!options.in.empty() && ::write(in.write, options.in.data(), options.in.size()) < 0) in.close_write();
  in.close_write();

  Finished finished;
  collect(out, err, process, options, finished);
  int status = 0;
  ::waitpid(process, &status, 0);
  ::sigaction(SIGPIPE, &before, nullptr);
  if (WIFEXITED(status)) finished.code = WEXITSTATUS(status);
  else finished.signal = WTERMSIG(status);
  return finished;
}

}  // namespace heed::test
