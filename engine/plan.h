/// From extents to chunks: what to read or write, and the fragments of memory it belongs to. Pure arithmetic, no I/O.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "engine/ground/pages.h"

namespace flashpack::internal {

/// A run of file bytes and the memory it belongs to.
struct Fragment {
  std::uint64_t offset_bytes;
  std::uint64_t size_bytes;
  std::byte* memory;
};

/// One read or write: fragments of one file that lie in one cell of the grid, in ascending order of offset, with only
/// small gaps between them.
struct Chunk {
  std::uint64_t offset_bytes;  ///< First wanted byte. Of a write: the first that is written.
  std::uint32_t size_bytes;    ///< To the end of the last one.
  std::uint32_t first_fragment;
  std::uint32_t fragment_count;
  /// One fragment of whole blocks whose memory is aligned for direct I/O: needs no slot.
  bool in_place;
  bool on_device;  ///< The fragments' memory is out of reach for the CPU: always through a slot.
};

/// What direct I/O on a file asks for; powers of two.
struct Alignment {
  std::uint32_t block_bytes = kPageBytes;   ///< Offsets and sizes are multiples of it. At least kPageBytes.
  std::uint32_t memory_bytes = kPageBytes;  ///< Addresses are multiples of it. At most block_bytes.
};

/// The chunks of one file, in ascending order on each side, the host's and the device's.
struct Plan {
  std::vector<Chunk> chunks;
  std::vector<Fragment> fragments;
  std::uint64_t total_bytes = 0;  ///< Sum of the fragments' sizes.

  /// Chunks that read `extents`, cut on the grid: no chunk crosses a multiple of `chunk_bytes` in the
  /// file, so that a chunk widened to whole blocks still fits a slot. Memory is read into in place only when it agrees
  /// with the offset modulo a block, so that no page is shared between the kernel and anybody else.
  void add_load(std::span<const Fragment> extents, std::uint32_t chunk_bytes, std::uint32_t block_bytes,
                bool on_device = false);

  /// Chunks that write `extents`, which do not overlap, cut on the same grid: those of whole blocks, to be written
  /// directly, and those of less than a block at the ends of a run. In a run, extents follow on each other or, with
  /// `fill_gaps`, are less than a block apart; then what lies between them is written as zeros.
  void add_store(std::span<const Fragment> extents, std::uint32_t chunk_bytes, Alignment alignment, bool fill_gaps,
                 bool on_device = false);

  std::span<const Fragment> fragments_of(const Chunk& chunk) const {
    return std::span(fragments).subspan(chunk.first_fragment, chunk.fragment_count);
  }

  /// Sum of the chunk's fragments; not its size where they leave gaps or overlap.
  std::uint64_t wanted_bytes(const Chunk& chunk) const {
    std::uint64_t sum = 0;
    for (const Fragment& fragment : fragments_of(chunk)) sum += fragment.size_bytes;
    return sum;
  }
};

}  // namespace flashpack::internal
