#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <utility>

namespace flashpack::internal {

/// Owns anonymous memory, which is zero until it is written. The system provides each page when it is first touched,
/// and huge pages where it has them.
class HostRegion {
 public:
  /// data() equals `offset_bytes` modulo 4096, and modulo 2 MiB if the region has that size, so that what lies there in
  /// a file can be read in place. `purpose` is for the message, "map N bytes of memory for PURPOSE".
  /// Throws: Error (errno of mmap).
  HostRegion(std::size_t size_bytes, const char* purpose, std::uint64_t offset_bytes = 0);
  HostRegion(HostRegion&& other) noexcept
      : mapping_(std::exchange(other.mapping_, {})), bytes_(std::exchange(other.bytes_, {})) {}
  HostRegion& operator=(HostRegion&&) = delete;
  ~HostRegion();

  std::byte* data() const noexcept { return bytes_.data(); }
  std::span<std::byte> bytes() const noexcept { return bytes_; }

 private:
  std::span<std::byte> mapping_;
  std::span<std::byte> bytes_;
};

}  // namespace flashpack::internal
