#pragma once

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstddef>
#include <filesystem>
#include <string>
#include <system_error>

namespace flashpack::bench {

/// An open descriptor and its path, for errors that name it. Throws: std::system_error.
class OpenFile {
 public:
  OpenFile(std::filesystem::path path, int flags)
      : path_(std::move(path)), fd_(::open(path_.c_str(), flags | O_CLOEXEC, 0666)) {
    if (fd_ < 0) throw error("open");
  }
  OpenFile(const OpenFile&) = delete;
  OpenFile& operator=(const OpenFile&) = delete;
  ~OpenFile() { ::close(fd_); }

  int fd() const { return fd_; }
  std::size_t size_bytes() const { return std::filesystem::file_size(path_); }
  std::system_error error(const char* operation, int code = errno) const {
    return {code, std::generic_category(), std::string(operation) + " " + path_.string()};
  }

 private:
  std::filesystem::path path_;
  int fd_;
};

}  // namespace flashpack::bench
