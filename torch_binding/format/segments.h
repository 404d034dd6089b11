/// Plans the memory for a file's tensors so that the engine can read in place. All bindings use this planner.
///
/// Thread safety: any thread may call any function.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "flashpack/checkpoint.h"
#include "flashpack/checksums.h"
#include "flashpack/engine.h"
#include "flashpack/format.h"

namespace flashpack {

/// One extent of a load: bytes of a file that go to one contiguous part of a block.
struct Segment {
  std::uint64_t offset_bytes = 0;  ///< In the file.
  std::uint64_t size_bytes = 0;
  std::size_t file = 0;            ///< Index into Checkpoint::files().
  std::size_t block = 0;           ///< Index into SegmentPlan::blocks.
  std::uint64_t block_offset = 0;  ///< Offset in the block, in bytes.
};

/// The bytes to read for some records, and where each goes.
struct SegmentPlan {
  /// Memory to allocate. On the host, address and `phase_bytes` have to be equal modulo the page, so that tensors are
  /// aligned and the engine can read in place.
  struct Block {
    std::uint64_t size_bytes = 0;
    std::uint64_t phase_bytes = 0;  ///< The file offset of the block's first bytes; 0 if it is not read in place.
  };
  /// Where the bytes of a record are. An empty tensor is in no segment.
  struct Place {
    static constexpr std::size_t kNowhere = ~std::size_t{0};
    std::size_t segment = kNowhere;
    std::uint64_t offset_bytes = 0;  ///< In the segment.
  };

  std::vector<Block> blocks;
  std::vector<Segment> segments;  ///< Sorted by file and by offset in the file.
  std::vector<Place> places;      ///< One for each wanted record, in their order.

  /// Offset of a place in the block of its segment, in bytes. Requires: the place is in a segment.
  std::uint64_t block_offset(const Place& place) const {
    return segments[place.segment].block_offset + place.offset_bytes;
  }

  /// The extents to read from each of `file_count` files, once block i has been allocated at `addresses[i]`.
  std::vector<std::vector<Extent>> extents(std::span<std::byte* const> addresses, std::size_t file_count) const;
};

/// Larger segments are cut between tensors, so that memory can be freed part by part.
inline constexpr std::uint64_t kMaxSegmentBytes = std::uint64_t{1} << 30;
/// On the host, unwanted bytes between two tensors are read, too, up to this many. That saves an extent, a block of
/// memory and a mapping, of which a process may have only so many (65,530 by default). The most that it costs is 0.5 ms
/// for each gap, on a disk of 2 GB/s, and memory of its size. It is a bound and not tuned.
inline constexpr std::uint64_t kMaxUnwantedBytes = std::uint64_t{1} << 20;
/// On a device, tensors begin at multiples of this, as CUDA's own memory does; kernels may rely on that.
inline constexpr std::uint64_t kDeviceAlignBytes = 256;

/// Groups the records at `wanted`, in any order, into segments. A segment takes in the padding that follows it, because
/// only whole stripes can be verified; with Verify::kAlways it reaches to the borders of stripes.
///
/// On the host every segment is a block with the phase of the file, and is read in place. Writers of safetensors files
/// may put tensors at offsets that are no multiples of their element size; in memory these are aligned. They are in
/// other segments, which are not read in place and share blocks, as do the small segments of such a file.
///
/// On a device every tensor begins at a multiple of kDeviceAlignBytes in its block, and small tensors share small
/// blocks, so that a small tensor that outlives the others keeps little memory.
SegmentPlan plan_segments(const Metadata& metadata, std::span<const std::size_t> wanted, Device::Kind kind,
                          Verify verify = Verify::kAuto, std::uint64_t max_segment_bytes = kMaxSegmentBytes);

/// Does the same for tensors of a checkpoint, whose files have no segment or block in common.
SegmentPlan plan_segments(const Checkpoint& checkpoint, std::span<const std::size_t> wanted, Device::Kind kind,
                          Verify verify = Verify::kAuto, std::uint64_t max_segment_bytes = kMaxSegmentBytes);

/// The macroblocks of a file as if each were one tensor of one dim, in file order, so that they can be planned and
/// shown as records are. The result has no checksums, user metadata or identity.
Metadata macroblocks_as_records(const Metadata& metadata);

}  // namespace flashpack
