#pragma once

#include <fcntl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <csignal>
#include <filesystem>
#include <stdexcept>

namespace flashpack::testing {

/// Holds a write lease on `path` until somebody opens it, in a process of its own.
class LeaseHolder {
 public:
  explicit LeaseHolder(const std::filesystem::path& path) {
    std::array<int, 2> ends{};
    if (::pipe2(ends.data(), O_CLOEXEC) != 0) throw std::runtime_error("pipe");
    child_ = ::fork();
    if (child_ == 0) ::_exit(hold(path, ends[1]));
    ::close(ends[1]);
    char byte = 0;
    holds_ = ::read(ends[0], &byte, 1) == 1;
    ::close(ends[0]);
  }
  ~LeaseHolder() { ::waitpid(child_, nullptr, 0); }
  LeaseHolder(const LeaseHolder&) = delete;
  LeaseHolder& operator=(const LeaseHolder&) = delete;

  bool holds() const { return holds_; }

 private:
  static int hold(const std::filesystem::path& path, int ready) {
    sigset_t wanted;
    ::sigemptyset(&wanted);
    ::sigaddset(&wanted, SIGIO);
    ::sigprocmask(SIG_BLOCK, &wanted, nullptr);
    const int fd = ::open(path.c_str(), O_RDWR | O_CLOEXEC);
    if (::fcntl(fd, F_SETLEASE, F_WRLCK) != 0 || ::write(ready, "", 1) != 1) return 1;
    int signal = 0;
    ::sigwait(&wanted, &signal);
    return ::fcntl(fd, F_SETLEASE, F_UNLCK);
  }

  pid_t child_ = -1;
  bool holds_ = false;
};

}  // namespace flashpack::testing
