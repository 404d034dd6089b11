/// The pages of HostMemory.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <map>
#include <mutex>
#include <span>

namespace flashpack::internal {

/// Hands out pages and takes them back, and decides which pages are kept and which are huge. Any thread may call it, a
/// forked child, too.
///
/// One instance serves the process, though libraries should have no state of their own, because memory has no engine,
/// and kept pages serve whoever needs memory next. (engine/README.md lists what else the process has.) It is never
/// destroyed, because memory may be given back by static objects. HostMemory uses it, and engines only tell it what
/// they have populated.
class TargetPages {
 public:
  /// Use of_process().
  TargetPages();
  static TargetPages& of_process();

  /// Returns memory that begins at a multiple of 2 MiB and has `before_bytes` + `size_bytes`, rounded up to whole huge
  /// pages. Its contents are unspecified, and fresh pages are untouched. Throws: Error (errno of mmap).
  std::span<std::byte> take(std::size_t before_bytes, std::size_t size_bytes);

  /// Takes what take() returned.
  void give_back(std::span<std::byte> memory) noexcept;

  /// Tells how much time of a CPU it took to write to all of `memory` for the first time. If that is too much for huge
  /// pages, the rest of the memory that take() returned will get small ones. Memory of other origin is ignored.
  void was_touched(std::span<const std::byte> memory, std::chrono::nanoseconds cpu_time) noexcept;

  /// Calls was_touched() of the process's instance. An engine gets this function, so that it need not know who owns the
  /// memory that it fills.
  static void tell_of_process(std::span<const std::byte> memory, std::chrono::nanoseconds cpu_time) noexcept {
    of_process().was_touched(memory, cpu_time);
  }

  std::uint64_t kept_bytes() noexcept;
  void release_kept() noexcept;

 private:
  struct Used {
    std::size_t size_bytes;
    bool may_get_huge_pages;  ///< Whether untouched pages will be huge.
  };

  std::span<std::byte> take_kept(std::size_t size_bytes);
  bool may_try_huge_pages(std::size_t size_bytes);
  void keep(std::span<std::byte> memory);
  void drop_kept(std::uint64_t limit_bytes) noexcept;
  void begin_as_child() noexcept;

  const bool keeps_;
  std::mutex mutex_;  // Protects the rest.
  std::map<std::byte*, Used> used_;
  /// Address to size in bytes; neighbours are merged. A forked child does not have these pages.
  std::map<std::byte*, std::size_t> kept_;
  std::uint64_t used_bytes_ = 0;
  std::uint64_t kept_bytes_ = 0;
  std::uint64_t most_used_bytes_ = 0;
  std::chrono::nanoseconds excess_{};  // CPU time that huge pages have lately cost beyond what small ones would.
  std::uint64_t untried_bytes_ = 0;    // Fresh memory that got small pages since huge ones were last tried.
};

}  // namespace flashpack::internal
