/// From extents to chunks: what to read or write, and the fragments of memory it belongs to. Pure arithmetic, no I/O.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "engine/ground/pages.h"

namespace flashpack::internal {

/// File bytes of one extent and the memory they belong to: an extent whole, or the part of it that lies in one chunk.
struct Fragment {
  std::uint64_t offset_bytes;
  std::uint64_t size_bytes;
  std::byte* memory;
  std::uint32_t extent = 0;  ///< The index of the extent among all of the request, which has fewer than 2^32.
  bool on_device = false;    ///< `memory` is out of reach for the CPU.
};
static_assert(sizeof(Fragment) <= 32, "A request may have 100,000 of them.");

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

/// The chunks of one file: those of the host first, then those of the device, each in ascending order.
struct Plan {
  std::vector<Chunk> chunks;
  std::vector<Fragment> fragments;
  std::uint64_t total_bytes = 0;  ///< Sum of the fragments' sizes.

  /// Chunks that read `extents`, cut on the grid: no chunk crosses a multiple of `chunk_bytes` in the
  /// file, so that a chunk widened to whole blocks still fits a slot. Memory is read into in place only when it agrees
  /// with the offset modulo a block, so that no page is shared between the kernel and anybody else.
  static Plan of_load(std::vector<Fragment> extents, std::uint32_t chunk_bytes, std::uint32_t block_bytes);

  /// Chunks that write `extents`, which do not overlap, cut on the same grid: those of whole blocks, to be written
  /// directly, and those of less than a block at the ends of what is contiguous. Where extents are less than a block
  /// apart, zeros are written between them, but only if all are on one side, the host's or the device's: otherwise an
  /// extent of the other side may lie between them.
  static Plan of_store(std::vector<Fragment> extents, std::uint32_t chunk_bytes, Alignment alignment);

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

constexpr std::uint64_t end_of(const Fragment& fragment) { return fragment.offset_bytes + fragment.size_bytes; }
constexpr std::uint64_t end_of(const Chunk& chunk) { return chunk.offset_bytes + chunk.size_bytes; }

}  // namespace flashpack::internal
