#pragma once

#include <fcntl.h>
#include <poll.h>
#include <sys/mount.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <filesystem>
#include <map>
#include <string>
#include <string_view>

#include "tests/support/hang.h"

namespace flashpack::testing {

/// The program hanging_fs, with its file system at `at`: files in memory, whose requests hang while the test wants it.
/// The operations are those of FUSE: lookup, getattr (stat and fstat), setattr, open, create, read, write, fallocate,
/// flush (each close), release (the last one; the kernel does not wait for it), fsync, unlink and rename (by the new
/// name). Thread safety: one thread.
class HangingFs {
 public:
  HangingFs(const char* program, const std::filesystem::path& at) : at_(at) {
    std::filesystem::create_directories(at);
    std::array<int, 2> ends{};
    if (::socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends.data()) != 0) return;
    control_fd_ = ends[0];
    child_ = ::fork();
    if (child_ == 0) {
      ::fcntl(ends[1], F_SETFD, 0);
      ::execl(program, program, std::to_string(ends[1]).c_str(), at.c_str(), nullptr);
      ::_exit(127);
    }
    ::close(ends[1]);
    mounted_ = heard() == "mounted";
  }
  /// What still hangs then fails.
  ~HangingFs() {
    ::close(control_fd_);
    if (child_ > 0) ::waitpid(child_, nullptr, 0);
    if (mounted_) ::umount2(at_.c_str(), MNT_DETACH);
  }
  HangingFs(const HangingFs&) = delete;
  HangingFs& operator=(const HangingFs&) = delete;

  bool mounted() const { return mounted_; }
  std::filesystem::path operator/(const std::string& name) const { return at_ / name; }

  /// From now on each `op` of file `name` hangs, or of every file for which it has not been said: "*".
  void hold(const std::string& op, const std::string& name) { command("hold " + op + " " + name); }
  /// Answers those that hang, and all that come later.
  void release(const std::string& op, const std::string& name) { command("release " + op + " " + name); }
  void release() { command("release"); }

  /// Waits until `count` more of them hang. False when it takes longer than kHang, or the program has ended.
  bool wait_until_held(const std::string& op, const std::string& name, unsigned count = 1) {
    unsigned& held = held_[op + " " + name];
    while (held < count) {
      if (!note(heard())) return false;
    }
    held -= count;
    return true;
  }

 private:
  void command(const std::string& text) {
    ::send(control_fd_, text.data(), text.size(), MSG_NOSIGNAL);
    for (std::string answer = heard(); note(answer); answer = heard()) {
    }
  }

  // Whether it says that something hangs.
  bool note(const std::string& text) {
    constexpr std::string_view kHeld = "held ";
    if (!text.starts_with(kHeld)) return false;
    ++held_[text.substr(kHeld.size())];
    return true;
  }

  // Empty when it says nothing any more.
  std::string heard() {
    pollfd control{.fd = control_fd_, .events = POLLIN, .revents = 0};
    if (::poll(&control, 1, std::chrono::milliseconds(kHang).count()) <= 0) return {};
    std::array<char, 512> text{};
    const auto size = ::recv(control_fd_, text.data(), text.size(), 0);
    return {text.data(), size > 0 ? static_cast<std::size_t>(size) : 0};
  }

  std::filesystem::path at_;
  pid_t child_ = -1;
  int control_fd_ = -1;
  bool mounted_ = false;
  std::map<std::string, unsigned> held_;  // Heard of and not waited for yet, by "op name".
};

}  // namespace flashpack::testing
