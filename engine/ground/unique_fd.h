/// Ownership of file descriptors.
#pragma once

#include <unistd.h>

#include <cerrno>
#include <filesystem>
#include <utility>

#include "engine/ground/error.h"
#include "flashpack/file_identity.h"

namespace flashpack::internal {

/// Owns a file descriptor; -1 is none.
class UniqueFd {
 public:
  UniqueFd() noexcept = default;
  explicit UniqueFd(int fd) noexcept : fd_(fd) {}
  UniqueFd(UniqueFd&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  UniqueFd& operator=(UniqueFd&& other) noexcept {
    if (this != &other) reset(std::exchange(other.fd_, -1));
    return *this;
  }
  ~UniqueFd() { reset(); }

  int get() const noexcept { return fd_; }
  explicit operator bool() const noexcept { return fd_ >= 0; }

  int release() noexcept { return std::exchange(fd_, -1); }

  /// Errors of close(2) are not reported: what must be durable is synced before.
  void reset(int fd = -1) noexcept {
    if (fd_ >= 0) ::close(fd_);
    fd_ = fd;
  }

 private:
  int fd_ = -1;
};

/// Opens the file at `path` with open_to_read(). Throws: Error (errno of open).
inline UniqueFd open_file(const std::filesystem::path& path) {
  UniqueFd fd(open_to_read(path));
  if (!fd) throw file_error(errno_code(errno), "open", path);
  return fd;
}

}  // namespace flashpack::internal
