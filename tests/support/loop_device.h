#pragma once

#include <fcntl.h>
#include <linux/loop.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <filesystem>
#include <string>

namespace flashpack::testing {

/// A block device whose bytes are those of a file, as long as this lives. Where that is not allowed there is none, and
/// refusal() says why.
class LoopDevice {
 public:
  explicit LoopDevice(const std::filesystem::path& file) {
    const int control = ::open("/dev/loop-control", O_RDWR | O_CLOEXEC);
    const int backing = ::open(file.c_str(), O_RDONLY | O_CLOEXEC);
    constexpr int kAttempts = 20;  // Another process may take the free device first.
    for (int attempt = 0; attempt < kAttempts && fd_ < 0; ++attempt) {
      const int number = control < 0 ? -1 : ::ioctl(control, LOOP_CTL_GET_FREE);
      refusal_ = std::string("loop device: ") + std::strerror(errno);
      if (number < 0) break;
      path_ = "/dev/loop" + std::to_string(number);
      fd_ = ::open(path_.c_str(), O_RDONLY | O_CLOEXEC);
      if (fd_ >= 0 && attach(backing)) continue;
      refusal_ = path_.string() + ": " + std::strerror(errno);
      const bool taken = errno == EBUSY;
      ::close(fd_);
      fd_ = -1;
      if (!taken) break;
    }
    ::close(backing);
    ::close(control);
    if (fd_ >= 0) refusal_.clear();
  }
  ~LoopDevice() {
    if (fd_ < 0) return;
    ::ioctl(fd_, LOOP_CLR_FD);
    ::close(fd_);
  }
  LoopDevice(const LoopDevice&) = delete;
  LoopDevice& operator=(const LoopDevice&) = delete;

  const std::string& refusal() const { return refusal_; }
  const std::filesystem::path& path() const { return path_; }
  /// Open for reading.
  int fd() const { return fd_; }
  /// Takes over the size that the file has now.
  bool resize() const { return ::ioctl(fd_, LOOP_SET_CAPACITY) == 0; }

 private:
  bool attach(int backing) const {
    loop_config config{};
    config.fd = static_cast<unsigned>(backing);
    config.info.lo_flags = LO_FLAGS_READ_ONLY;
    return ::ioctl(fd_, LOOP_CONFIGURE, &config) == 0;
  }

  int fd_ = -1;
  std::filesystem::path path_;
  std::string refusal_;
};

}  // namespace flashpack::testing
