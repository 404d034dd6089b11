/// Finds out which extents of a file have landed.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "engine/plan.h"

namespace flashpack::internal {

/// Keeps count of what each extent of a file still waits for, as the chunks of its plan are delivered. Thread safety:
/// one thread.
class Landing {
 public:
  /// Extents are numbered from 0 on and below `extents`. If `cell_bytes` is not 0, the chunks of one cell of the grid
  /// land together, so that the stripes in that cell, which may belong to several of its chunks, can be compared first.
  Landing(const Plan& plan, std::uint32_t extents, std::uint64_t cell_bytes);

  /// To be called once for each chunk of the plan, when it has been delivered. Returns the plan indices of the chunks
  /// that land now: this one; or, if it completes its cell, all chunks of the cell in the order of the file; else none.
  std::span<const std::uint32_t> deliver(std::uint32_t chunk);

  /// To be called once for each fragment of the chunks that land. Returns whether it was the last fragment of its
  /// extent.
  bool land(const Fragment& fragment) { return --fragments_left_[fragment.extent] == 0; }

  /// Whether nothing of the extent is left to land, as from the start for an extent of no bytes.
  bool has_landed(std::uint32_t extent) const { return fragments_left_[extent] == 0; }

 private:
  // Chunks that land together.
  struct Group {
    std::uint32_t first;  // Index in chunks_.
    std::uint32_t size = 0;
    std::uint32_t left = 0;  // Chunks that have not been delivered.
  };

  std::vector<std::uint32_t> fragments_left_;  // For each extent.
  std::vector<std::uint32_t> chunks_;          // Sorted by group.
  std::vector<std::uint32_t> group_of_;        // For each chunk.
  std::vector<Group> groups_;
};

}  // namespace flashpack::internal
