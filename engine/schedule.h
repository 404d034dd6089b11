/// Which chunk starts next.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "engine/part.h"
#include "engine/steps.h"

namespace flashpack::internal {

/// The parts that have chunks to start. Chunks start in the order in which their transfers were started, except that
/// parts of at most one chunk are served before larger ones. If both wait, the small ones leave one place of the queue
/// depth to the large ones.
///
/// Thread safety: one thread, the driver. Nothing here allocates for a chunk, or blocks in a file system, except that
/// the kernel is asked whether a chunk is cached.
class Schedule {
 public:
  /// `queue_depth` counts the chunks that the disk may have, and a chunk has at most `chunk_bytes`.
  Schedule(std::uint32_t queue_depth, std::uint32_t chunk_bytes)
      : queue_depth_(queue_depth), chunk_bytes_(chunk_bytes) {}

  /// The part's router has chunks to start. Has no effect if the part is here. Requires: the part is planned and has
  /// its turn. It is borrowed until its last chunk has been started, or remove().
  void add(Part& part);
  void remove(Part& part);
  bool has(const Part& part) const;

  /// Starts as many chunks as `steps` has room for. True if it has stopped only so that the caller handles completions
  /// first.
  bool start_chunks(Steps& steps);

 private:
  using Parts = std::vector<Part*>;
  Parts& parts_like(const Part& part);
  static void start_chunks_of(Part& part, Steps& steps, unsigned& questions, std::uint32_t queue_depth);

  const std::uint32_t queue_depth_;
  const std::uint32_t chunk_bytes_;
  static constexpr std::size_t kSmall = 0;
  static constexpr std::size_t kLarge = 1;
  std::array<Parts, 2> parts_;  // Sorted by turn.
};

}  // namespace flashpack::internal
