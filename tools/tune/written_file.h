#pragma once

#include <filesystem>
#include <system_error>
#include <utility>

namespace flashpack::bench {

/// Removes the file in the end, also if it could not be written whole.
struct WrittenFile {
  explicit WrittenFile(std::filesystem::path file) : path(std::move(file)) {}
  WrittenFile(const WrittenFile&) = delete;
  WrittenFile& operator=(const WrittenFile&) = delete;
  ~WrittenFile() {
    std::error_code ignored;
    std::filesystem::remove(path, ignored);
  }
  std::filesystem::path path;
};

}  // namespace flashpack::bench
