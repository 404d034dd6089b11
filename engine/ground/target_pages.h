/// The pages of a HostMemoryPool.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <map>
#include <mutex>
#include <span>
#include <utility>

#include "flashpack/detail/owner_process.h"

namespace flashpack::internal {

/// Learns what the page faults of writing cost, and knows which memory has small pages for that reason. Thread safety:
/// any thread. It outlives the engine that has it.
class PagePolicy {
 public:
  /// Tells how much time of a CPU it took to write to all of `memory` for the first time.
  virtual void was_touched(std::span<const std::byte> memory, std::chrono::nanoseconds cpu_time) noexcept = 0;
  /// Whether the memory at `address` has small pages because huge ones cost too much. It does not wait, and is false
  /// while another thread changes what there is to know.
  virtual bool has_small_pages(const std::byte* address) noexcept = 0;

 protected:
  ~PagePolicy() = default;
};

/// Hands out pages and takes them back, and decides which pages are kept and which are huge. HostMemory uses it, and
/// engines only tell it what they have populated, and ask what they have been given.
///
/// Thread safety: any thread. In a forked child of the process that made it, which does not have the kept pages, and
/// where the mutex may be locked for ever, it hands out fresh pages and keeps none.
class TargetPages final : public PagePolicy {
 public:
  TargetPages() = default;
  ~TargetPages();
  TargetPages(const TargetPages&) = delete;
  TargetPages& operator=(const TargetPages&) = delete;

  /// Returns memory that begins at a multiple of 2 MiB and has `before_bytes` + `size_bytes`, rounded up to whole huge
  /// pages. Its contents are unspecified, and fresh pages are untouched. Throws: Error (errno of mmap).
  std::span<std::byte> take(std::size_t before_bytes, std::size_t size_bytes);

  /// Takes what take() returned.
  void give_back(std::span<std::byte> memory) noexcept;

  /// If huge pages have taken too much time, the rest of the memory that take() returned will get small ones. Memory of
  /// other origin is ignored.
  void was_touched(std::span<const std::byte> memory, std::chrono::nanoseconds cpu_time) noexcept override;

  bool has_small_pages(const std::byte* address) noexcept override;

  std::uint64_t kept_bytes() noexcept;
  void release_kept() noexcept;

 private:
  struct Kept {
    std::size_t size_bytes;
    bool has_small_pages;  ///< Because huge ones cost too much.
  };
  struct Used : Kept {
    bool may_get_huge_pages;  ///< Whether untouched pages will be huge.
  };

  /// The range that has `address`, or null.
  std::pair<std::byte* const, Used>* find(const std::byte* address);
  std::span<std::byte> take_fresh(std::size_t before_bytes, std::size_t size_bytes, Used& used);
  std::span<std::byte> take_kept(Used& used);
  bool choose_huge_pages(std::size_t size_bytes);
  void keep(std::span<std::byte> memory, bool has_small_pages);
  void drop_kept(std::uint64_t limit_bytes) noexcept;

  const detail::OwnerProcess owner_;
  std::mutex mutex_;  // Protects the rest.
  std::map<std::byte*, Used> used_;
  /// Neighbours with the same kind of pages are merged.
  std::map<std::byte*, Kept> kept_;
  std::uint64_t used_bytes_ = 0;
  std::uint64_t kept_bytes_ = 0;
  std::uint64_t most_used_bytes_ = 0;
  std::chrono::nanoseconds excess_{};  // CPU time that huge pages have lately cost beyond what small ones would.
  std::uint64_t untried_bytes_ = 0;    // Fresh memory that got small pages since huge ones were last tried.
};

}  // namespace flashpack::internal
