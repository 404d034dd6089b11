/// Opens a file once for its footer and its payload, so that both come from the same file.
#pragma once

#include <unistd.h>

#include <cerrno>
#include <filesystem>

#include "flashpack/error.h"
#include "flashpack/file_identity.h"

namespace flashpack {

class OpenFile {
 public:
  /// Throws: Error (errno of open).
  explicit OpenFile(const std::filesystem::path& path) : fd_(open_to_read(path)) {
    if (fd_ < 0) throw Error({errno, std::generic_category()}, "open " + path.string(), path);
  }
  ~OpenFile() { ::close(fd_); }
  OpenFile(const OpenFile&) = delete;
  OpenFile& operator=(const OpenFile&) = delete;

  int fd() const noexcept { return fd_; }

 private:
  const int fd_;
};

}  // namespace flashpack
