#include "cli/interrupt.h"

#include <signal.h>
#include <unistd.h>

#include "heed/model/model.h"

namespace heed::cli {
namespace {

volatile sig_atomic_t signal_seen = 0, holds = 0;

// Only what is allowed inside a signal handler.
void on_signal(int number) {
  if (holds > 0 && signal_seen == 0) {
    signal_seen = number;
    return;
  }
  constexpr char message[] = "heed: interrupted\n";
  [[maybe_unused]] const auto ignored = ::write(STDERR_FILENO, message, sizeof message - 1);
  ::_exit(128 + number);
}

void handle(int number, void (*handler)(int)) {
  struct sigaction action{};
  action.sa_handler = handler;
  sigemptyset(&action.sa_mask);
  action.sa_flags = SA_RESTART;
  sigaction(number, &action, nullptr);
}

}  // namespace

void install_signal_handlers() {
  for (int number : {SIGINT, SIGTERM, SIGHUP}) {
    // Whoever started us in the background, or under nohup, had it ignored.
    struct sigaction before{};
    sigaction(number, nullptr, &before);
    if (before.sa_handler != SIG_IGN) handle(number, on_signal);
  }
  handle(SIGPIPE, SIG_DFL);
  handle(SIGXFSZ, SIG_IGN);
}

int interrupted() { return signal_seen; }

HoldInterrupts::HoldInterrupts() { holds = holds + 1; }
HoldInterrupts::~HoldInterrupts() { holds = holds - 1; }

void stop_if_interrupted() {
  if (signal_seen != 0) throw model::Interrupted{};
}

}  // namespace heed::cli
