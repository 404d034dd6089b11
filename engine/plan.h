/// Cuts extents into chunks: what to read or write, and the fragments of memory that the bytes belong to. Does no I/O.
///
/// Thread safety: as a standard container.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "engine/ground/rounding.h"

namespace flashpack::internal {

/// The place of memory: the host, or from 1 on the number of a device among those of the engine.
using DeviceNumber = std::uint8_t;
inline constexpr DeviceNumber kHost = 0;

/// Contiguous file bytes of one extent, and their memory: the whole extent, or its part in one chunk.
struct Fragment {
  std::uint64_t offset_bytes;
  std::uint64_t size_bytes;
  std::byte* memory;
  std::uint32_t extent = 0;     ///< Index of the extent in its file's request, which has fewer than 2^32 extents.
  DeviceNumber device = kHost;  ///< Where `memory` is. The CPU cannot reach that of a device.
  std::uint16_t priority = 0;   ///< Extent::priority.
};
static_assert(sizeof(Fragment) <= 32, "A request may have 100,000 of them.");

/// One read or write. Its fragments lie in one cell of the grid of `chunk_bytes`, in ascending order of offset, with
/// only small gaps between them.
struct Chunk {
  std::uint64_t offset_bytes;  ///< File offset of the first byte of the fragments.
  std::uint32_t size_bytes;    ///< Size up to the last byte of the fragments.
  std::uint32_t first_fragment;
  std::uint32_t fragment_count;
  /// Whether the chunk needs no slot: it is one fragment of whole disk blocks whose memory is aligned for direct I/O.
  bool in_place;
  DeviceNumber device;  ///< Where the memory of all fragments is. For a device the chunk needs a slot.
};

/// Alignment that direct I/O on a file demands, in powers of two.
struct Alignment {
  std::uint32_t block_bytes =
      kPageBytes;  ///< The disk block. Offsets and sizes are multiples of it. At least kPageBytes.
  std::uint32_t memory_bytes = kPageBytes;  ///< Addresses are multiples of it. At most block_bytes.
};

/// The chunks of one file, in the order in which they are to be moved: by priority, those of the host before those of
/// devices, and in ascending order. In a load the devices take turns, so that the links of all are busy at once.
struct Plan {
  std::vector<Chunk> chunks;
  std::vector<Fragment> fragments;
  std::uint64_t total_bytes = 0;  ///< Sum of the fragments' sizes.

  /// Cuts `extents` on the grid into chunks to read. No chunk crosses a multiple of `chunk_bytes` in the file, so that
  /// a chunk that is widened to whole disk blocks still fits a slot. A read is in place only if memory and file offset
  /// are equal modulo a disk block, so that the kernel writes to no page that others use.
  static Plan of_load(std::vector<Fragment> extents, std::uint32_t chunk_bytes, std::uint32_t block_bytes);

  /// Cuts `extents`, which must not overlap, on the same grid into chunks to write. Chunks of whole disk blocks are
  /// written directly; less than a disk block at the ends of contiguous extents is a chunk of its own. Gaps of at most
  /// zeros_between() are filled with zeros.
  static Plan of_store(std::vector<Fragment> extents, std::uint32_t chunk_bytes, Alignment alignment);

  /// The largest gap between two neighbours of `extents` that of_store() fills with zeros: less than a disk block. It
  /// is 0 unless all extents are on the host or all on one device: where two neighbours of one device have a gap
  /// between them, the file may get bytes of another device there, which zeros would replace.
  static std::uint64_t zeros_between(std::span<const Fragment> extents, Alignment alignment);

  std::span<const Fragment> fragments_of(const Chunk& chunk) const {
    return std::span(fragments).subspan(chunk.first_fragment, chunk.fragment_count);
  }

  /// Sum of the sizes of the chunk's fragments. It differs from the chunk's size if they have gaps or overlap.
  std::uint64_t wanted_bytes(const Chunk& chunk) const {
    std::uint64_t sum = 0;
    for (const Fragment& fragment : fragments_of(chunk)) sum += fragment.size_bytes;
    return sum;
  }
};

constexpr std::uint64_t end_of(const Fragment& fragment) { return fragment.offset_bytes + fragment.size_bytes; }
constexpr std::uint64_t end_of(const Chunk& chunk) { return chunk.offset_bytes + chunk.size_bytes; }

}  // namespace flashpack::internal
