/// The way of a chunk: the steps that it goes through, as a table.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

namespace flashpack::internal {

/// The first and the last stand in no way: a job without a chunk, and one whose transfer has failed and that waits for
/// its operation to come back.
enum class Step : std::uint8_t {
  kFree,
  kPopulate,      ///< The page faults of memory in place are taken, ahead of the disk.
  kRead,          ///< File to view, past the page cache.
  kWrite,         ///< View to file, past the page cache.
  kReadIfCached,  ///< As kReadCached, but the chunk is given back when the disk would be needed.
  kReadCached,    ///< File to memory or view, through the page cache.
  kWriteCached,   ///< Memory or view to file, through the page cache.
  kWait,          ///< The caller's stream has not come far enough yet.
  kScatter,       ///< View to memory.
  kGather,        ///< Memory to view.
  kCount,         ///< The view's bytes are counted for checksums.
  kDeliver,       ///< The last step of each way.
  kAbandoned,
};
inline constexpr std::size_t kSteps = 13;

/// Whether the kernel may keep an operation of this step for as long as it likes.
constexpr bool may_be_late(Step step) {
  return (step >= Step::kPopulate && step <= Step::kWriteCached) || step == Step::kAbandoned;
}

/// What decides about the way of a chunk.
struct ChunkTraits {
  enum class Direction : std::uint8_t { kLoad, kStore };
  enum class Route : std::uint8_t {
    kDirect,       ///< Past the page cache.
    kSeemsCached,  ///< Through the page cache, because the bytes seem to be there.
    kBuffered,     ///< Through the page cache, whether or not they are there.
    kRefused,      ///< kDirect until the file system refused that; now through the page cache.
  };
  enum class Memory : std::uint8_t {
    kInPlace,  ///< No slot: the file's bytes move from or to the fragments' memory.
    kSlot,     ///< Through a slot.
    kDevice,   ///< Through a slot, and the fragments are a device's.
  };
  Direction direction;
  Route route;
  Memory memory;
  bool counted;  ///< For checksums.
};

struct Way {
  std::array<Step, 5> steps{};  ///< The last is kDeliver; what follows is kFree.
  /// The step in which a worker counts the bytes for checksums, by the way or as all that it does. kFree: none does.
  Step counts_in = Step::kFree;
};

/// Requires: a chunk that is refused, or that goes through the page cache on the host, has no slot of a load.
Way way_of(const ChunkTraits& chunk);

}  // namespace flashpack::internal
