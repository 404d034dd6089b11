/// Memory of the host that loads read to.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <utility>

namespace flashpack {

/// Owns memory for the target of a load. The engine can read to any memory, but a load to this is faster:
///
/// * Its address is that of the bytes in the file, modulo a page, so that the kernel writes whole pages to it, and no
///   copy is made.
/// * It is on huge pages, unless they cost more to get than small ones, as in a virtual machine that has given its free
///   memory back to its host.
/// * The pages of memory of at least 2 MiB are kept when the object is destroyed, and the next HostMemory gets them,
///   because fresh pages cost more than to read a cached file to them. The process never holds more for all HostMemory
///   than it once used at a time. The kernel may take kept pages at any time, so that they count as available memory;
///   release_kept() gives them back at once. Nothing is kept before Linux 5.18, nor where the address space or the
///   memory that may be promised is limited (RLIMIT_AS, vm.overcommit_memory=2).
///
/// Thread safety: any thread may call static members, and use or destroy an object that no other thread uses.
class HostMemory {
 public:
  /// The contents are unspecified. The address is `offset_bytes` modulo 4096, and modulo 2 MiB if it has at least 2
  /// MiB. `offset_bytes` should be the place in the file of what is read there. Throws: Error (errno of mmap).
  explicit HostMemory(std::size_t size_bytes, std::uint64_t offset_bytes = 0);
  HostMemory(HostMemory&& other) noexcept
      : pages_(std::exchange(other.pages_, {})), bytes_(std::exchange(other.bytes_, {})) {}
  HostMemory& operator=(HostMemory&&) = delete;
  ~HostMemory();

  std::byte* data() const noexcept { return bytes_.data(); }
  std::span<std::byte> bytes() const noexcept { return bytes_; }

  /// The size of the memory that is kept for the next HostMemory, of which the kernel may have taken some.
  static std::uint64_t kept_bytes() noexcept;
  /// Gives all kept memory back to the system.
  static void release_kept() noexcept;

 private:
  std::span<std::byte> pages_;
  std::span<std::byte> bytes_;
};

}  // namespace flashpack
