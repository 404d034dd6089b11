/// One descriptor for the footer of a file and for its payload, so that both are of the same file.
#pragma once

#include <fcntl.h>
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
      // O_NONBLOCK: a FIFO that nobody writes to must not hold us here. It means nothing for regular files.
      : fd_(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY)) {
    if (fd_ < 0) throw Error({errno, std::generic_category()}, "open " + path.string(), path);
  }
  ~OpenFile() { ::close(fd_); }
  OpenFile(const OpenFile&) = delete;
  OpenFile& operator=(const OpenFile&) = delete;

  int fd() const noexcept { return fd_; }

 private:
  int fd_;
};

}  // namespace flashpack
