/// Anonymous memory of the host. Its pages are zero, and the system provides each when it is first touched. Any thread
/// may call the functions here.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <utility>

#include "flashpack/error.h"

namespace flashpack::internal {

/// Maps at least `size_bytes`, which begin at a multiple of `alignment_bytes`, a power of two. Returns exactly
/// `size_bytes`, to be given back with unmap(); nothing, with errno set, if the memory cannot be had.
std::span<std::byte> map_memory(std::size_t size_bytes, std::uint64_t alignment_bytes) noexcept;
/// Gives back memory of map_memory(), or whole pages of it.
void unmap(std::span<std::byte> memory) noexcept;
/// The Error of a map_memory() that has just failed: "map N bytes of memory for PURPOSE".
Error map_error(std::size_t size_bytes, const char* purpose);

/// Asks for huge pages where they lie wholly inside `memory`, because the others would hold memory that nobody uses. A
/// kernel without huge pages refuses, and small pages serve as well, only slower.
void advise_huge_pages(std::span<std::byte> memory) noexcept;

/// Owns mapped memory, on huge pages where the system has them.
class HostRegion {
 public:
  /// data() is a multiple of 4096, and of 2 MiB if the region has that size. Throws: Error, as map_error().
  HostRegion(std::size_t size_bytes, const char* purpose);
  HostRegion(HostRegion&& other) noexcept : bytes_(std::exchange(other.bytes_, {})) {}
  HostRegion& operator=(HostRegion&&) = delete;
  ~HostRegion() { unmap(bytes_); }

  std::byte* data() const noexcept { return bytes_.data(); }
  std::span<std::byte> bytes() const noexcept { return bytes_; }

 private:
  std::span<std::byte> bytes_;
};

}  // namespace flashpack::internal
