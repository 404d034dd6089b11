/// Memory of the host that loads read to.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <utility>

namespace flashpack {

namespace internal {
class TargetPages;
}

/// When a HostMemory is destroyed, its pool keeps the pages for the next one, because fresh pages cost more than to
/// read a cached file to them. All copies of a pool share one store, also the copy that an engine has
/// (EngineOptions::memory_pool). The pages go back to the system with the last copy and the last memory of the pool.
///
/// Used and kept memory together are never more than the most that was in use at one time. Memory of less than 2 MiB
/// is not kept. The kernel may take kept pages at any time, and therefore they count as available memory. Nothing is
/// kept before Linux 5.18, nor where the address space or the memory that may be promised is limited (RLIMIT_AS,
/// vm.overcommit_memory=2), nor by a pool that a forked child has of its parent.
///
/// Thread safety: any thread may call any member at any time, but assign to, or destroy, only what no other thread
/// uses.
class HostMemoryPool {
 public:
  HostMemoryPool();
  // A pool that has been moved from is still one.
  HostMemoryPool(const HostMemoryPool&) = default;
  HostMemoryPool& operator=(const HostMemoryPool&) = default;

  /// The size of the memory that is kept for the next HostMemory, of which the kernel may have taken some.
  std::uint64_t kept_bytes() const noexcept;
  /// Gives all kept memory back to the system.
  void release_kept() const noexcept;

 private:
  friend class Engine;
  friend class HostMemory;
  std::shared_ptr<internal::TargetPages> pages_;  // Shared by copies and memory, of which any may be the last.
};

/// Owns memory for the target of a load. The engine can read to any memory, but a load to this is faster:
///
/// * Its address is that of the bytes in the file, modulo a page, so that the kernel writes whole pages to it, and no
///   copy is made. In loads of 32 MiB or more, pages that are there already and are small, see below, are the
///   exception: there, to read to huge pages and copy is faster.
/// * It has pages that its pool has kept, if there are any.
/// * Fresh pages are huge ones, unless these cost more to get than small ones, as in a virtual machine that has given
///   its free memory back to its host. An engine finds that out for the memory of its own pool.
///
/// Thread safety: any thread may use or destroy an object that no other thread uses.
class HostMemory {
 public:
  /// The contents are unspecified. The address is `offset_bytes` modulo 4096, and modulo 2 MiB if it has at least 2
  /// MiB. `offset_bytes` should be the place in the file of what is read there. `pool` should be the one of the engine
  /// that reads. Throws: Error (errno of mmap).
  explicit HostMemory(const HostMemoryPool& pool, std::size_t size_bytes, std::uint64_t offset_bytes = 0);
  HostMemory(HostMemory&& other) noexcept
      : pool_(other.pool_), pages_(std::exchange(other.pages_, {})), bytes_(std::exchange(other.bytes_, {})) {}
  HostMemory& operator=(HostMemory&&) = delete;
  ~HostMemory();

  std::byte* data() const noexcept { return bytes_.data(); }
  std::span<std::byte> bytes() const noexcept { return bytes_; }

 private:
  HostMemoryPool pool_;
  std::span<std::byte> pages_;
  std::span<std::byte> bytes_;
};

}  // namespace flashpack
