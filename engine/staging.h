/// The memory of the slots.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

namespace flashpack::internal {

/// One anonymous region on huge pages, cut into slots. Taken from the system page by page as slots are first used; not
/// inherited by forked children, so that a fork cannot copy a page away from under a read.
/// Huge pages matter: a 4 MiB read into scattered 4 KiB pages overflows the segment list of most devices and runs at
/// half speed.
class Staging {
 public:
  /// `slot_bytes` is a power of two >= 1 MiB. On NUMA node `numa_node` where there is room; -1 leaves that to the
  /// system. Throws: std::system_error.
  Staging(std::uint64_t total_bytes, std::uint32_t slot_bytes, int numa_node = -1);
  ~Staging();
  Staging(const Staging&) = delete;
  Staging& operator=(const Staging&) = delete;

  /// In order of address.
  const std::vector<std::span<std::byte>>& slots() const noexcept { return slots_; }
  /// Why `numa_node` is not where it lies; empty when it was not asked for, or is.
  const std::string& fallback_reason() const noexcept { return fallback_reason_; }

 private:
  void* mapping_;
  std::size_t mapping_bytes_;
  std::vector<std::span<std::byte>> slots_;
  std::string fallback_reason_;
};

}  // namespace flashpack::internal
