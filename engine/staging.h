/// The memory of the slots.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "engine/ground/host_region.h"

namespace flashpack::internal {

/// Memory that is cut into slots. Forked children do not inherit it, so that a fork cannot copy a page away from under
/// a read. The engine's own memory is on huge pages where the system has them, because a 4 MiB read into scattered 4
/// KiB pages overflows the segment list of most devices and takes longer (engine_bench, cost/read_into_*).
///
/// Thread safety: any thread may use the slots. One thread makes and destroys the object.
class Staging {
 public:
  /// `slot_bytes` is a power of two >= 1 MiB. The memory is on NUMA node `numa_node` as far as there is room; -1 leaves
  /// the choice to the system. Throws: std::system_error.
  Staging(std::uint64_t total_bytes, std::uint32_t slot_bytes, int numa_node = -1);
  /// The first slots are in `memory`, which begins at a page and is borrowed; those behind are in `own_bytes` of the
  /// engine's own. Throws: std::system_error.
  Staging(std::span<std::byte> memory, std::uint32_t slot_bytes, std::uint64_t own_bytes);
  ~Staging();
  Staging(const Staging&) = delete;
  Staging& operator=(const Staging&) = delete;

  /// The slots. Those of each of the two kinds of memory follow each other without gaps.
  const std::vector<std::span<std::byte>>& slots() const noexcept { return slots_; }
  /// Why the memory is not on `numa_node`; empty if it is, or if `numa_node` is -1.
  const std::string& fallback_reason() const noexcept { return fallback_reason_; }

 private:
  void cut(std::span<std::byte> memory, std::uint32_t slot_bytes);

  std::span<std::byte> borrowed_;
  std::optional<HostRegion> own_;
  std::vector<std::span<std::byte>> slots_;
  std::string fallback_reason_;
};

}  // namespace flashpack::internal
