/// One descriptor for the footer of a file and for its payload, so that both are of the same file.
#pragma once

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <filesystem>
#include <string>

#include "flashpack/error.h"

namespace flashpack {

class OpenFile {
 public:
  /// Throws: Error (errno of open).
  explicit OpenFile(const std::filesystem::path& path)
      // O_NONBLOCK: a FIFO that nobody writes to must not hold us here. A file that somebody has a write lease on gives
      // EWOULDBLOCK then, and is waited for all the same.
      : fd_(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY)) {
    if (fd_ < 0 && errno == EWOULDBLOCK) wait_for_lease(path);
    if (fd_ < 0) throw Error({errno, std::generic_category()}, "open " + path.string(), path);
  }
  ~OpenFile() { ::close(fd_); }
  OpenFile(const OpenFile&) = delete;
  OpenFile& operator=(const OpenFile&) = delete;

  int fd() const noexcept { return fd_; }

 private:
  // Opens it as one does without O_NONBLOCK, if it is a regular file, whatever takes its name meanwhile.
  void wait_for_lease(const std::filesystem::path& path) {
    const int place = ::open(path.c_str(), O_PATH | O_CLOEXEC);
    if (place < 0) return;
    struct stat status{};
    if (::fstat(place, &status) == 0 && S_ISREG(status.st_mode)) {
      const std::string self = "/proc/self/fd/" + std::to_string(place);
      while ((fd_ = ::open(self.c_str(), O_RDONLY | O_CLOEXEC)) < 0 && errno == EINTR) {
      }
    }
    const int reason = errno;
    ::close(place);
    errno = reason;
  }

  int fd_;
};

}  // namespace flashpack
