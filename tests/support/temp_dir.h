#pragma once

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

#include "tests/support/bulk.h"

namespace flashpack::testing {

/// A fresh directory, removed with all that is in it. On /var/tmp, which unlike /tmp is a disk on most machines.
class TempDir {
 public:
  TempDir() {
    std::string name = "/var/tmp/flashpack-test-XXXXXX";
    if (!::mkdtemp(name.data())) throw std::runtime_error("mkdtemp");
    path_ = name;
  }
  ~TempDir() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  TempDir(const TempDir&) = delete;
  TempDir& operator=(const TempDir&) = delete;

  const std::filesystem::path& path() const { return path_; }
  std::filesystem::path operator/(const std::string& name) const { return path_ / name; }

 private:
  std::filesystem::path path_;
};

inline std::vector<std::byte> random_bytes(std::size_t size, unsigned seed = 1) {
  const Unseen unseen;
  std::vector<std::byte> bytes(size);
  fill_with_random_bytes(bytes.data(), size, seed);
  return bytes;
}

inline std::vector<std::byte> same_byte_everywhere(std::size_t size, std::byte value) {
  const Unseen unseen;
  return std::vector<std::byte>(size, value);
}

inline void write_file(const std::filesystem::path& path, std::span<const std::byte> bytes) {
  std::ofstream out(path, std::ios::binary);
  const Unseen unseen;
  out.write(reinterpret_cast<const char*>(bytes.data()), static_cast<std::streamsize>(bytes.size()));
  if (!out.flush()) throw std::runtime_error("write " + path.string());
}

inline std::vector<std::byte> read_file(const std::filesystem::path& path) {
  std::ifstream in(path, std::ios::binary);
  if (!in) throw std::runtime_error("open " + path.string());
  const Unseen unseen;
  std::vector<std::byte> bytes(std::filesystem::file_size(path));
  in.read(reinterpret_cast<char*>(bytes.data()), static_cast<std::streamsize>(bytes.size()));
  bytes.resize(static_cast<std::size_t>(in.gcount()));
  return bytes;
}

/// Whether the file has these bytes and no others.
inline bool file_has(const std::filesystem::path& path, std::span<const std::byte> bytes) {
  return same_bytes(read_file(path), bytes);
}

/// Writes the file back and asks for its pages to leave the cache.
inline void drop_from_cache(const std::filesystem::path& path) {
  const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  ::fsync(fd);
  ::posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED);
  ::close(fd);
}

/// The pages of a file, or the first of them, are in the cache while this lives, also when the machine wants its memory
/// back; where so much may not be locked (ulimit -l), they are read into it and may leave.
class HeldInCache {
 public:
  explicit HeldInCache(const std::filesystem::path& path) : HeldInCache(path, std::filesystem::file_size(path)) {}
  HeldInCache(const std::filesystem::path& path, std::size_t size_bytes) : size_bytes_(size_bytes) {
    const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
    address_ = ::mmap(nullptr, size_bytes_, PROT_READ, MAP_SHARED, fd, 0);
    ::close(fd);
    if (address_ == MAP_FAILED) throw std::runtime_error("mmap " + path.string());
    locked_ = ::mlock(address_, size_bytes_) == 0;
    if (!locked_) read_file(path);
  }
  ~HeldInCache() { ::munmap(address_, size_bytes_); }
  HeldInCache(const HeldInCache&) = delete;
  HeldInCache& operator=(const HeldInCache&) = delete;

  bool locked() const { return locked_; }

 private:
  std::size_t size_bytes_;
  void* address_;
  bool locked_ = false;
};

}  // namespace flashpack::testing
