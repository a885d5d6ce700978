// Other programs beside heed: each runs in a process of its own and is asked for one run at a time, so that ours and
// theirs alternate and whatever disturbs the machine disturbs both.
#pragma once

#include <algorithm>
#include <cstddef>
#include <span>
#include <string>
#include <vector>

#include "cli/options.h"

namespace heed::cli {

/// `--against PEER` of a command, which may be repeated; `peers`: the names it knows.
void add_against(CLI::App& command, std::vector<std::string>& chosen, std::vector<std::string> peers);

/// A script of scripts/peers (share/heed/peers when installed), run by the project's own Python: HEED_PYTHON, else
/// .venv/bin/python beside the sources, else python3. scripts/peers/peer.py says what is spoken.
class Peer {
 public:
  /// Starts it and hands over `setup`, then the bytes of the tensors that the setup names. name: as in --against, up to
  /// a colon the program. Throws Error where Python, the script or a package is missing, saying how to install it.
  Peer(std::string name, const std::string& script, const Json& setup,
       const std::vector<std::span<const std::byte>>& tensors = {});
  ~Peer();
  Peer(const Peer&) = delete;
  Peer& operator=(const Peer&) = delete;

  const std::string& name() const { return name_; }
  const std::string& version() const { return version_; }
  /// "torch 2.13.0".
  std::string title() const { return name_ + " " + version_; }

  /// One request and its answer. Throws Error when the peer fails, with what it says or the last line it wrote.
  Json ask(const Json& request, std::span<const std::byte> tensor = {});
  /// One timed run: its wall seconds by the peer's own clock. Waits until the peer's threads have gone to sleep.
  double run(const Json& request);

 private:
  void stop() noexcept;
  void send(const void* data, size_t count);
  std::string receive();
  [[noreturn]] void died();

  std::string name_, version_, python_, pending_;
  int socket_ = -1, log_ = -1;
  int process_ = -1;
};

/// The seconds of several runs.
class Runs {
 public:
  void add(double seconds) { seconds_.insert(std::upper_bound(seconds_.begin(), seconds_.end(), seconds), seconds); }
  bool empty() const { return seconds_.empty(); }
  double best() const { return seconds_.front(); }
  double median() const { return seconds_[seconds_.size() / 2]; }

 private:
  std::vector<double> seconds_;  // ascending
};

}  // namespace heed::cli
