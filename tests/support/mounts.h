#pragma once

#include <fcntl.h>
#include <sys/mount.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <csignal>
#include <cstring>
#include <filesystem>
#include <string>

namespace flashpack::testing {

/// A file system mounted at `at` as long as this lives. Not mounted, with the reason, where that is not allowed.
class Mount {
 public:
  Mount(const std::string& type, const std::string& source, const std::filesystem::path& at, unsigned long flags,
        const std::string& options)
      : at_(at) {
    std::filesystem::create_directories(at);
    if (::mount(source.c_str(), at.c_str(), type.c_str(), flags, options.c_str()) != 0)
      refusal_ = "mount -t " + type + ": " + std::strerror(errno);
  }
  ~Mount() {
    if (refusal_.empty()) ::umount2(at_.c_str(), MNT_DETACH);
  }
  Mount(const Mount&) = delete;
  Mount& operator=(const Mount&) = delete;

  const std::string& refusal() const { return refusal_; }

 private:
  std::filesystem::path at_;
  std::string refusal_;
};

/// The program faulty_fs, with its file system at `at`.
class FaultyFs {
 public:
  FaultyFs(const char* program, const std::filesystem::path& at) : at_(at) {
    std::filesystem::create_directories(at);
    int ready[2];
    int release[2];
    if (::pipe(ready) != 0 || ::pipe(release) != 0) return;
    ::fcntl(release[1], F_SETFD, FD_CLOEXEC);  // Its end must come when this process closes it.
    ready_fd_ = ready[0];
    child_ = ::fork();
    if (child_ == 0) {
      ::close(ready[0]);
      ::execl(program, program, std::to_string(ready[1]).c_str(), std::to_string(release[0]).c_str(), at.c_str(),
              nullptr);
      ::_exit(127);
    }
    ::close(ready[1]);
    ::close(release[0]);
    release_fd_ = release[1];
    mounted_ = told();
  }
  ~FaultyFs() {
    release();
    if (mounted_) ::umount2(at_.c_str(), MNT_DETACH);
    if (child_ > 0) ::kill(child_, SIGTERM);
    if (child_ > 0) ::waitpid(child_, nullptr, 0);
    ::close(ready_fd_);
  }
  FaultyFs(const FaultyFs&) = delete;
  FaultyFs& operator=(const FaultyFs&) = delete;

  bool mounted() const { return mounted_; }
  /// Waits until one more read is stuck.
  void wait_until_stuck() { told(); }
  /// Lets go of the reads that are stuck, and of all that come later.
  void release() {
    if (release_fd_ >= 0) ::close(release_fd_);
    release_fd_ = -1;
  }

 private:
  // False when the program has ended.
  bool told() {
    char byte = 0;
    return ::read(ready_fd_, &byte, 1) == 1;
  }

  std::filesystem::path at_;
  pid_t child_ = -1;
  int ready_fd_ = -1;
  int release_fd_ = -1;
  bool mounted_ = false;
};

}  // namespace flashpack::testing
