// Ctrl-C and its kin.
#pragma once

namespace heed::cli {

/// Ctrl-C, SIGTERM and SIGHUP end the command with 128 + the signal's number: at once, or when a
/// job that holds them back has tidied up. A closed pipe ends it silently; a file-size limit makes
/// writes fail instead of killing.
void install_signal_handlers();

/// The signal that asked this command to end, or 0.
int interrupted();

/// While one lives, a first signal only sets interrupted(): the job looks at it, and leaves no half
/// file. A second one ends the command all the same.
class HoldInterrupts {
 public:
  HoldInterrupts();
  ~HoldInterrupts();
  HoldInterrupts(const HoldInterrupts&) = delete;
  HoldInterrupts& operator=(const HoldInterrupts&) = delete;
};

/// Ends the command when a signal was held back; call it where everything is tidy.
void stop_if_interrupted();

}  // namespace heed::cli
