/// The way of a chunk: the steps that it goes through, as a table.
///
/// Thread safety: any thread, because the result depends on the arguments alone.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

namespace flashpack::internal {

/// Ways consist of these steps. Two are in none: kFree is a job without a chunk, and kAbandoned is a job whose part has
/// failed and whose operation has not come back yet.
enum class Step : std::uint8_t {
  kFree,
  kPopulate,      ///< A worker takes the page faults of memory in place, before the disk uses it.
  kPopulateSlot,  ///< The same for a slot that is fresh.
  kRead,          ///< Reads the file to the view, past the page cache.
  kWrite,         ///< Writes the view to the file, past the page cache.
  kReadIfCached,  ///< Like kReadCached, but gives the chunk back if the disk is needed.
  kReadCached,    ///< Reads the file to memory or view, through the page cache.
  kWriteCached,   ///< Writes memory or view to the file, through the page cache.
  kWait,          ///< Waits until the caller's stream has ended its earlier work.
  kScatter,       ///< Copies the view to memory.
  kGather,        ///< Copies memory to the view.
  kCount,         ///< Counts the view's bytes for checksums.
  kDeliver,       ///< The last step of each way.
  kAbandoned,
};
inline constexpr std::size_t kSteps = static_cast<std::size_t>(Step::kAbandoned) + 1;

/// Whether an operation of this step may wait for the file system of the chunk's file.
constexpr bool is_of_file(Step step) {
  return (step >= Step::kPopulate && step <= Step::kWriteCached) || step == Step::kAbandoned;
}

enum class Direction : std::uint8_t { kLoad, kStore };

/// The properties of a chunk that decide its way.
struct ChunkTraits {
  enum class Route : std::uint8_t {
    kDirect,       ///< Past the page cache.
    kSeemsCached,  ///< Through the page cache, because the bytes seem to be there.
    kBuffered,     ///< Through the page cache, whether or not they are there.
    kRefused,      ///< kDirect until the file system refused that; now through the page cache.
  };
  enum class Memory : std::uint8_t {
    kInPlace,  ///< Without a slot; the fragments' memory is used directly.
    kSlot,     ///< Through a slot.
    kDevice,   ///< Through a slot, with fragments on a device.
  };
  Direction direction;
  Route route;
  Memory memory;
  bool counted;  ///< Whether the bytes are counted for checksums.
};

/// The memory that a chunk is read to or written from.
enum class View : std::uint8_t {
  kFragments,  ///< The memory of each fragment; a worker moves one after the other.
  kInPlace,    ///< The memory of the one fragment.
  kSlot,       ///< A slot with the chunk's bytes.
  kBlocks,     ///< A slot with the chunk's bytes and, at its ends, the rest of the file's disk blocks.
};
constexpr bool has_slot(View view) { return view >= View::kSlot; }

struct Way {
  std::array<Step, 5> steps{};  ///< Ends with kDeliver; the rest is kFree.
  /// The step in which a worker counts the bytes for checksums; kFree if none does.
  Step counts_in = Step::kFree;
  View view = View::kFragments;
  bool to_device = false;  ///< Whether kScatter and kGather copy to or from a device.

  /// Whether the kernel may keep an operation of `step` for an unlimited time: requests to the file's file system, and
  /// work in which a CPU touches the caller's memory, because that may be a map of a file of another one.
  constexpr bool may_be_late(Step step) const {
    const bool touches_memory = step == Step::kScatter || step == Step::kGather || step == Step::kCount;
    return (touches_memory && !to_device) || is_of_file(step);
  }
  /// Whether a chunk may leave `step` out if the memory that it populates has its pages already.
  constexpr bool may_skip(Step step) const {
    return (step == Step::kPopulate || step == Step::kPopulateSlot) && step != counts_in;
  }
};

/// Requires: Memory::kSlot comes with Route::kDirect or kRefused only, and Route::kSeemsCached with a load only.
Way way_of(const ChunkTraits& chunk);

}  // namespace flashpack::internal
