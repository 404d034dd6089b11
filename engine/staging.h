/// The memory of the slots.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "engine/ground/host_region.h"

namespace flashpack::internal {

/// One region, cut into slots. Forked children do not inherit it, so that a fork cannot copy a page away from under a
/// read. It is on huge pages where the system has them, because a 4 MiB read into scattered 4 KiB pages overflows the
/// segment list of most devices and runs at half speed.
class Staging {
 public:
  /// `slot_bytes` is a power of two >= 1 MiB. The memory is on NUMA node `numa_node` as far as there is room; -1 leaves
  /// the choice to the system. Throws: std::system_error.
  Staging(std::uint64_t total_bytes, std::uint32_t slot_bytes, int numa_node = -1);

  /// The slots, in order of address.
  const std::vector<std::span<std::byte>>& slots() const noexcept { return slots_; }
  /// Why the memory is not on `numa_node`; empty if it is, or if `numa_node` is -1.
  const std::string& fallback_reason() const noexcept { return fallback_reason_; }

 private:
  HostRegion region_;
  std::vector<std::span<std::byte>> slots_;
  std::string fallback_reason_;
};

}  // namespace flashpack::internal
